// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory_resource>
#include <moxie/core/matrix.hpp>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moxie::inline MOXIE_NAMESPACE {

/// Alignment of every block of numbers, in bytes: a cache line, and the widest vector register.
inline constexpr std::size_t alignment = 64;

namespace detail {

inline constexpr std::size_t large_page = std::size_t{2} << 20;

/// Advises the system to use large pages, if it takes advice.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  static_cast<void>(madvise(data, bytes, MADV_HUGEPAGE));
#endif
}

/// Gives memory back to the system before a large block is freed. An allocator may keep it
/// otherwise: glibc keeps blocks of up to 32 MiB once it has freed one of that size. `data` starts
/// at a large page. The last, partial page stays, since other blocks may share it.
inline void give_back([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_DONTNEED)
  if (bytes >= large_page) {
    static_cast<void>(madvise(data, bytes / large_page * large_page, MADV_DONTNEED));
  }
#endif
}

/// Copies bytes into memory that is all zeros. Zeros of the source are not written: untouched pages
/// cost nothing, and neither do their copies.
inline void copy_to_zeros(const void* from, void* to, std::size_t bytes) {
  static constexpr std::array<std::byte, 4096> zeros{};
  for (std::size_t i = 0; i < bytes; i += zeros.size()) {
    const std::byte* part = static_cast<const std::byte*>(from) + i;
    const std::size_t size = (std::min)(bytes - i, zeros.size());
    if (std::memcmp(part, zeros.data(), size) != 0) {
      std::memcpy(static_cast<std::byte*>(to) + i, part, size);
    }
  }
}

/// A stride for rows of `cols` elements that products read. It is an odd number of whole cache
/// lines, so that the rows of a tile do not share sets of a cache.
template <class T>
constexpr Index spread_stride(Index cols) {
  constexpr Index line = Index{alignment / sizeof(T)};
  return ((cols + line - 1) / line | 1) * line;
}

}  // namespace detail

/// Aligned memory for `size()` trivially copyable elements. `resize` keeps the capacity. It neither
/// keeps nor clears the contents. So a buffer that every step fills anew is allocated by the first
/// step only.
///
/// By default, new memory comes from the system and is zero. An untouched large block takes no
/// physical memory, and neither does a copy of it. With a memory resource, memory comes from there,
/// and its contents are undefined.
///
/// A copy has the default memory. Copy assignment keeps the target's resource; moving takes the
/// other's along. The resource must outlive the buffer.
///
/// If memory runs out, `resize`, `reserve`, `assign` and copies throw std::bad_alloc, or the
/// exception of the resource. The buffer is then as it was before.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(Index size, std::pmr::memory_resource* resource = nullptr) : resource_(resource) { resize(size); }
  Buffer(const Buffer& other) : Buffer(other.size_) { copy_elements(other); }
  Buffer(Buffer&& other) noexcept : resource_(other.resource_) { swap(other); }
  Buffer& operator=(const Buffer& other) {
    if (this != &other) {
      Buffer copy(other.size_, resource_);
      copy.copy_elements(other);
      swap(copy);
    }
    return *this;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer taken(std::move(other));
    swap(taken);
    return *this;
  }
  ~Buffer() { release(); }

  void swap(Buffer& other) noexcept {
    std::swap(resource_, other.resource_);
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  /// The source of the memory; null for the default.
  std::pmr::memory_resource* resource() const { return resource_; }

  void resize(Index size) {
    reserve(size);
    size_ = size;
  }

  void reserve(Index capacity) {
    if (capacity > capacity_) {
      const std::size_t bytes = static_cast<std::size_t>(capacity) * sizeof(T);
      if (bytes / sizeof(T) != static_cast<std::size_t>(capacity) || bytes + detail::large_page < bytes) {
        throw std::bad_alloc();
      }
      Buffer fresh(0, resource_);
      fresh.allocate(bytes);
      fresh.capacity_ = capacity;
      swap(fresh);
    }
  }

  void assign(Index size, T value) {
    resize(size);
    std::fill_n(data_, size, value);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }
  T& operator[](Index i) { return data_[i]; }
  const T& operator[](Index i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  std::span<const T> span() const { return {data_, static_cast<std::size_t>(size_)}; }

  /// Resizes to rows·cols and returns them as a matrix.
  RowView<T> matrix(Index rows, Index cols) { return matrix(rows, cols, cols); }
  /// The contents, as `matrix` made them.
  RowView<const T> view(Index rows, Index cols) const { return view(rows, cols, cols); }
  RowView<T> view(Index rows, Index cols) {
    MOXIE_ASSERT(rows * cols == size_);
    return {data_, rows, cols, cols};
  }

  /// The same with rows spread over the cache.
  RowView<T> spread(Index rows, Index cols) { return matrix(rows, cols, detail::spread_stride<T>(cols)); }
  RowView<const T> spread_view(Index rows, Index cols) const { return view(rows, cols, detail::spread_stride<T>(cols)); }
  RowView<T> spread_view(Index rows, Index cols) {
    MOXIE_ASSERT(rows * detail::spread_stride<T>(cols) == size_);
    return {data_, rows, cols, detail::spread_stride<T>(cols)};
  }

 private:
  RowView<T> matrix(Index rows, Index cols, Index stride) {
    if (stride > 0 && rows > (std::numeric_limits<Index>::max)() / stride) {
      throw std::bad_alloc();
    }
    resize(rows * stride);
    return {data_, rows, cols, stride};
  }
  RowView<const T> view(Index rows, Index cols, Index stride) const {
    MOXIE_ASSERT(rows * stride == size_);
    return {data_, rows, cols, stride};
  }

  void allocate(std::size_t bytes) {
    if (resource_ != nullptr) {
      block_ = resource_->allocate(bytes, alignment);
      data_ = static_cast<T*>(block_);
      return;
    }
    // Zeroed memory. Large blocks are fresh pages of the system, which cost nothing until they are
    // touched. They start at a large page and use large pages: a product strides over more small
    // pages than the TLB holds.
    const std::size_t start = bytes >= detail::large_page ? detail::large_page : alignment;
    block_ = std::calloc(1, bytes + start);
    if (block_ == nullptr) {
      throw std::bad_alloc();
    }
    const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(block_) % start;
    data_ = reinterpret_cast<T*>(static_cast<std::byte*>(block_) + (misaligned == 0 ? 0 : start - misaligned));
    if (start == detail::large_page) {
      detail::prefer_large_pages(data_, bytes);
    }
  }

  void copy_elements(const Buffer& other) {
    const std::size_t bytes = std::size_t(size_) * sizeof(T);
    if (resource_ == nullptr) {
      detail::copy_to_zeros(other.data_, data_, bytes);
    } else if (bytes != 0) {
      std::memcpy(data_, other.data_, bytes);
    }
  }

  void release() {
    const std::size_t bytes = static_cast<std::size_t>(capacity_) * sizeof(T);
    if (resource_ == nullptr) {
      detail::give_back(data_, bytes);
      std::free(block_);
    } else if (block_ != nullptr) {
      resource_->deallocate(block_, bytes, alignment);
    }
  }

  std::pmr::memory_resource* resource_ = nullptr;
  void* block_ = nullptr;
  T* data_ = nullptr;
  Index size_ = 0;
  Index capacity_ = 0;
};

namespace detail {

/// The memory resource of something made of buffers. As with them, a copy has the default memory, copy assignment keeps the
/// target's resource, and moving takes the other's along.
class OwnResource {
 public:
  OwnResource() = default;
  OwnResource(std::pmr::memory_resource* resource) : resource_(resource) {}
  OwnResource(const OwnResource& /*other*/) {}
  OwnResource(OwnResource&&) = default;
  OwnResource& operator=(const OwnResource& /*other*/) { return *this; }
  OwnResource& operator=(OwnResource&&) = default;
  ~OwnResource() = default;

  operator std::pmr::memory_resource*() const { return resource_; }

 private:
  std::pmr::memory_resource* resource_ = nullptr;
};

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <moxie/core/matrix.hpp>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moxie {

/// Alignment of every block of numbers, in bytes: a cache line, and the widest vector register.
inline constexpr std::size_t alignment = 64;

namespace detail {

inline constexpr std::size_t large_page = std::size_t{2} << 20;

/// Advice to the system, where it takes any.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  static_cast<void>(madvise(data, bytes, MADV_HUGEPAGE));
#endif
}

/// Gives memory back to the system before a large block is freed: an allocator may keep it (glibc keeps blocks of up to 32 MiB
/// once it has freed one of their size). `data` starts at a large page; the last part of one stays, for others may share it.
inline void give_back([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_DONTNEED)
  if (bytes >= large_page) {
    static_cast<void>(madvise(data, bytes / large_page * large_page, MADV_DONTNEED));
  }
#endif
}

/// Copies bytes into memory that is all zeros. Where the source has zeros nothing is written: pages that nobody has touched
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

/// A distance between rows of `cols` elements for matrices that products read: whole cache lines, an odd number of them, so
/// that the rows of a tile do not share sets of a cache.
template <class T>
constexpr Index spread_stride(Index cols) {
  constexpr Index line = Index{alignment / sizeof(T)};
  return ((cols + line - 1) / line | 1) * line;
}

}  // namespace detail

/// Aligned memory for `size()` trivially copyable elements, zero when it is new. A large block that nobody has written to takes
/// no memory, and neither does a copy. `resize` keeps the capacity, and does not keep or clear the contents: buffers that a
/// step fills anew are allocated by the first step alone.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(Index size) { resize(size); }
  Buffer(const Buffer& other) : Buffer(other.size_) {
    detail::copy_to_zeros(other.data_, data_, std::size_t(size_) * sizeof(T));
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { release(); }

  void swap(Buffer& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  void resize(Index size) {
    reserve(size);
    size_ = size;
  }

  void reserve(Index capacity) {
    if (capacity > capacity_) {
      // Zeroed memory: for large blocks the system's own fresh pages, which cost nothing until they are touched.
      const std::size_t bytes = static_cast<std::size_t>(capacity) * sizeof(T);
      // Large blocks start at a large page, and ask for them: a product strides over more small pages than the processor
      // remembers.
      const std::size_t start = bytes >= detail::large_page ? detail::large_page : alignment;
      const bool fits = bytes / sizeof(T) == static_cast<std::size_t>(capacity) && bytes + start > bytes;
      void* block = fits ? std::calloc(1, bytes + start) : nullptr;
      if (block == nullptr) {
        throw std::bad_alloc();
      }
      release();
      block_ = block;
      const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(block) % start;
      data_ = reinterpret_cast<T*>(static_cast<std::byte*>(block) + (misaligned == 0 ? 0 : start - misaligned));
      if (start == detail::large_page) {
        detail::prefer_large_pages(data_, bytes);
      }
      capacity_ = capacity;
      size_ = 0;
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

  void release() {
    detail::give_back(data_, static_cast<std::size_t>(capacity_) * sizeof(T));
    std::free(block_);
    block_ = nullptr;
    data_ = nullptr;
    capacity_ = 0;
  }

  void* block_ = nullptr;
  T* data_ = nullptr;
  Index size_ = 0;
  Index capacity_ = 0;
};

}  // namespace moxie

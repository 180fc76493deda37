// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <memory_resource>
#include <moxie/core/buffer.hpp>
#include <new>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// Scratch memory: a stack of aligned blocks. It holds nothing that has to be kept.
///
/// A `Frame` gives back everything that was taken since it was opened. The first step of a shape
/// allocates in pieces, which are freed with their frames. When the last frame closes, one block of
/// the needed size takes their place, so later steps allocate nothing. Memory comes from
/// `resource`, by default as a `Buffer`'s. The resource must outlive the workspace.
///
/// A workspace is a memory resource itself, for buffers that live no longer than their frame. Their
/// memory returns with the frame.
///
/// If memory runs out, taking throws std::bad_alloc, or the exception of the resource, and takes
/// nothing. An algorithm that stops this way has closed its frames. Its outputs may be partly
/// written.
class Workspace : public std::pmr::memory_resource {
 public:
  Workspace() = default;
  explicit Workspace(std::pmr::memory_resource* resource) : resource_(resource) {}
  // Scratch has no value: a copy starts empty, with default memory.
  Workspace(const Workspace& /*other*/) : std::pmr::memory_resource() {}
  Workspace& operator=(const Workspace& /*other*/) { return *this; }
  Workspace(Workspace&&) = default;
  Workspace& operator=(Workspace&&) = default;
  ~Workspace() override = default;

  /// A second stack on the same resource, for memory that must outlive frames of this one. A
  /// backward that computes its forward again has its tape there, while the parts of that forward
  /// open and close frames here.
  Workspace& tapes() {
    if (tapes_ == nullptr) {
      tapes_ = std::make_unique<Workspace>(resource_);
    }
    return *tapes_;
  }

  class Frame {
   public:
    explicit Frame(Workspace& workspace) : workspace_(workspace), used_(workspace.used_), blocks_(workspace.blocks_.size()) {}
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;
    ~Frame() { workspace_.close(used_, blocks_); }

   private:
    Workspace& workspace_;
    Index used_;
    std::size_t blocks_;
  };

  /// (rows, cols) uninitialised elements, valid until the enclosing frame closes.
  template <class Scalar>
  RowView<Scalar> matrix(Index rows, Index cols) {
    return {take_rows<Scalar>(rows, cols), rows, cols};
  }

  /// The same with rows spread over the cache.
  template <class Scalar>
  RowView<Scalar> spread(Index rows, Index cols) {
    const Index stride = detail::spread_stride<Scalar>(cols);
    return {take_rows<Scalar>(rows, stride), rows, cols, stride};
  }

 private:
  static constexpr Index largest = (std::numeric_limits<Index>::max)() / 2;  // bytes

  template <class Scalar>
  Scalar* take_rows(Index rows, Index stride) {
    const Index width = stride * Index{sizeof(Scalar)};
    if (width > 0 && rows > largest / width) {
      throw std::bad_alloc();
    }
    return reinterpret_cast<Scalar*>(take(rows * width));
  }

  std::byte* take(Index bytes) {
    const Index padded = (bytes + Index{alignment} - 1) / Index{alignment} * Index{alignment};
    if (padded > largest - used_) {
      throw std::bad_alloc();
    }
    const Index start = used_;
    std::byte* data = nullptr;
    if (blocks_.empty()) {
      data = blocks_.emplace_back(used_ + padded, resource_).data() + start;
    } else if (blocks_.size() == 1 && start + padded <= blocks_.front().size()) {
      data = blocks_.front().data() + start;
    } else {
      data = blocks_.emplace_back((std::max)(bytes, Index{1}), resource_).data();  // an overflow piece
    }
    used_ = start + padded;
    peak_ = (std::max)(peak_, used_);
    return data;
  }

  void* do_allocate(std::size_t bytes, std::size_t aligned) override {
    const std::size_t extra = aligned > alignment ? aligned : 0;
    if (bytes > std::size_t(largest) || extra > std::size_t(largest) - bytes) {
      throw std::bad_alloc();
    }
    std::byte* const data = take(Index(bytes + extra));
    const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(data) % aligned;
    return data + (misaligned == 0 ? 0 : aligned - misaligned);
  }
  void do_deallocate(void* /*block*/, std::size_t /*bytes*/, std::size_t /*aligned*/) override {}
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  void close(Index used, std::size_t blocks) noexcept {
    used_ = used;
    blocks_.resize((std::min)(blocks_.size(), (std::max)(blocks, std::size_t{1})));
    if (used_ == 0 && !blocks_.empty() && blocks_.front().size() < peak_) {
      blocks_.clear();
      try {
        blocks_.emplace_back(peak_, resource_);
      } catch (...) {  // then the next step allocates
      }
    }
  }

  std::pmr::memory_resource* resource_ = nullptr;
  std::unique_ptr<Workspace> tapes_;
  std::vector<Buffer<std::byte>> blocks_;
  Index used_ = 0;
  Index peak_ = 0;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

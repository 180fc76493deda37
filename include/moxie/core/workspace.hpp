// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <moxie/core/buffer.hpp>
#include <vector>

namespace moxie {

/// Scratch that anyone may throw away: a stack of aligned blocks.
///
/// A `Frame` returns everything that was taken since it was opened. The first step of a shape allocates in pieces, which go
/// with their frames; when the last frame closes, one block of the size that was needed takes their place, so later steps
/// allocate nothing.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) {}  // scratch is nobody's value: a copy starts empty
  Workspace& operator=(const Workspace&) { return *this; }
  Workspace(Workspace&&) = default;
  Workspace& operator=(Workspace&&) = default;
  ~Workspace() = default;

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

  /// `rows` x `cols` uninitialised elements, valid until the enclosing frame closes.
  template <class Scalar>
  RowView<Scalar> matrix(Index rows, Index cols) {
    return {reinterpret_cast<Scalar*>(take(rows * cols * Index{sizeof(Scalar)})), rows, cols};
  }

  /// The same with rows spread over the cache.
  template <class Scalar>
  RowView<Scalar> spread(Index rows, Index cols) {
    const Index stride = detail::spread_stride<Scalar>(cols);
    return {matrix<Scalar>(rows, stride).data(), rows, cols, stride};
  }

 private:
  std::byte* take(Index bytes) {
    const Index start = used_;
    used_ += (bytes + Index{alignment} - 1) / Index{alignment} * Index{alignment};
    peak_ = (std::max)(peak_, used_);
    if (blocks_.size() == 1 && used_ <= blocks_.front().size()) {
      return blocks_.front().data() + start;
    }
    if (blocks_.empty()) {
      blocks_.emplace_back(used_);
      return blocks_.front().data() + start;
    }
    blocks_.emplace_back((std::max)(bytes, Index{1}));  // an overflow piece
    return blocks_.back().data();
  }

  void close(Index used, std::size_t blocks) noexcept {
    used_ = used;
    blocks_.resize((std::min)(blocks_.size(), (std::max)(blocks, std::size_t{1})));
    if (used_ == 0 && !blocks_.empty() && blocks_.front().size() < peak_) {
      blocks_.clear();
      try {
        blocks_.emplace_back(peak_);
      } catch (const std::bad_alloc&) {  // then the next step allocates
      }
    }
  }

  std::vector<Buffer<std::byte>> blocks_;
  Index used_ = 0;
  Index peak_ = 0;
};

}  // namespace moxie

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <moxie/config.hpp>
#include <moxie/core/error.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moxie {

/// What changes a tensor.
enum class Trained {
  by_gradient,
  elsewhere,  ///< its gradient is zero: a rule of its own (`update_selection_bias`), a fit (centroids), or nothing. An
              ///< optimizer that decays weights leaves it out.
};

/// One named tensor of a layout. As a matrix it has shape[0] rows (a vector is one row, a scalar is (1,1)).
struct TensorInfo {
  std::string name;
  std::vector<Index> shape;
  Index offset = 0;  ///< in elements, from the start of the block
  Index rows = 1;
  Index cols = 1;
  Trained trained = Trained::by_gradient;
};

/// Names, shapes and offsets of the parameters of a model. Weights, gradients and optimizer moments are blocks that share one.
///
/// Every tensor starts at a multiple of 16 elements (a cache line of floats); the gaps between tensors are zeros.
class Layout {
 public:
  static constexpr Index granularity = 16;

  /// Appends a tensor and returns its position in `tensors()`. Throws ValueError for a name that is taken, a
  /// negative size, and sizes beyond any memory.
  Index add(std::string name, std::vector<Index> shape, Trained trained = Trained::by_gradient) {
    if (find(name) >= 0) {
      throw ValueError("Layout::add: there is a tensor '" + name + "' already");
    }
    TensorInfo info{std::move(name), std::move(shape), size_};
    info.trained = trained;
    for (const Index n : info.shape) {
      expect_at_least("Layout::add", info.name, n, 0);
      expect_value(n == 0 || info.cols <= largest / n, "Layout::add", "the tensor is too large for memory");
      info.cols *= n;
    }
    if (info.shape.size() > 1) {
      info.rows = info.shape.front();
      info.cols = info.rows == 0 ? 0 : info.cols / info.rows;
    }
    expect_value(info.rows * info.cols <= largest - size_, "Layout::add", "the block is too large for memory");
    size_ += (info.rows * info.cols + granularity - 1) / granularity * granularity;
    index_.emplace(info.name, Index(tensors_.size()));
    tensors_.push_back(std::move(info));
    return Index(tensors_.size()) - 1;
  }

  /// Appends all tensors of `part`, names prefixed, and returns the offset of its block: `view.block(offset, part)`.
  Index add_part(std::string_view prefix, const Layout& part) {
    const Index start = size_;
    tensors_.reserve(tensors_.size() + part.tensors_.size());
    for (const TensorInfo& t : part.tensors_) {
      add(std::string(prefix) + t.name, t.shape, t.trained);
    }
    MOXIE_ASSERT(size_ - start == part.size_);
    return start;
  }

  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// Elements of a block, gaps included.
  Index size() const { return size_; }
  /// Elements of all tensors: the number of parameters.
  Index parameter_count() const {
    Index n = 0;
    for (const TensorInfo& t : tensors_) {
      n += t.rows * t.cols;
    }
    return n;
  }

  /// The position of a name, or -1.
  Index find(std::string_view name) const {
    const auto found = index_.find(name);
    return found == index_.end() ? -1 : found->second;
  }

 private:
  static constexpr Index largest = (std::numeric_limits<Index>::max)() / 32;  // elements: what an address can count, and gaps

  std::vector<TensorInfo> tensors_;
  std::map<std::string, Index, std::less<>> index_;
  Index size_ = 0;
};

namespace detail {

/// Two layouts that describe the same block.
inline bool same_layout(const Layout& a, const Layout& b) {
  return &a == &b || (a.size() == b.size() &&
                      std::equal(a.tensors().begin(), a.tensors().end(), b.tensors().begin(), b.tensors().end(),
                                 [](const auto& s, const auto& t) { return s.shape == t.shape && s.name == t.name; }));
}

}  // namespace detail
}  // namespace moxie

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <moxie/config.hpp>
#include <moxie/core/error.hpp>
#include <moxie/core/index.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// The way in which a tensor is trained.
enum class Trained {
  by_gradient,
  elsewhere,  ///< its gradient is zero: a rule (`update_selection_bias`), a fit (centroids), or nothing trains it. An
              ///< optimizer with weight decay leaves it out.
};

/// The use of a tensor. Optimizers choose rates and decay by it.
enum class Role {
  weight,     ///< a matrix that multiplies inputs
  bias,       ///< added to an output
  gate,       ///< a matrix that computes a router's logits
  scale,      ///< a factor
  norm,       ///< the gain of a normalization
  embedding,  ///< a table of rows that are looked up or added
  state,      ///< kept by a router from step to step: a selection bias, centroids, a threshold
};

/// The properties of a tensor besides its name and shape.
struct TensorOptions {
  Role role = Role::weight;
  Trained trained = Trained::by_gradient;
  Index expert = -1;  ///< the tensor's expert; -1: none, every process of a sharded model has the tensor
};

/// One named tensor of a layout. As a matrix it has shape[0] rows (a vector is one row, a scalar is (1,1)).
struct TensorInfo {
  std::string name;
  std::vector<Index> shape;
  Role role = Role::weight;
  Trained trained = Trained::by_gradient;
  Index expert = -1;
  Index rows = 1;
  Index cols = 1;
};

/// Names, shapes and places of the parameters of a model. Weights, gradients and optimizer moments
/// are blocks that share one layout.
///
/// A tensor has a *position*, in order of adding, and an *offset* in a block. In memory, trained
/// tensors that belong to no expert come first, then the experts' trained ones, then those that no
/// gradient trains, each group in order of adding:
///
///     [0, replicated_size())              trained, of no expert
///     [replicated_size(), trained_size()) trained, of experts
///     [trained_size(), size())            trained elsewhere
///
/// So an optimizer changes one range. The tensors that all processes of a sharded model hold are
/// another range. Every tensor starts at a multiple of 16 elements (a cache line of floats); the
/// gaps between tensors are zeros.
class Layout {
 public:
  static constexpr Index granularity = 16;

  Layout() = default;
  Layout(const Layout&) = default;
  Layout(Layout&& other) noexcept : Layout() { swap(other); }  // and leaves an empty one
  Layout& operator=(Layout other) noexcept {
    swap(other);
    return *this;
  }
  ~Layout() = default;

  void swap(Layout& other) noexcept {
    tensors_.swap(other.tensors_);
    places_.swap(other.places_);
    index_.swap(other.index_);
    std::swap(sizes_, other.sizes_);
  }

  /// Appends a tensor and returns its position in `tensors()`. Throws ValueError for a name that
  /// exists, a negative size, and sizes beyond any memory. The layout is then as before.
  Index add(std::string name, std::vector<Index> shape, const TensorOptions& options = {}) {
    if (find(name) >= 0) {
      throw ValueError("Layout::add: there is a tensor '" + name + "' already");
    }
    TensorInfo info{std::move(name), std::move(shape), options.role, options.trained, options.expert};
    for (const Index n : info.shape) {
      expect_at_least("Layout::add", info.name, n, 0);
      expect_value(n == 0 || info.cols <= largest / n, "Layout::add", "the tensor is too large for memory");
      info.cols *= n;
    }
    if (info.shape.size() > 1) {
      info.rows = info.shape.front();
      info.cols = info.rows == 0 ? 0 : info.cols / info.rows;
    }
    expect_value(info.rows * info.cols <= largest - size(), "Layout::add", "the block is too large for memory");
    const std::size_t group = info.trained == Trained::elsewhere ? 2 : info.expert >= 0 ? 1 : 0;
    const Index position = Index(tensors_.size());
    const Index padded = (info.rows * info.cols + granularity - 1) / granularity * granularity;
    index_.emplace(info.name, position);
    places_.push_back({group, sizes_[group]});
    tensors_.push_back(std::move(info));
    sizes_[group] += padded;
    return position;
  }

  /// Appends all tensors of `part`, names prefixed, and returns the position of the first.
  /// `view.part(first, part)` is the view of the part. With an `expert`, the tensors of the part
  /// belong to it.
  Index add_part(std::string_view prefix, const Layout& part, Index expert = -1) {
    const auto first = Index(tensors_.size());
    for (const TensorInfo& t : part.tensors_) {
      add(std::string(prefix) + t.name, t.shape, {t.role, t.trained, expert >= 0 ? expert : t.expert});
    }
    return first;
  }

  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// The number of tensors.
  Index count() const { return Index(tensors_.size()); }
  /// The start of the tensor at a position in a block, in elements.
  Index offset(Index position) const {
    const Place& place = places_[std::size_t(position)];
    return place.in_group + (place.group > 0 ? sizes_[0] : 0) + (place.group > 1 ? sizes_[1] : 0);
  }
  /// Elements of a block, gaps included.
  Index size() const { return sizes_[0] + sizes_[1] + sizes_[2]; }
  Index replicated_size() const { return sizes_[0]; }
  Index trained_size() const { return sizes_[0] + sizes_[1]; }
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
  // In elements: the largest number that addresses can count, less the gaps.
  static constexpr Index largest = (std::numeric_limits<Index>::max)() / 32;

  struct Place {
    std::size_t group;
    Index in_group;  // the offset from the start of the group
  };

  std::vector<TensorInfo> tensors_;
  std::vector<Place> places_;
  std::map<std::string, Index, std::less<>> index_;
  std::array<Index, 3> sizes_{};
};

namespace detail {

/// Whether two layouts describe the same block.
inline bool same_layout(const Layout& a, const Layout& b) {
  return &a == &b ||
         (a.size() == b.size() && a.trained_size() == b.trained_size() &&
          std::equal(
              a.tensors().begin(), a.tensors().end(), b.tensors().begin(), b.tensors().end(), [](const auto& s, const auto& t) {
                return s.shape == t.shape && s.name == t.name && s.trained == t.trained && (s.expert < 0) == (t.expert < 0);
              }));
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <map>
#include <memory>
#include <moxie/core/buffer.hpp>
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
      detail::expect_at_least("Layout::add", info.name, n, 0);
      detail::expect_value(n == 0 || info.cols <= largest / n, "Layout::add", "the tensor is too large for memory");
      info.cols *= n;
    }
    if (info.shape.size() > 1) {
      info.rows = info.shape.front();
      info.cols = info.rows == 0 ? 0 : info.cols / info.rows;
    }
    detail::expect_value(info.rows * info.cols <= largest - size_, "Layout::add", "the block is too large for memory");
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
  static constexpr Index largest = Index{1} << 58;  // elements: what an address can count, with room for the gaps

  std::vector<TensorInfo> tensors_;
  std::map<std::string, Index, std::less<>> index_;
  Index size_ = 0;
};

/// A block of numbers seen through a layout; `ParameterView<const float>` only reads. A pointer pair: pass it by value.
template <class T>
class ParameterView {
 public:
  using Scalar = std::remove_const_t<T>;

  ParameterView() = default;
  ParameterView(const Layout& layout, T* data) : layout_(&layout), data_(data) {}
  template <detail::ConstOf<T> U>
  ParameterView(const ParameterView<U>& other) : ParameterView(other.layout(), other.data()) {}

  const Layout& layout() const { return *layout_; }
  /// Whether it views nothing: made without a layout.
  bool empty() const { return layout_ == nullptr; }
  T* data() const { return data_; }

  /// The tensor at a position of the layout.
  RowView<T> operator[](Index tensor) const {
    const TensorInfo& t = layout_->tensors()[static_cast<std::size_t>(tensor)];
    return {data_ + t.offset, t.rows, t.cols};
  }
  /// The tensor of that name. Throws ValueError if there is none.
  RowView<T> operator[](std::string_view name) const {
    const Index i = layout_->find(name);
    if (i < 0) {
      throw ValueError("parameters: there is no tensor '" + std::string(name) + "'");
    }
    return (*this)[i];
  }
  /// The block of a part: `offset` as `Layout::add_part(prefix, part)` returned it.
  ParameterView block(Index offset, const Layout& part) const { return {part, data_ + offset}; }
  /// All elements in a row, gaps included (they are zero).
  Eigen::Map<std::conditional_t<std::is_const_v<T>, const Eigen::Array<Scalar, Eigen::Dynamic, 1>,
                                Eigen::Array<Scalar, Eigen::Dynamic, 1>>>
  flat() const {
    return {data_, layout_->size()};
  }

 private:
  const Layout* layout_ = nullptr;
  T* data_ = nullptr;
};

/// One aligned block of parameters with its layout: weights, gradients or optimizer moments. Copies are deep, the layout is
/// shared.
template <class Scalar_>
class Parameters {
 public:
  using Scalar = Scalar_;

  Parameters() : Parameters(Layout{}) {}
  /// All zeros.
  explicit Parameters(Layout layout) : Parameters(std::make_shared<const Layout>(std::move(layout))) {}
  explicit Parameters(std::shared_ptr<const Layout> layout) : layout_(std::move(layout)), data_(layout_->size()) {}

  /// Zeros of the same layout: what gradients and moments start from.
  Parameters zeros_like() const { return Parameters(layout_); }
  void set_zero() { std::fill(data_.begin(), data_.end(), Scalar(0)); }

  const Layout& layout() const { return *layout_; }
  Index count() const { return layout_->parameter_count(); }
  ParameterView<Scalar> view() { return {*layout_, data_.data()}; }
  ParameterView<const Scalar> view() const { return {*layout_, data_.data()}; }
  operator ParameterView<Scalar>() { return view(); }
  operator ParameterView<const Scalar>() const { return view(); }
  RowView<Scalar> operator[](std::string_view name) { return view()[name]; }
  RowView<const Scalar> operator[](std::string_view name) const { return view()[name]; }
  auto flat() { return view().flat(); }
  auto flat() const { return view().flat(); }

 private:
  std::shared_ptr<const Layout> layout_;
  Buffer<Scalar> data_;
};

namespace detail {

template <class T>
ParameterView<T> as_view(ParameterView<T> view) {
  return view;
}
template <class Scalar>
ParameterView<Scalar> as_view(Parameters<Scalar>& block) {
  return block.view();
}
template <class Scalar>
ParameterView<const Scalar> as_view(const Parameters<Scalar>& block) {
  return block.view();
}

/// Two layouts that describe the same block.
inline bool same_layout(const Layout& a, const Layout& b) {
  return &a == &b || (a.size() == b.size() &&
                      std::equal(a.tensors().begin(), a.tensors().end(), b.tensors().begin(), b.tensors().end(),
                                 [](const auto& s, const auto& t) { return s.shape == t.shape && s.name == t.name; }));
}

}  // namespace detail

/// Calls `f(info, tensor of first, tensor of second, ...)` for every tensor of blocks that share a layout:
///
///     zip([&](const auto&, auto w, auto g) { w.eigen() -= rate * g.eigen(); }, layer.parameters(), grads);
///
/// Throws ShapeError if the layouts differ.
template <class F, class First, class... Rest>
void zip(F&& f, First&& first, Rest&&... rest) {
  const auto head = detail::as_view(first);
  if (!(detail::same_layout(head.layout(), detail::as_view(rest).layout()) && ...)) {
    throw ShapeError("zip: the blocks have different layouts");
  }
  const std::vector<TensorInfo>& tensors = head.layout().tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    f(tensors[i], head[Index(i)], detail::as_view(rest)[Index(i)]...);
  }
}

}  // namespace moxie

// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <moxie/core/buffer.hpp>
#include <moxie/core/layout.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moxie {

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

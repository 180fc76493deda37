// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <memory_resource>
#include <moxie/core/buffer.hpp>
#include <moxie/core/error.hpp>
#include <moxie/core/extent.hpp>
#include <moxie/core/function_ref.hpp>
#include <moxie/core/layout.hpp>
#include <moxie/core/matrix.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// The tensors of a layout, anywhere in memory. `ParameterView<const float>` only reads. It is a
/// few pointers, so pass it by value. Its `Parameters` or `ParameterTable` and the layout must
/// outlive it.
///
/// A tensor may be absent. An absent gradient is not computed.
template <class T>
class ParameterView {
 public:
  using Scalar = std::remove_const_t<T>;

  ParameterView() = default;
  /// Takes pointers to the tensors, in order of the layout, and the distances between their rows.
  /// `extents` cover at least these tensors.
  ParameterView(const Layout& layout, T* const* data, const Index* stride, const ExtentList& extents)
      : layout_(&layout), data_(data), stride_(stride), extents_(&extents) {}
  template <detail::ConstOf<T> U>
  ParameterView(const ParameterView<U>& other)
      : layout_(other.layout_), data_(other.data_), stride_(other.stride_), extents_(other.extents_) {}

  const Layout& layout() const { return *layout_; }
  /// Whether it has no layout, as a default-constructed view.
  bool empty() const { return layout_ == nullptr; }
  /// Whether the tensor at a position is present. A tensor without elements always is.
  bool has(Index position) const { return data_[position] != nullptr || size_of(position) == 0; }
  /// Whether all tensors are present.
  bool complete() const {
    for (Index i = 0; i < layout_->count(); ++i) {
      if (!has(i)) {
        return false;
      }
    }
    return true;
  }

  /// The tensor at a position of the layout. An absent tensor has no rows and no address.
  RowView<T> operator[](Index position) const {
    const TensorInfo& t = layout_->tensors()[std::size_t(position)];
    return {data_[position], has(position) ? t.rows : 0, t.cols, stride_[position]};
  }
  /// The tensor of this name. Throws ValueError if the layout has none.
  RowView<T> operator[](std::string_view name) const {
    const Index i = layout_->find(name);
    if (i < 0) {
      detail::throw_value_error("parameters", "there is no tensor '" + std::string(name) + "'");
    }
    return (*this)[i];
  }
  /// The tensors of a part: `first` as `Layout::add_part(prefix, part)` returned it.
  ParameterView part(Index first, const Layout& part) const { return {part, data_ + first, stride_ + first, *extents_}; }

  /// Whether one of the tensors shares a byte with a matrix.
  bool overlaps(const Extent& other) const { return !empty() && extents_->overlaps(other) && any_overlaps(other); }
  /// Whether tensors of both share a byte.
  template <class U>
  bool overlaps(const ParameterView<U>& other) const {
    if (empty() || other.empty() || !extents_->overlaps(*other.extents_)) {
      return false;
    }
    for (Index i = 0; i < layout_->count(); ++i) {  // one of them may be a part
      if (other.any_overlaps(extent_of((*this)[i]))) {
        return true;
      }
    }
    return false;
  }

 private:
  template <class U>
  friend class ParameterView;

  Index size_of(Index position) const {
    const TensorInfo& t = layout_->tensors()[std::size_t(position)];
    return t.rows * t.cols;
  }
  bool any_overlaps(const Extent& other) const {
    for (Index i = 0; i < layout_->count(); ++i) {
      if (moxie::overlaps(extent_of((*this)[i]), other)) {
        return true;
      }
    }
    return false;
  }

  const Layout* layout_ = nullptr;
  T* const* data_ = nullptr;
  const Index* stride_ = nullptr;
  const ExtentList* extents_ = nullptr;
};

/// Whether parameters or gradients share a byte with a matrix, or with each other.
template <class T, class U>
bool overlaps(const ParameterView<T>& p, const RowView<U>& m) {
  return p.overlaps(extent_of(m));
}
template <class T, class U>
bool overlaps(const ParameterView<T>& a, const ParameterView<U>& b) {
  return a.overlaps(b);
}

/// Copies all tensors of a layout, except absent ones.
template <class T>
void copy_tensors(ParameterView<const std::type_identity_t<T>> from, ParameterView<T> to) {
  for (Index i = 0; i < to.layout().count(); ++i) {
    const RowView<const T> w = from[i];
    for (Index r = 0; r < (std::min)(w.rows(), to[i].rows()); ++r) {
      std::copy_n(w.row(r), w.cols(), to[i].row(r));
    }
  }
}

/// Sets all tensors to zero.
template <class T>
void set_zero(ParameterView<T> p) {
  for (Index i = 0; i < p.layout().count(); ++i) {
    const RowView<T> w = p[i];
    for (Index r = 0; r < w.rows(); ++r) {
      std::fill_n(w.row(r), w.cols(), T(0));
    }
  }
}

/// The places of a layout's tensors, one by one: tensors of another library, a mapped file, parts
/// of a larger tensor. A table owns no numbers.
///
///     ParameterTable<const float> table(layer.layout(), [&](const TensorInfo& t) -> RowView<const float> {
///       return weights.at(t.name);
///     });
///     layer.forward(table, x, y, tape);
///
/// Rows may have any distance. So the gate_proj of an expert can be the first half of the rows of a
/// fused (E,2H,D) tensor, or every other row of an interleaved one. The layout and the numbers must
/// outlive the table; the layout must not be a temporary.
template <class T>
class ParameterTable {
 public:
  /// All tensors in one block of `layout.size()` numbers, each at its offset.
  ParameterTable(const Layout& layout, T* block) : layout_(&layout) {
    if (layout.count() == 0) {
      return;
    }
    Content content(layout.count());
    for (Index i = 0; i < layout.count(); ++i) {
      content.add(block == nullptr ? nullptr : block + layout.offset(i), layout.tensors()[std::size_t(i)].cols);
    }
    content.extents = ExtentList({Extent(block, block == nullptr ? 0 : 1, layout.size(), 0)});
    content_ = std::make_shared<const Content>(std::move(content));
  }
  /// Each tensor is `tensor_of(info)`, and absent if that has no address.
  ///
  /// Throws ShapeError if a tensor has another shape than the layout says, and, if T is not const,
  /// ValueError if tensors share memory with each other or rows within one do.
  ParameterTable(const Layout& layout, FunctionRef<RowView<T>(const TensorInfo&)> tensor_of) : layout_(&layout) {
    constexpr std::string_view where = "ParameterTable";
    Content content(layout.count());
    std::vector<Extent> extents;
    for (const TensorInfo& t : layout.tensors()) {
      const RowView<T> w = tensor_of(t);
      if (w.data() != nullptr) {
        expect_shape(where, t.name, w, t.rows, t.cols);
        expect_value(std::is_const_v<T> || !rows_overlap(w), where, "the rows of '" + t.name + "' overlap");
        extents.push_back(extent_of(w));
      }
      content.add(w.data(), w.stride());
    }
    content.extents = ExtentList(std::move(extents));
    expect_value(std::is_const_v<T> || !content.extents.overlap_each_other(), where, "tensors overlap each other");
    content_ = std::make_shared<const Content>(std::move(content));
  }
  ParameterTable(Layout&&, T*) = delete;  // would refer to a temporary
  ParameterTable(Layout&&, FunctionRef<RowView<T>(const TensorInfo&)>) = delete;

  const Layout& layout() const { return *layout_; }
  ParameterView<T> view() const {
    static const ExtentList no_extents;
    return content_ != nullptr ? ParameterView<T>(*layout_, content_->data.data(), content_->stride.data(), content_->extents)
                               : ParameterView<T>(*layout_, nullptr, nullptr, no_extents);
  }
  template <class U>
  requires(std::is_same_v<U, T> || detail::ConstOf<T, U>) operator ParameterView<U>() const { return view(); }
  RowView<T> operator[](std::string_view name) const { return view()[name]; }

 private:
  // Copies of a table share it; views stay valid as long as one copy lives. There are two arrays,
  // since an array of {T*, stride} does not convert to one of {const T*, stride}.
  struct Content {
    explicit Content(Index count) {
      data.reserve(std::size_t(count));
      stride.reserve(std::size_t(count));
    }
    void add(T* tensor, Index distance) {
      data.push_back(tensor);
      stride.push_back(distance);
    }
    std::vector<T*> data;
    std::vector<Index> stride;
    ExtentList extents;
  };

  const Layout* layout_;
  std::shared_ptr<const Content> content_;  // null: no tensors
};

namespace detail {

/// The layout of moved-from blocks and layers. Nothing is allocated.
inline std::shared_ptr<const Layout> empty_layout() noexcept {
  static const Layout layout;
  return {std::shared_ptr<const Layout>(), &layout};
}

}  // namespace detail

/// One aligned block of parameters with its layout: weights, gradients or optimizer moments. Copies
/// are deep and share the layout. A moved-from block has no tensors.
template <class Scalar_>
class Parameters {
 public:
  using Scalar = Scalar_;
  using Flat = Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>>;
  using ConstFlat = Eigen::Map<const Eigen::Array<Scalar, Eigen::Dynamic, 1>>;

  Parameters() : Parameters(detail::empty_layout()) {}
  /// All zeros. Memory comes from `resource`, by default as a `Buffer`'s. The resource must outlive
  /// the block and any block that is moved from it.
  explicit Parameters(Layout layout, std::pmr::memory_resource* resource = nullptr)
      : Parameters(std::make_shared<const Layout>(std::move(layout)), resource) {}
  explicit Parameters(std::shared_ptr<const Layout> layout, std::pmr::memory_resource* resource = nullptr)
      : layout_(std::move(layout)), data_(layout_->size(), resource), table_(*layout_, data_.data()) {
    if (resource != nullptr) {
      set_zero();
    }
  }
  Parameters(const Parameters& other) : layout_(other.layout_), data_(other.data_), table_(*layout_, data_.data()) {}
  Parameters(Parameters&& other) noexcept : Parameters() { swap(other); }
  Parameters& operator=(Parameters other) noexcept {
    swap(other);
    return *this;
  }
  ~Parameters() = default;

  void swap(Parameters& other) noexcept {
    layout_.swap(other.layout_);
    data_.swap(other.data_);
    std::swap(table_, other.table_);
  }

  /// Zeros of the same layout: the start of gradients and moments.
  Parameters zeros_like() const { return Parameters(layout_); }
  void set_zero() { std::fill(data_.begin(), data_.end(), Scalar(0)); }

  const Layout& layout() const { return *layout_; }
  Index count() const { return layout_->parameter_count(); }
  ParameterView<Scalar> view() { return table_; }
  ParameterView<const Scalar> view() const { return table_; }
  operator ParameterView<Scalar>() { return view(); }
  operator ParameterView<const Scalar>() const { return view(); }
  RowView<Scalar> operator[](std::string_view name) { return view()[name]; }
  RowView<const Scalar> operator[](std::string_view name) const { return view()[name]; }

  /// All elements in a row, gaps included (they are zero).
  Flat flat() { return {data_.data(), data_.size()}; }
  ConstFlat flat() const { return {data_.data(), data_.size()}; }
  /// The elements that gradients train. An optimizer changes them, and weight decay may shrink
  /// them.
  Flat trained() { return {data_.data(), layout_->trained_size()}; }
  ConstFlat trained() const { return {data_.data(), layout_->trained_size()}; }

 private:
  std::shared_ptr<const Layout> layout_;
  Buffer<Scalar> data_;
  ParameterTable<Scalar> table_;
};

namespace detail {

template <class T>
ParameterView<T> as_view(ParameterView<T> view) {
  return view;
}
template <class T>
ParameterView<T> as_view(const ParameterTable<T>& table) {
  return table.view();
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

/// Calls `f(info, tensor of first, tensor of second, ...)` for every tensor of blocks or tables
/// that share a layout:
///
///     zip([&](const auto&, auto w, auto g) { w.eigen() -= rate * g.eigen(); }, layer.parameters(), grads);
///
/// A tensor that is absent in one of them has no rows there. Throws ShapeError if the layouts
/// differ.
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

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <moxie/core/matrix.hpp>
#include <moxie/kernel/element.hpp>
#include <moxie/kernel/write.hpp>
#include <type_traits>

/// A matrix product as a plain value: sizes, two factors, a destination. It computes nothing.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

enum class Transpose { no, yes };

/// Rows in memory. Row r starts at `data + stride · (index ? index[r] : r)`, so an index gathers
/// rows without a copy. Rows from `gap_at` on lie `gap` elements further, so that two matrices of
/// one stride can form one factor.
template <class T>
struct Rows {
  T* data = nullptr;
  Index stride = 0;
  const Index* index = nullptr;
  Index gap_at = 0;
  Index gap = 0;

  T* row(Index r) const { return data + stride * (index != nullptr ? index[r] : r) + (r >= gap_at ? gap : 0); }
};

/// A factor of a product: rows, or their transpose.
template <class T>
struct Operand {
  Rows<const T> rows;
  Transpose transpose = Transpose::no;

  const T* row(Index r) const { return rows.row(r); }
  bool transposed() const { return transpose == Transpose::yes; }
};

/// The right factor B: Elements, or Scalars that packing rounds to Elements.
template <class Scalar, class Element>
class Factor {
 public:
  Factor() = default;
  Factor(const Operand<Element>& elements) : elements_(elements) {}
  Factor(const Operand<Scalar>& scalars) requires(!std::is_same_v<Scalar, Element>)
      : elements_{{nullptr, scalars.rows.stride, scalars.rows.index, scalars.rows.gap_at, scalars.rows.gap}, scalars.transpose},
        scalars_(scalars.rows.data) {}

  bool transposed() const { return elements_.transposed(); }
  /// Calls `f` with the operand, of Elements or of Scalars.
  template <class F>
  decltype(auto) visit(F&& f) const {
    if constexpr (!std::is_same_v<Scalar, Element>) {
      if (scalars_ != nullptr) {
        const Rows<const Element>& rows = elements_.rows;
        return f(Operand<Scalar>{{scalars_, rows.stride, rows.index, rows.gap_at, rows.gap}, elements_.transpose});
      }
    }
    return f(elements_);
  }

 private:
  Operand<Element> elements_;
  const Scalar* scalars_ = nullptr;
};

/// The destination of a product.
template <class Scalar>
struct Destination {
  Rows<Scalar> rows;
  Write write = Write::replace;

  Scalar* row(Index r) const { return rows.row(r); }
  /// Without the first rows; of rows in order, without an index and a gap.
  Destination from(Index first) const { return {{row(first), rows.stride}, write}; }
};

/// C (m,n) = A (m,k) B (k,n), or C += A B. Sums are Scalars; the factors are multiplied as Elements.
template <class Scalar_, class Element_ = Scalar_>
struct Product {
  using Scalar = Scalar_;
  using Element = Element_;

  Index m = 0;
  Index n = 0;
  Index k = 0;
  Operand<Element> a = {};
  Factor<Scalar, Element> b = {};
  Destination<Scalar> c = {};
  /// B has 2n columns: gate columns, then up columns. Columns j and n + j share a panel, so that an epilogue has both sums.
  bool gated = false;
  /// B as prepacked panels (`prepack`) in place of `b`.
  const Unit<Element>* panels = nullptr;
  /// n numbers that the default epilogue adds to each row; null for none.
  const Scalar* bias = nullptr;

  Index steps() const { return (k + UnitOf<Element>::elements - 1) / UnitOf<Element>::elements; }
};

template <class T>
Rows<T> rows_of(RowView<T> m, const Index* index = nullptr) {
  return {m.data(), m.stride(), index};
}
/// The rows of `top`, then those of `bottom`, which must have the same stride.
template <class T>
Rows<T> stacked(RowView<T> top, RowView<T> bottom) {
  MOXIE_ASSERT(top.stride() == bottom.stride());
  // As numbers: pointers into two allocations have no difference.
  const auto bytes =
      std::intptr_t(reinterpret_cast<std::uintptr_t>(bottom.data()) - reinterpret_cast<std::uintptr_t>(top.row(top.rows())));
  return {top.data(), top.stride(), nullptr, top.rows(), Index(bytes / std::intptr_t{sizeof(T)})};
}
template <class T>
Operand<T> plain(RowView<const std::type_identity_t<T>> m, const Index* index = nullptr) {
  return {rows_of(m, index), Transpose::no};
}
template <class T>
Operand<T> transposed(RowView<const std::type_identity_t<T>> m, const Index* index = nullptr) {
  return {rows_of(m, index), Transpose::yes};
}
template <class Scalar>
Destination<Scalar> replace(RowView<std::type_identity_t<Scalar>> m, const Index* index = nullptr) {
  return {rows_of(m, index), Write::replace};
}
template <class Scalar>
Destination<Scalar> add_to(RowView<std::type_identity_t<Scalar>> m, const Index* index = nullptr) {
  return {rows_of(m, index), Write::add};
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

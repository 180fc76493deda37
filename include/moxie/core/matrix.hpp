// SPDX-License-Identifier: MIT
#pragma once

#include <Eigen/Core>
#include <moxie/config.hpp>
#include <moxie/core/bfloat16.hpp>
#include <moxie/core/error.hpp>
#include <moxie/core/extent.hpp>
#include <moxie/core/index.hpp>
#include <type_traits>

/// Eigen's requirements of a number. Nothing else of moxie's BFloat16 knows Eigen.
template <>
struct Eigen::NumTraits<moxie::BFloat16> : Eigen::GenericNumTraits<moxie::BFloat16> {
  enum { RequireInitialization = 0 };
  static moxie::BFloat16 dummy_precision() { return moxie::BFloat16(0.05F); }
};

namespace moxie::inline MOXIE_NAMESPACE {

static_assert(std::is_same_v<Index, Eigen::Index>, "moxie: Eigen's index is another type: EIGEN_DEFAULT_DENSE_INDEX_TYPE");

/// The matrix of the interface: row-major, one row a token (or one row an output unit, for
/// weights). DontAlign takes memory from malloc under every instruction set. Without it Eigen uses
/// another allocator under AVX, and a translation unit without AVX would free memory of one with
/// AVX.
template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor | Eigen::DontAlign>;

namespace detail {

// Eigen expressions that a view can point into: plain memory, rows contiguous, the same scalar.
template <class Derived>
inline constexpr bool row_contiguous = [] {
  using Traits = Eigen::internal::traits<Derived>;
  if constexpr ((Traits::Flags & Eigen::DirectAccessBit) == 0) {
    return false;
  } else {
    return bool(Derived::IsRowMajor) && int(Derived::InnerStrideAtCompileTime) == 1;
  }
}();

// T is const U: RowView<float> converts to RowView<const float>, not back.
template <class U, class T>
concept ConstOf = std::is_same_v<const U, T>;

template <class M, class T>
concept ViewableAs = std::is_base_of_v<Eigen::DenseBase<std::remove_cvref_t<M>>, std::remove_cvref_t<M>> &&
    row_contiguous<std::remove_cvref_t<M>> && std::is_convertible_v<decltype(std::declval<M&>().data()), T*>;

}  // namespace detail

/// A view of rows: pointer, sizes and distance between rows, never a copy. `RowView<const float>`
/// only reads.
///
/// It converts from a row-major `Eigen::Matrix`, `Map` or block of whole or part rows. Anything
/// else (a column-major matrix, another scalar, an expression) does not convert. So nothing is
/// copied silently, in contrast to `Eigen::Ref<const ...>`.
template <class T>
class RowView {
 public:
  using Scalar = std::remove_const_t<T>;
  using Plain = Matrix<Scalar>;
  using Map = Eigen::Map<std::conditional_t<std::is_const_v<T>, const Plain, Plain>, Eigen::Unaligned,
                         Eigen::OuterStride<Eigen::Dynamic>>;

  RowView() = default;
  RowView(T* data, Index rows, Index cols, Index stride) : data_(data), rows_(rows), cols_(cols), stride_(stride) {}
  RowView(T* data, Index rows, Index cols) : RowView(data, rows, cols, cols) {}

  template <detail::ViewableAs<T> M>
  RowView(M&& m)  // NOLINT(bugprone-forwarding-reference-overload): constrained; an implicit view is the point
      : RowView(m.data(), m.rows(), m.cols(), m.outerStride()) {}

  template <detail::ConstOf<T> U>
  RowView(const RowView<U>& other) : RowView(other.data(), other.rows(), other.cols(), other.stride()) {}

  T* data() const { return data_; }
  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  Index size() const { return rows_ * cols_; }
  /// Distance between the starts of consecutive rows, in elements.
  Index stride() const { return stride_; }
  T* row(Index i) const { return data_ + i * stride_; }
  T& operator()(Index i, Index j) const { return data_[i * stride_ + j]; }
  RowView middle_rows(Index first, Index count) const { return {row(first), count, cols_, stride_}; }
  /// The same memory as an Eigen matrix.
  Map eigen() const { return Map(data_, rows_, cols_, Eigen::OuterStride<Eigen::Dynamic>(stride_)); }

 private:
  T* data_ = nullptr;
  Index rows_ = 0;
  Index cols_ = 0;
  Index stride_ = 0;
};

/// The bytes of a view.
template <class T>
Extent extent_of(const RowView<T>& m) {
  return {m.data(), m.rows(), m.cols(), m.stride()};
}

/// Whether two views share a byte. Strides may differ, be zero or negative.
template <class A, class B>
bool overlaps(const RowView<A>& a, const RowView<B>& b) {
  return overlaps(extent_of(a), extent_of(b));
}

/// Whether the rows of a view share elements. Such a view cannot be an output.
template <class A>
bool rows_overlap(const RowView<A>& a) {
  return a.rows() > 1 && (a.stride() < 0 ? -a.stride() : a.stride()) < a.cols();
}

namespace detail {

using moxie::overlaps;
using moxie::rows_overlap;

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

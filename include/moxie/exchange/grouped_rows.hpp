// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/matrix.hpp>
#include <moxie/kernel/product.hpp>
#include <span>
#include <type_traits>

namespace moxie::inline MOXIE_NAMESPACE {

/// What a bank of experts is given: rows, grouped by expert. Expert e owns rows [starts[e], starts[e+1]); row r is
/// `rows.row(r)`, or `rows.row(index[r])` where an index gathers (a sparse plan: the tokens). Banks know nothing of plans.
template <class Scalar>
struct GroupedRows {
  std::span<const Index> starts;  ///< E + 1 offsets
  RowView<const Scalar> rows;
  const Index* index = nullptr;

  Index experts() const { return Index(starts.size()) - 1; }
  /// R.
  Index count() const { return starts.back(); }
  Index count(Index expert) const { return begin(expert + 1) - begin(expert); }
  Index begin(Index expert) const { return starts[std::size_t(expert)]; }
  const Scalar* row(Index r) const { return rows.row(index != nullptr ? index[r] : r); }
  /// The rows of an expert as a factor of a product.
  kernel::Operand<Scalar> operand(Index expert) const {
    const Index first = begin(expert);
    return index != nullptr ? kernel::Operand<Scalar>{{rows.data(), rows.stride(), index + first}}
                            : kernel::Operand<Scalar>{{rows.row(first), rows.stride()}};
  }
  /// The rows of an expert of a matrix that has one for each of these, in their order.
  template <class T>
  RowView<T> part(RowView<T> m, Index expert) const {
    return m.middle_rows(begin(expert), count(expert));
  }
};

/// The gradient of a bank's output, which is never formed for a sparse plan: with t = index[r],
///
///     dh_r = weight_r dy_t      ∂loss/∂weight_r = ⟨h_r, dy_t⟩
///
/// The bank answers with dweight, so that nobody keeps h. Without an index, row r of dy belongs to row r; without weights all
/// are 1.
template <class Scalar>
struct OutputGradient {
  RowView<const Scalar> dy;
  const Index* index = nullptr;
  const Scalar* weight = nullptr;
  Scalar* dweight = nullptr;  ///< (R), overwritten; null: not wanted

  OutputGradient(RowView<const Scalar> gradient, const Index* rows = nullptr, const Scalar* weights = nullptr,
                 Scalar* dweights = nullptr)
      : dy(gradient), index(rows), weight(weights), dweight(dweights) {}
  /// Of a matrix that has a row for each row of the bank.
  template <class M>
  OutputGradient(const M& dh) requires std::is_convertible_v<const M&, RowView<const Scalar>> : dy(dh) {}

  const Scalar* row(Index r) const { return dy.row(index != nullptr ? index[r] : r); }
  Scalar factor(Index r) const { return weight != nullptr ? weight[r] : Scalar(1); }
};

}  // namespace moxie::inline MOXIE_NAMESPACE

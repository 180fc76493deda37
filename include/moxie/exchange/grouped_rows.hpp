// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/matrix.hpp>
#include <moxie/kernel/product.hpp>
#include <span>

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

}  // namespace moxie::inline MOXIE_NAMESPACE

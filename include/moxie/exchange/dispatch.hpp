// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/exec.hpp>
#include <moxie/exchange/grouped_rows.hpp>
#include <moxie/kernel/gemm.hpp>
#include <moxie/kernel/simd.hpp>
#include <moxie/routing/plan.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// The rows of the experts, (A x): sparse plans gather tokens by an index, nothing is copied and `slots` may be empty.
template <class Scalar>
GroupedRows<Scalar> dispatch(const SparsePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> x,
                             RowView<std::type_identity_t<Scalar>> /*slot_rows*/, const Exec& /*exec*/) {
  return {plan.expert_starts(), x, plan.token().data()};
}

/// The slots X̃_b = D_bᵀ X_b of all sequences, computed into `slots` (R,D).
template <class Scalar>
GroupedRows<Scalar> dispatch(const DensePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> x,
                             RowView<std::type_identity_t<Scalar>> slot_rows, const Exec& exec) {
  const Sequences sequences = plan.sequences();
  kernel::grouped_gemm<Scalar>(
      sequences.count(),
      [&](Index b) -> kernel::Product<Scalar> {
        const Index first = sequences.begin(b);
        const Index length = sequences.length(b);
        return {plan.slot_count(),
                x.cols(),
                length,
                kernel::transposed<Scalar>(plan.dispatch().middle_rows(first, length)),
                kernel::plain<Scalar>(x.middle_rows(first, length)),
                kernel::replace<Scalar>(slot_rows, plan.slot_rows(b))};
      },
      exec);  // (N,L)(L,D) -> (N,D)
  return {plan.expert_starts(), slot_rows, nullptr};
}

/// The adjoint of dispatch: dx = Aᵀ drows, or dx += Aᵀ drows. Every token sums its rows in the order of its choices. A sparse
/// plan's dispatch has no gradient of its own.
template <class Scalar>
void dispatch_backward(const SparsePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> /*x*/,
                       RowView<const std::type_identity_t<Scalar>> drows,
                       const kernel::Destination<std::type_identity_t<Scalar>>& dx,
                       typename SparsePlan<Scalar>::Gradient& /*dplan*/, const Exec& exec) {
  exec.parallel_ranges(plan.tokens(), 64, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      Scalar* const sum = dx.row(t);
      if (dx.write != kernel::Write::add) {
        std::fill_n(sum, drows.cols(), Scalar(0));
      }
      for (const Index r : plan.rows_of_token(t)) {
        kernel::map(
            drows.cols(), sum, [](auto s, auto d) { return s + d; }, sum, drows.row(r));
      }
    }
  });
}

/// dX_b = D_b dX̃_b, or dX_b += D_b dX̃_b, and dD_b = X_b dX̃_bᵀ into `dplan`.
template <class Scalar>
void dispatch_backward(const DensePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> x,
                       RowView<const std::type_identity_t<Scalar>> drows,
                       const kernel::Destination<std::type_identity_t<Scalar>>& dx, typename DensePlan<Scalar>::Gradient& dplan,
                       const Exec& exec) {
  const Sequences sequences = plan.sequences();
  const RowView<Scalar> dd = dplan.dispatch.spread(plan.tokens(), plan.slot_count());
  kernel::grouped_gemm<Scalar>(
      2 * sequences.count(),
      [&](Index i) -> kernel::Product<Scalar> {
        const Index b = i / 2;
        const Index first = sequences.begin(b);
        const Index length = sequences.length(b);
        if (i % 2 == 0) {  // (L,N)(N,D) -> (L,D)
          return {length,
                  x.cols(),
                  plan.slot_count(),
                  kernel::plain<Scalar>(plan.dispatch().middle_rows(first, length)),
                  kernel::plain<Scalar>(drows, plan.slot_rows(b)),
                  dx.from(first)};
        }
        return {length,  // (L,D)(D,N) -> (L,N)
                plan.slot_count(),
                x.cols(),
                kernel::plain<Scalar>(x.middle_rows(first, length)),
                kernel::transposed<Scalar>(drows, plan.slot_rows(b)),
                kernel::stream_to<Scalar>(dd, first)};
      },
      exec);
}

}  // namespace moxie::inline MOXIE_NAMESPACE

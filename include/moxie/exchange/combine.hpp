// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/exec.hpp>
#include <moxie/kernel/gemm.hpp>
#include <moxie/kernel/simd.hpp>
#include <moxie/routing/plan.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// y = C h, or y += C h: y_t += Σ_{r of t} weight_r h_r, in the order of the token's choices, one fused multiply-add a term (a
/// multiply and an add where the instruction set has none). One task owns a token, so no atomics.
///
///     combine(plan, h, kernel::replace<float>(y), exec)     or kernel::add_to<float>(y)
template <class Scalar>
void combine(const SparsePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> h,
             const kernel::Destination<std::type_identity_t<Scalar>>& y, const Exec& exec) {
  exec.parallel_ranges(plan.tokens(), 64, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      Scalar* const sum = y.row(t);
      if (y.write != kernel::Write::add) {
        std::fill_n(sum, h.cols(), Scalar(0));
      }
      for (const Index r : plan.rows_of_token(t)) {
        const Scalar weight = plan.weight(r);
        kernel::map(
            h.cols(), sum, [=](auto s, auto v) { return kernel::fma(decltype(v)(weight), v, s); }, sum, h.row(r));
      }
    }
  });
}

/// Y_b = C_b Ỹ_b, or Y_b += C_b Ỹ_b.
template <class Scalar>
void combine(const DensePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> h,
             const kernel::Destination<std::type_identity_t<Scalar>>& y, const Exec& exec) {
  const Sequences sequences = plan.sequences();
  kernel::grouped_gemm<Scalar>(
      sequences.count(),
      [&](Index b) -> kernel::Product<Scalar> {
        const Index first = sequences.begin(b);
        const Index length = sequences.length(b);
        return {length,
                h.cols(),
                plan.slot_count(),
                kernel::plain<Scalar>(plan.combine().middle_rows(first, length)),
                kernel::plain<Scalar>(h, plan.slot_rows(b)),
                y.from(first)};
      },
      exec);  // (L,N)(N,D) -> (L,D)
}

/// The adjoint of combine, dh_r = weight_r dy_t, overwritten, and ∂/∂weight_r = ⟨h_r, dy_t⟩.
template <class Scalar>
void combine_backward(const SparsePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> h,
                      RowView<const std::type_identity_t<Scalar>> dy, RowView<std::type_identity_t<Scalar>> dh,
                      typename SparsePlan<Scalar>::Gradient& dplan, const Exec& exec) {
  dplan.weight.resize(plan.rows());
  exec.parallel_ranges(plan.rows(), 64, [&](Index begin, Index end) {
    for (Index r = begin; r < end; ++r) {
      const Index t = plan.token(r);
      const Scalar weight = plan.weight(r);
      kernel::map(
          dy.cols(), dh.row(r), [=](auto d) { return decltype(d)(weight) * d; }, dy.row(t));
      dplan.weight[r] = kernel::dot(h.cols(), h.row(r), dy.row(t));
    }
  });
}

/// dỸ_b = C_bᵀ dY_b, overwritten, and dC_b = dY_b Ỹ_bᵀ into `dplan`.
template <class Scalar>
void combine_backward(const DensePlan<Scalar>& plan, RowView<const std::type_identity_t<Scalar>> h,
                      RowView<const std::type_identity_t<Scalar>> dy, RowView<std::type_identity_t<Scalar>> dh,
                      typename DensePlan<Scalar>::Gradient& dplan, const Exec& exec) {
  const Sequences sequences = plan.sequences();
  const RowView<Scalar> dc = dplan.combine.spread(plan.tokens(), plan.slot_count());
  kernel::grouped_gemm<Scalar>(
      2 * sequences.count(),
      [&](Index i) -> kernel::Product<Scalar> {
        const Index b = i / 2;
        const Index first = sequences.begin(b);
        const Index length = sequences.length(b);
        if (i % 2 == 0) {  // (N,L)(L,D) -> (N,D)
          return {plan.slot_count(),
                  h.cols(),
                  length,
                  kernel::transposed<Scalar>(plan.combine().middle_rows(first, length)),
                  kernel::plain<Scalar>(dy.middle_rows(first, length)),
                  kernel::replace<Scalar>(dh, plan.slot_rows(b))};
        }
        return {length,  // (L,D)(D,N) -> (L,N)
                plan.slot_count(),
                h.cols(),
                kernel::plain<Scalar>(dy.middle_rows(first, length)),
                kernel::transposed<Scalar>(h, plan.slot_rows(b)),
                kernel::stream_to<Scalar>(dc, first)};
      },
      exec);
}

}  // namespace moxie::inline MOXIE_NAMESPACE

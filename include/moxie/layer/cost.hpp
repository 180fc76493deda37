// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/cost.hpp>
#include <moxie/expert/bank.hpp>
#include <moxie/routing/router.hpp>
#include <optional>
#include <span>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

/// Of products with a matrix of n elements, one for each row: x Wᵀ forward; dy W and dyᵀ x backward.
inline Cost cost_of_products(double rows, double elements) { return {rows * elements, 2 * rows * elements}; }

/// The same with all matrices of a role; `rows_of(tensor)` rows meet each.
template <class RowsOf>
Cost cost_of_matrices(const Layout& layout, Role role, RowsOf&& rows_of) {
  Cost cost;
  for (const TensorInfo& t : layout.tensors()) {
    if (t.role == role && t.shape.size() > 1) {
      cost += cost_of_products(rows_of(t), double(t.rows) * double(t.cols));
    }
  }
  return cost;
}

}  // namespace detail

/// What a bank costs. `starts` has E + 1 offsets: expert e computes rows [starts[e], starts[e+1]), as in `GroupedRows` and
/// `plan.expert_starts()`.
///
///     forward  Σ_e R_e P_e,  backward 2 Σ_e R_e P_e        P_e: elements of the matrices of expert e
///
/// That is 3RDH, 2RDH and RD² of the library's families. A matrix that belongs to no expert counts for all rows. A bank that
/// computes something else tells it in a member `Cost multiply_adds(std::span<const Index> starts) const`.
template <Bank B>
Cost multiply_adds(const B& bank, std::span<const Index> starts) {
  if constexpr (requires { bank.multiply_adds(starts); }) {
    return bank.multiply_adds(starts);
  } else {
    return detail::cost_of_matrices(bank.layout(), Role::weight, [&](const TensorInfo& t) {
      return double(t.expert < 0 ? starts.back() : starts[std::size_t(t.expert) + 1] - starts[std::size_t(t.expert)]);
    });
  }
}

/// The same before a plan is known: the mean over the experts, each of which computes R rows / E.
template <Bank B>
Cost multiply_adds(const B& bank, Index rows) {
  // As if every expert computed all rows, over E: exact for equal experts, where R is no multiple of E.
  const Index experts = bank.experts();
  std::vector<Index> starts;
  for (Index e = 0; e <= experts; ++e) {
    starts.push_back(e * rows);
  }
  const Cost of_all = multiply_adds(bank, std::span<const Index>(starts));
  return {of_all.forward / double(experts), of_all.backward / double(experts)};
}

/// What a router costs for T tokens in B sequences, without dispatch and combine.
///
///     forward  T P,  backward 2 T P        P: elements of its matrices whose role is `Role::gate`
///
/// That is TGE of a linear gate and TGN of Soft MoE. A router that computes something else tells it in a member
/// `Cost multiply_adds(Index tokens, Index sequences) const`.
template <Router R>
Cost multiply_adds(const R& router, Index tokens, Index sequences) {
  if constexpr (requires { router.multiply_adds(tokens, sequences); }) {
    return router.multiply_adds(tokens, sequences);
  } else {
    return detail::cost_of_matrices(router.layout(), Role::gate, [&](const TensorInfo&) { return double(tokens); });
  }
}

namespace detail {

/// Of dispatch and combine: of dense plans TND each, N = R / B, and twice that backward; no products of sparse ones.
template <class Plan>
Cost exchange_cost(Index tokens, Index rows, Index sequences, Index dim) {
  if constexpr (requires(const Plan& plan) { plan.token(); }) {
    return {};
  } else {
    return sequences == 0 ? Cost{} : cost_of_products(double(tokens) * double(dim), 2 * double(rows) / double(sequences));
  }
}

/// R of a call that divides so, or the most that it can be. Throws ValueError if the router does not tell.
template <class R>
Index most_rows(const R& router, const Sequences& sequences) {
  if constexpr (requires { router.most_rows(sequences); }) {
    return router.most_rows(sequences);
  } else {
    throw ValueError(
        "multiply_adds: the router does not tell how many rows the experts will compute (most_rows); ask with the tape of a "
        "forward");
  }
}

/// A whole layer before a forward.
template <class R, class B>
Cost mixture_cost(const R& router, const B& bank, const std::optional<B>& shared, const Sequences& sequences) {
  expect_at_least("multiply_adds", "the number of tokens", sequences.tokens(), 0);
  sequences.expect_valid("multiply_adds");
  const Index tokens = sequences.tokens();
  const Index rows = most_rows(router, sequences);
  return multiply_adds(router, tokens, sequences.count()) + multiply_adds(bank, rows) +
         exchange_cost<typename R::Plan>(tokens, rows, sequences.count(), bank.model_dim()) +
         (shared ? multiply_adds(*shared, tokens) : Cost{});
}
/// A whole layer in the forward of a plan.
template <class R, class B>
Cost mixture_cost(const R& router, const B& bank, const std::optional<B>& shared, const typename R::Plan& plan,
                  Index sequences) {
  if (plan.expert_starts().empty()) {
    return {};
  }
  return multiply_adds(router, plan.tokens(), sequences) + multiply_adds(bank, plan.expert_starts()) +
         exchange_cost<typename R::Plan>(plan.tokens(), plan.rows(), sequences, bank.model_dim()) +
         (shared ? multiply_adds(*shared, plan.tokens()) : Cost{});
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

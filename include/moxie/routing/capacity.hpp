// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/buffer.hpp>
#include <moxie/core/sequences.hpp>
#include <moxie/routing/config.hpp>
#include <span>

namespace moxie::inline MOXIE_NAMESPACE {

/// Gives every pair its place at its expert, and drops what does not fit.
///
/// Pair t·K + k is the k-th choice of token t; `expert` (T·K) its expert or -1 for none, `weight` its weight. In each sequence,
/// all first choices come before any second one, and so on; within a choice tokens come by `capacity.priority`. Places are
/// counted over dropped pairs too. Where `place >= C` of the sequence, `assigned` is -1, elsewhere the expert. `place`,
/// `assigned` and `order` (T) are overwritten; `order` has the tokens of each sequence in the order in which they came.
///
/// Throws ShapeError unless there are T·K experts and weights, ValueError for an expert outside [-1, E), a weight that is NaN
/// where the weights decide, and a capacity below 1.
///
/// GShard (Lepikhin et al. 2020), Algorithm 1; V-MoE (Riquelme et al. 2021), Algorithms 1 and 2. O(T K + T log T).
template <class Scalar>
void assign_places(const Sequences& sequences, Index experts, Index top_k, const Capacity& capacity,
                   std::span<const Index> expert, std::span<const std::type_identity_t<Scalar>> weight, Buffer<Index>& place,
                   Buffer<Index>& assigned, Buffer<Index>& order, Buffer<Index>& taken) {
  constexpr std::string_view where = "assign_places";
  detail::expect_at_least(where, "top_k", top_k, 1);
  if (Index(expert.size()) != sequences.tokens() * top_k || weight.size() != expert.size()) {
    throw ShapeError(std::string(where) + ": there are " + std::to_string(expert.size()) + " experts and " +
                     std::to_string(weight.size()) + " weights, expected " + std::to_string(sequences.tokens() * top_k));
  }
  for (const Index e : expert) {
    detail::expect_value(e >= -1 && e < experts, where, "an expert is not one of them");
  }
  if (capacity.priority == Priority::weight) {
    for (const Scalar w : weight) {
      detail::expect_value(w == w, where, "a weight is NaN");
    }
  }
  place.resize(sequences.tokens() * top_k);
  assigned.resize(sequences.tokens() * top_k);
  order.resize(sequences.tokens());
  sequences.for_each([&](Index, Index begin, Index end) {
    if (begin == end) {
      return;
    }
    const Index room = expert_capacity((end - begin) * top_k, experts, capacity);
    for (Index t = begin; t < end; ++t) {
      order[t] = t;
    }
    if (capacity.priority == Priority::weight) {
      const auto first = [&](Index t) {
        const auto of_token = weight.subspan(std::size_t(t * top_k), std::size_t(top_k));
        return *std::max_element(of_token.begin(), of_token.end());
      };
      std::sort(order.data() + begin, order.data() + end, [&](Index a, Index b) {
        const Scalar u = first(a);
        const Scalar v = first(b);
        return u > v || (u == v && a < b);
      });
    }
    taken.assign(experts, 0);
    for (Index k = 0; k < top_k; ++k) {
      for (Index i = begin; i < end; ++i) {
        const Index pair = order[i] * top_k + k;
        const Index e = expert[std::size_t(pair)];
        place[pair] = e < 0 ? -1 : taken[e]++;
        assigned[pair] = place[pair] < room ? e : -1;
      }
    }
  });
}

}  // namespace moxie::inline MOXIE_NAMESPACE

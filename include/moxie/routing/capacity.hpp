// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/buffer.hpp>
#include <moxie/core/sequences.hpp>
#include <moxie/routing/config.hpp>
#include <span>

namespace moxie::inline MOXIE_NAMESPACE {

/// The choices of tokens: pair t·K + k is the k-th of token t.
template <class Scalar>
struct ChosenPairs {
  Index experts = 0;
  Index top_k = 0;
  std::span<const Index> expert;   ///< T·K: the expert of each pair, -1 for none
  std::span<const Scalar> weight;  ///< T·K
};

/// What a capacity makes of pairs.
struct Places {
  Places() = default;
  explicit Places(std::pmr::memory_resource* resource)
      : place(0, resource), assigned(0, resource), order(0, resource), taken(0, resource) {}

  Buffer<Index> place;     ///< T·K: the place of each pair at its expert, -1 of none; dropped pairs have one too
  Buffer<Index> assigned;  ///< T·K: the expert, or -1 where the pair is dropped
  Buffer<Index> order;     ///< T: the tokens of each sequence in the order in which they came
  Buffer<Index> taken;     ///< scratch
};

/// Gives every pair its place at its expert, and drops what does not fit: `places` is overwritten.
///
/// In each sequence, all first choices come before any second one, and so on; within a choice tokens come by
/// `capacity.priority`. Pairs are dropped where `place >= C` of the sequence.
///
/// Throws ShapeError unless there are T·K experts and weights, ValueError for an expert outside [-1, E), a weight that is NaN
/// where the weights decide, and a capacity below 1.
///
/// GShard (Lepikhin et al. 2020), Algorithm 1; V-MoE (Riquelme et al. 2021), Algorithms 1 and 2. O(T K + T log T).
template <class Scalar>
void assign_places(const Sequences& sequences, const ChosenPairs<std::type_identity_t<Scalar>>& pairs, const Capacity& capacity,
                   Places& places) {
  constexpr std::string_view where = "assign_places";
  const Index experts = pairs.experts;
  const Index top_k = pairs.top_k;
  const std::span<const Index> expert = pairs.expert;
  const std::span<const Scalar> weight = pairs.weight;
  Buffer<Index>& place = places.place;
  Buffer<Index>& assigned = places.assigned;
  Buffer<Index>& order = places.order;
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
    places.taken.assign(experts, 0);
    for (Index k = 0; k < top_k; ++k) {
      for (Index i = begin; i < end; ++i) {
        const Index pair = order[i] * top_k + k;
        const Index e = expert[std::size_t(pair)];
        place[pair] = e < 0 ? -1 : places.taken[e]++;
        assigned[pair] = place[pair] < room ? e : -1;
      }
    }
  });
}

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/core/buffer.hpp>
#include <moxie/core/sequences.hpp>
#include <span>

namespace moxie {

/// How a capacity that is not whole becomes whole.
enum class Rounding {
  ceil,
  round,  ///< to the nearest, halves to even
};

/// Who comes first to an expert that has no room for all.
enum class Priority {
  order,   ///< tokens as they stand (Switch, GShard)
  weight,  ///< tokens of larger weight first, ties as they stand: batch priority (V-MoE, section 3.3)
};

/// Room of an expert, in each sequence (the *group* of GShard and V-MoE).
struct Capacity {
  double factor = 0;  ///< cf; 0: no limit, nothing is dropped
  Rounding rounding = Rounding::ceil;
  Index multiple_of = 1;  ///< rounded up to a multiple of this (vmoe: 4)
  Priority priority = Priority::order;

  bool limited() const { return factor > 0; }
};

namespace detail {

/// Throws ValueError for options that no capacity follows from.
inline void expect_capacity(std::string_view where, const Capacity& capacity) {
  expect_value(std::isfinite(capacity.factor) && capacity.factor >= 0, where,
               "the capacity factor must be finite and not negative");
  expect_at_least(where, "capacity.multiple_of", capacity.multiple_of, 1);
}

}  // namespace detail

/// C = ⌈n · cf / E⌉, or the nearest integer, then up to a multiple. `n` is what all experts together are asked for: L·K for
/// token choice, L for expert choice. vmoe's `compute_capacity`. Throws ValueError for a capacity below 1.
inline Index expert_capacity(Index n, Index experts, const Capacity& capacity) {
  const double exact = double(n) * capacity.factor / double(experts);
  detail::expect_value(exact < 0x1p62, "expert_capacity", "the capacity is too large for an integer");
  Index c = Index(capacity.rounding == Rounding::ceil ? std::ceil(exact) : std::nearbyint(exact));
  c += (capacity.multiple_of - c % capacity.multiple_of) % capacity.multiple_of;
  if (c < 1) {
    throw ValueError("expert_capacity: " + std::to_string(n) + " · " + std::to_string(capacity.factor) + " / " +
                     std::to_string(experts) + " rounds to a capacity of " + std::to_string(c) + ", expected at least 1");
  }
  return c;
}

/// Gives every pair its place at its expert, and drops what does not fit.
///
/// Pair t·K + k is the k-th choice of token t; `expert` (T·K) its expert, `weight` its weight. In each sequence, all first
/// choices come before any second one, and so on; within a choice tokens come by `capacity.priority`. Places are counted over
/// dropped pairs too. Where `place >= C` of the sequence, `assigned` is -1, elsewhere the expert. `place`, `assigned` and
/// `order` (T) are overwritten; `order` has the tokens of each sequence in the order in which they came.
///
/// GShard (Lepikhin et al. 2020), Algorithm 1; V-MoE (Riquelme et al. 2021), Algorithms 1 and 2. O(T K + T log T).
template <class Scalar>
void assign_places(const Sequences& sequences, Index experts, Index top_k, const Capacity& capacity,
                   std::span<const Index> expert, std::span<const std::type_identity_t<Scalar>> weight, Buffer<Index>& place,
                   Buffer<Index>& assigned, Buffer<Index>& order, Buffer<Index>& taken) {
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
        place[pair] = taken[e]++;
        assigned[pair] = place[pair] < room ? e : -1;
      }
    }
  });
}

}  // namespace moxie

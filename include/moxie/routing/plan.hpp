// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <memory_resource>
#include <moxie/core/buffer.hpp>
#include <moxie/core/sequences.hpp>
#include <span>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// A sparse plan: R assignments (token, expert, weight), sorted by expert, then by token. Row r of the routed rows is
/// assignment r.
///
///     dispatch:  (A x)_r = x_{token(r)}             (T,D) -> (R,D)
///     combine:   y_t     = Σ_{r of t} weight_r h_r   (R,D) -> (T,D)
///
/// A router proposes pairs in an order of its own (token choice: pair t·K + k is the k-th choice of token t) and gets the
/// weights' gradient back in that order, through `pair(r)`.
template <class Scalar_>
class SparsePlan {
 public:
  using Scalar = Scalar_;
  /// ∂loss / ∂weight_r, filled by `combine_backward`.
  struct Gradient {
    Gradient() = default;
    explicit Gradient(std::pmr::memory_resource* resource) : weight(0, resource) {}
    Buffer<Scalar> weight;
  };

  SparsePlan() = default;
  explicit SparsePlan(std::pmr::memory_resource* resource) : resource_(resource) {}

  /// Sorts proposed pairs into a plan. `token_of(p)` names the token of pair p; an expert of -1
  /// drops the pair. Throws ValueError for any other expert outside [0, experts) and for a token outside [0, tokens).
  /// Counting sort: O(P + E + T), nothing allocated once the capacity is there.
  template <std::invocable<Index> TokenOf>
  void build(Index tokens, Index experts, TokenOf&& token_of, std::span<const Index> expert, std::span<const Scalar> weight) {
    const Index pairs = Index(expert.size());
    detail::expect_value(weight.size() == expert.size(), "SparsePlan::build", "as many weights as experts expected");
    expect_pairs(tokens, experts, token_of, expert);
    tokens_ = tokens;
    proposed_ = pairs;
    expert_starts_.assign(experts + 1, 0);
    token_starts_.assign(tokens + 1, 0);
    for (Index p = 0; p < pairs; ++p) {
      if (const Index e = expert[std::size_t(p)]; e >= 0) {
        ++expert_starts_[e + 1];
        ++token_starts_[token_of(p) + 1];
      }
    }
    for (Index e = 0; e < experts; ++e) {
      expert_starts_[e + 1] += expert_starts_[e];
    }
    for (Index t = 0; t < tokens; ++t) {
      token_starts_[t + 1] += token_starts_[t];
    }
    const Index rows = expert_starts_[experts];
    token_.resize(rows);
    pair_.resize(rows);
    weight_.resize(rows);
    token_rows_.resize(rows);
    order_.resize(rows);
    // By token first, pairs of a token in the order proposed; then by expert, which keeps the order of tokens.
    for (Index p = 0; p < pairs; ++p) {
      if (expert[std::size_t(p)] >= 0) {
        order_[token_starts_[token_of(p)]++] = p;
      }
    }
    for (Index i = 0; i < rows; ++i) {
      const Index p = order_[i];
      const Index r = expert_starts_[expert[std::size_t(p)]]++;
      token_[r] = token_of(p);
      pair_[r] = p;
      weight_[r] = weight[std::size_t(p)];
      token_rows_[i] = r;
    }
    // Each start has moved to the next one's place.
    for (Index e = experts; e > 0; --e) {
      expert_starts_[e] = expert_starts_[e - 1];
    }
    expert_starts_[0] = 0;
    for (Index t = tokens; t > 0; --t) {
      token_starts_[t] = token_starts_[t - 1];
    }
    token_starts_[0] = 0;
    counts_.resize(std::size_t(experts));
    for (Index e = 0; e < experts; ++e) {
      counts_[std::size_t(e)] = expert_starts_[e + 1] - expert_starts_[e];
    }
  }

  /// The same for K choices a token: pair t·K + k.
  void build(Index tokens, Index experts, Index choices, std::span<const Index> expert, std::span<const Scalar> weight) {
    detail::expect_value(Index(expert.size()) == tokens * choices, "SparsePlan::build", "tokens x choices experts expected");
    build(
        tokens, experts, [choices](Index p) { return p / choices; }, expert, weight);
  }

  Index tokens() const { return tokens_; }
  Index experts() const { return Index(counts_.size()); }
  /// R.
  Index rows() const { return token_.size(); }
  /// Pairs proposed but not assigned.
  Index dropped() const { return proposed_ - rows(); }
  /// Expert e owns rows [expert_starts()[e], expert_starts()[e+1]).
  std::span<const Index> expert_starts() const { return expert_starts_.span(); }
  /// The token of every row: the index that dispatch gathers by.
  std::span<const Index> token() const { return token_.span(); }
  Index token(Index row) const { return token_[row]; }
  Scalar weight(Index row) const { return weight_[row]; }
  std::span<const Scalar> weights() const { return weight_.span(); }
  /// The proposed pair that became this row.
  Index pair(Index row) const { return pair_[row]; }
  /// The rows of token t, in the order in which its pairs were proposed: the order of combine's sum.
  std::span<const Index> rows_of_token(Index t) const {
    return token_rows_.span().subspan(std::size_t(token_starts_[t]), std::size_t(token_starts_[t + 1] - token_starts_[t]));
  }
  /// E integer counts of assigned rows.
  const std::vector<std::int64_t>& tokens_per_expert() const { return counts_; }

 private:
  template <class TokenOf>
  static void expect_pairs(Index tokens, Index experts, const TokenOf& token_of, std::span<const Index> expert) {
    detail::expect_at_least("SparsePlan::build", "tokens", tokens, 0);
    detail::expect_at_least("SparsePlan::build", "experts", experts, 0);
    for (Index p = 0; p < Index(expert.size()); ++p) {
      const Index e = expert[std::size_t(p)];
      const Index t = token_of(p);
      if (e < -1 || e >= experts || t < 0 || t >= tokens) {
        throw ValueError("SparsePlan::build: pair " + std::to_string(p) + " is (token " + std::to_string(t) + ", expert " +
                         std::to_string(e) + "), expected tokens below " + std::to_string(tokens) + " and experts below " +
                         std::to_string(experts));
      }
    }
  }

  detail::OwnResource resource_;
  Index tokens_ = 0;
  Index proposed_ = 0;
  Buffer<Index> expert_starts_{0, resource_};
  Buffer<Index> token_starts_{0, resource_};
  Buffer<Index> token_{0, resource_};
  Buffer<Index> pair_{0, resource_};
  Buffer<Index> token_rows_{0, resource_};
  Buffer<Index> order_{0, resource_};
  Buffer<Scalar> weight_{0, resource_};
  std::vector<std::int64_t> counts_;
};

/// A dense plan (Soft MoE): every slot mixes all tokens of its sequence, every token mixes all slots.
///
/// With N = E·S slots, both matrices are (T,N), rows in token order, slot e·S + s in column e·S + s; of sequence b, of L_b
/// tokens:
///
///     dispatch:  X̃_b = D_bᵀ X_b    (N,L_b)(L_b,D) -> (N,D), columns of D_b sum to 1
///     combine:   Y_b = C_b Ỹ_b     (L_b,N)(N,D) -> (L_b,D), rows of C_b sum to the scale of the router
///
/// The B·N slot rows are grouped by expert for the bank: slot s of expert e in sequence b is row (e·B + b)·S + s. A sequence
/// without tokens has slots of zeros.
template <class Scalar_>
class DensePlan {
 public:
  using Scalar = Scalar_;
  /// ∂loss / ∂D and ∂loss / ∂C, (T,N) each: `spread_view(tokens, slots)`.
  struct Gradient {
    Gradient() = default;
    explicit Gradient(std::pmr::memory_resource* resource) : dispatch(0, resource), combine(0, resource) {}
    Buffer<Scalar> dispatch;
    Buffer<Scalar> combine;
  };

  DensePlan() = default;
  explicit DensePlan(std::pmr::memory_resource* resource) : resource_(resource) {}

  /// Sets the shape; the router then fills `dispatch()` and `combine()`.
  void resize(const Sequences& division, Index experts, Index slots_per_expert) {
    const Index sequences = division.count();
    tokens_ = division.tokens();
    experts_ = experts;
    slots_ = slots_per_expert;
    division.copy_starts(sequence_starts_);
    dispatch_.spread(tokens_, slot_count());
    combine_.spread(tokens_, slot_count());
    expert_starts_.resize(experts + 1);
    for (Index e = 0; e <= experts; ++e) {
      expert_starts_[e] = e * sequences * slots_per_expert;
    }
    slot_rows_.resize(sequences * slot_count());
    for (Index b = 0; b < sequences; ++b) {
      for (Index n = 0; n < slot_count(); ++n) {
        slot_rows_[b * slot_count() + n] = (n / slots_ * sequences + b) * slots_ + n % slots_;
      }
    }
  }

  Index tokens() const { return tokens_; }
  Index experts() const { return experts_; }
  /// How the tokens divide into sequences, as `resize` was told.
  Sequences sequences() const { return Sequences(sequence_starts_.span()).over(tokens_); }
  Index slots_per_expert() const { return slots_; }
  /// N = E·S, the slots of one sequence.
  Index slot_count() const { return experts_ * slots_; }
  /// R = B·N.
  Index rows() const { return slot_rows_.size(); }
  std::span<const Index> expert_starts() const { return expert_starts_.span(); }
  /// The row of each slot of sequence b, N indices.
  const Index* slot_rows(Index b) const { return slot_rows_.data() + b * slot_count(); }
  /// Rows do not follow each other without gaps: see `stride()`.
  RowView<Scalar> dispatch() { return dispatch_.spread_view(tokens_, slot_count()); }
  RowView<Scalar> combine() { return combine_.spread_view(tokens_, slot_count()); }
  RowView<const Scalar> dispatch() const { return dispatch_.spread_view(tokens_, slot_count()); }
  RowView<const Scalar> combine() const { return combine_.spread_view(tokens_, slot_count()); }

 private:
  detail::OwnResource resource_;
  Index tokens_ = 0;
  Index experts_ = 0;
  Index slots_ = 0;
  Buffer<Index> sequence_starts_{0, resource_};
  Buffer<Index> expert_starts_{0, resource_};
  Buffer<Index> slot_rows_{0, resource_};
  Buffer<Scalar> dispatch_{0, resource_};
  Buffer<Scalar> combine_{0, resource_};
};

}  // namespace moxie::inline MOXIE_NAMESPACE

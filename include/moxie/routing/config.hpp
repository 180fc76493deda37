// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/core/layout.hpp>
#include <moxie/core/sequences.hpp>
#include <moxie/loss/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// The most experts that a router can have. Every expert has tensors with names, so that sizes by mistake would take all
/// memory.
inline constexpr Index most_experts = Index{1} << 20;

namespace detail {

/// Throws ValueError unless there are 1 to `most_experts` experts.
inline void expect_experts(std::string_view where, Index experts) {
  expect_at_least(where, "experts", experts, 1);
  if (experts > most_experts) {
    throw ValueError(std::string(where) + ": experts is " + std::to_string(experts) + ", expected at most " +
                     std::to_string(most_experts));
  }
}

/// Throws ValueError unless the factor of all weights is an ordinary number of `Scalar`. 0 is one: it switches routed experts
/// off.
template <class Scalar>
void expect_scale(std::string_view where, double scale) {
  expect_in_scalar<Scalar>(where, "scale", scale);
}

}  // namespace detail

/// How a capacity that is not whole becomes whole.
enum class Rounding {
  ceil,
  round,  ///< to the nearest, halves to even
};

/// The order of tokens at an expert whose capacity is too small for all.
enum class Priority {
  order,   ///< tokens as they stand (Switch, GShard)
  weight,  ///< tokens of larger weight first, ties as they stand: batch priority (V-MoE, section 3.3)
};

/// Of which tokens an expert has its capacity: the *group* of GShard and V-MoE.
enum class Grouping {
  sequence,  ///< of each sequence
  call,      ///< of all tokens of a call together
};

/// How many tokens of a group an expert takes.
struct Capacity {
  double factor = 0;  ///< cf; 0: no limit, nothing is dropped
  Rounding rounding = Rounding::ceil;
  Index multiple_of = 1;  ///< rounded up to a multiple of this (vmoe: 4)
  Priority priority = Priority::order;
  /// Balance losses of sequences are those of sequences, whatever the groups are.
  Grouping group = Grouping::sequence;

  bool limited() const { return factor > 0 && !std::isinf(factor); }
  /// The same with the factor of one call (`Tokens::capacity_factor`), if it has one.
  Capacity with(double factor_of_call) const {
    Capacity c = *this;
    c.factor = factor_of_call != 0 ? factor_of_call : factor;
    return c;
  }
  /// The groups of a batch.
  Sequences groups(const Sequences& sequences) const {
    return group == Grouping::call ? Sequences().over(sequences.tokens()) : sequences;
  }
};

namespace detail {

/// Throws ValueError for options that no capacity follows from.
inline void expect_capacity(std::string_view where, const Capacity& capacity) {
  expect_value(std::isfinite(capacity.factor) && capacity.factor >= 0, where,
               "the capacity factor must be finite and not negative");
  expect_at_least(where, "capacity.multiple_of", capacity.multiple_of, 1);
}

}  // namespace detail

/// C = ⌈n · cf / E⌉, or the nearest integer, then up to a multiple. `n` is the number of
/// assignments that a group of L tokens proposes to all experts together: L·K for token choice, L
/// for expert choice. vmoe's `compute_capacity`. Throws ValueError for a capacity below 1, and one
/// that is no integer.
inline Index expert_capacity(Index n, Index experts, const Capacity& capacity) {
  const double exact = double(n) * capacity.factor / double(experts);
  detail::expect_value(exact < double((std::numeric_limits<Index>::max)() / 2 - capacity.multiple_of), "expert_capacity",
                       "the capacity is too large for an integer");
  Index c = Index(capacity.rounding == Rounding::ceil ? std::ceil(exact) : std::nearbyint(exact));
  c += (capacity.multiple_of - c % capacity.multiple_of) % capacity.multiple_of;
  if (c < 1) {
    throw ValueError("expert_capacity: " + std::to_string(n) + " assignments to " + std::to_string(experts) +
                     " experts, times the capacity factor, rounds to a capacity of " + std::to_string(c) +
                     ", expected at least 1");
  }
  return c;
}

/// What a group of experts is judged by.
enum class GroupScore {
  top_2_sum,  ///< the sum of its two largest scores (DeepSeek-V3)
  largest,    ///< its largest score (DeepSeek-V2)
};

/// Group-limited selection: the experts are G equal groups of consecutive ones, and a token may
/// choose only from its best groups (DeepSeek-V2, V3: the groups are devices or nodes). `count = 1`
/// does not limit.
struct ExpertGroups {
  Index count = 1;   ///< G, divides E
  Index chosen = 1;  ///< groups that a token may choose from
  GroupScore score = GroupScore::top_2_sum;
};

/// What training adds to a gate so that experts are explored; nothing where `Tokens::training` is false.
struct GateNoise {
  double logits = 0;  ///< σ: (σ/E) N(0,1) is added to every logit (V-MoE, section 3.1)
  double jitter = 0;  ///< ε: the gate's input is multiplied by U(1-ε, 1+ε), element by element (Switch)
};

namespace detail {

/// Throws ValueError for sizes below 1, too many experts, noise that is negative or no ordinary number of `Scalar`, and a
/// jitter above 1.
template <class Scalar>
void expect_gate(std::string_view where, Index model_dim, Index experts, const GateNoise& noise) {
  expect_at_least(where, "model_dim", model_dim, 1);
  expect_experts(where, experts);
  expect_value(std::isfinite(noise.logits) && noise.logits >= 0, where, "noise.logits must be finite and not negative");
  expect_in_scalar<Scalar>(where, "noise.logits", noise.logits);
  expect_value(noise.jitter >= 0 && noise.jitter <= 1, where, "noise.jitter must be between 0 and 1");
}

}  // namespace detail

/// What makes scores of logits.
enum class Score {
  softmax,  ///< over all experts
  sigmoid,  ///< each expert for itself (DeepSeek-V3)
};

/// Which comes first.
enum class TopKOrder {
  softmax_top_k,  ///< scores of all experts, then the K largest (V-MoE, DeepSeekMoE, DiT-MoE)
  top_k_softmax,  ///< the K largest logits, then softmax over those (Mixtral): the same as softmax scores with `normalize`
};

struct TopKRouterConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index top_k = 1;
  TopKOrder order = TopKOrder::softmax_top_k;
  bool normalize = false;  ///< weights of a token sum to `scale`; those of top_k_softmax always do
  double scale = 1;        ///< factor of all weights (DeepSeek's routed scaling factor)
  Balance balance = {};
  /// Allows K = 1 with weights that sum to 1: they are constant, and the gate would learn only from
  /// the balance loss.
  bool allow_constant_weights = false;
  Score score = Score::softmax;
  ExpertGroups groups = {};     ///< a limit on the groups that a token may choose from (DeepSeek-V2, V3)
  bool selection_bias = false;  ///< s + b selects, s weighs (DeepSeek-V3): `update_selection_bias` moves b
  Capacity capacity = {};       ///< of an expert in each group of tokens (Switch, GShard, V-MoE); none: nothing is dropped
  GateNoise noise = {};         ///< in training (Switch, V-MoE)
  Index gate_dim = 0;           ///< G, the width of `Tokens::gate_x`; 0: the gate reads what is D wide

  /// The width of the gate's input.
  Index gate_input_dim() const { return gate_dim > 0 ? gate_dim : model_dim; }

  /// Softmax over the chosen logits is their scores divided by the sum of these: both orders are one computation.
  bool normalized() const { return normalize || order == TopKOrder::top_k_softmax; }
  /// Whether other experts than those of the K largest logits may be chosen.
  bool biased() const { return selection_bias || groups.chosen < groups.count; }

  /// Throws ValueError for sizes below 1, more than `most_experts`, K > E, groups that do not divide the experts or hold fewer
  /// than K, weights of losses below 0, a capacity that is not a number, noise, weights or a scale that are no ordinary numbers
  /// of `Scalar`, a load loss without noise on the logits, and weights that would be constant.
  template <class Scalar = double>
  void expect_valid(std::string_view where) const {
    detail::expect_gate<Scalar>(where, model_dim, experts, noise);
    detail::expect_at_least(where, "gate_dim", gate_dim, 0);
    detail::expect_at_least(where, "top_k", top_k, 1);
    detail::expect_scale<Scalar>(where, scale);
    balance.expect_valid<Scalar>(where, experts);
    detail::expect_value(balance.load == 0 || noise.logits > 0, where,
                         "balance.load is a loss of the noise on the logits, and noise.logits is 0");
    if (balance.load > 0) {
      detail::expect_in_scalar<Scalar>(where, "balance.load over noise.logits", balance.load / noise.logits);
    }
    detail::expect_capacity(where, capacity);
    detail::expect_value(groups.count >= 1 && experts % groups.count == 0, where,
                         "groups.count must divide the number of experts");
    detail::expect_value(groups.chosen >= 1 && groups.chosen <= groups.count, where,
                         "groups.chosen must be between 1 and groups.count");
    detail::expect_value(score == Score::softmax || order == TopKOrder::softmax_top_k, where,
                         "top_k_softmax is an order of softmax scores");
    expect_top_k(where, top_k);
  }
  /// Throws ValueError for a K that these options do not allow, `chosen` by groups or elsewhere.
  void expect_top_k(std::string_view where, Index k, bool chosen_elsewhere = false) const {
    if (k > experts) {
      throw ValueError(std::string(where) + ": top_k is " + std::to_string(k) + ", expected at most the " +
                       std::to_string(experts) + " experts");
    }
    const Index reachable = chosen_elsewhere ? experts : experts / groups.count * groups.chosen;
    if (k > reachable) {
      throw ValueError(std::string(where) + ": top_k is " + std::to_string(k) + ", expected at most the " +
                       std::to_string(reachable) + " experts of " + std::to_string(groups.chosen) + " groups");
    }
    detail::expect_value(
        k > 1 || experts == 1 || allow_constant_weights || !normalized(), where,
        "with top_k = 1, normalized weights are always 1 and the gate gets no gradient from the output; choose "
        "normalize = false with softmax_top_k, or set allow_constant_weights");
  }
  /// `gate.weight` (E,G); with a selection bias `gate.e_score_correction_bias` (E).
  Layout layout() const {
    Layout layout;
    layout.add("gate.weight", {experts, gate_input_dim()}, {.role = Role::gate});
    if (selection_bias) {
      layout.add("gate.e_score_correction_bias", {experts}, {.role = Role::state, .trained = Trained::elsewhere});
    }
    return layout;
  }
};

struct ExpertChoiceRouterConfig {
  Index model_dim = 0;
  Index experts = 0;
  /// C of each group of L tokens, ⌈L · factor / E⌉, and never more than L: `factor` is the mean number of experts a token.
  Capacity capacity = {.factor = 1};
  GateNoise noise = {};  ///< in training
  double scale = 1;      ///< factor of all weights
  Index gate_dim = 0;    ///< G, the width of `Tokens::gate_x`; 0: the gate reads what is D wide

  /// The width of the gate's input.
  Index gate_input_dim() const { return gate_dim > 0 ? gate_dim : model_dim; }

  /// Throws ValueError for sizes below 1, more than `most_experts`, a capacity that is not a number, and noise that is no
  /// ordinary number of `Scalar`.
  template <class Scalar = double>
  void expect_valid(std::string_view where) const {
    detail::expect_gate<Scalar>(where, model_dim, experts, noise);
    detail::expect_at_least(where, "gate_dim", gate_dim, 0);
    detail::expect_scale<Scalar>(where, scale);
    detail::expect_capacity(where, capacity);
    detail::expect_value(capacity.limited(), where, "the capacity factor must be above 0");
    detail::expect_value(capacity.priority == Priority::order, where, "experts choose by score; there is no priority to set");
  }
  /// C of a group of that many tokens, with the factor of a call if it has one: never more than the tokens. Throws ValueError
  /// for a capacity below 1.
  Index room(Index tokens, double factor_of_call = 0) const {
    const Capacity of_call = capacity.with(factor_of_call);
    return tokens == 0 || !of_call.limited() ? tokens : (std::min)(tokens, expert_capacity(tokens, experts, of_call));
  }
  /// `gate.weight` (E,G).
  Layout layout() const {
    Layout layout;
    layout.add("gate.weight", {experts, gate_input_dim()}, {.role = Role::gate});
    return layout;
  }
};

/// Where the weights of one side of Soft MoE come from; all but `learned` are the paper's ablations (section 3.6).
enum class Mixing {
  learned,   ///< the softmax of the logits
  uniform,   ///< 1 over the number of tokens (dispatch) or slots (combine)
  identity,  ///< slot n is token n: needs as many tokens in every sequence as there are slots
};

struct SoftRouterConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index slots_per_expert = 1;
  /// logits = l2norm(x) (scale · l2norm(Φ))ᵀ with a learned scale; false: logits = x Φᵀ, Algorithm 1 of the paper as printed.
  bool normalize = true;
  Mixing dispatch = Mixing::learned;
  Mixing combine = Mixing::learned;
  double scale = 1;  ///< factor of all combine weights. The tensor `scale` is another: it multiplies the logits
  /// Where the tensor `scale` starts. At 1 the logits are cosines, and a slot mixes nearly all tokens alike.
  double initial_scale = 1;
  Index gate_dim = 0;  ///< G, the width of `Tokens::gate_x`, of which logits are made; 0: of what is D wide

  /// The width of what logits are made of.
  Index gate_input_dim() const { return gate_dim > 0 ? gate_dim : model_dim; }
  /// N = E·S.
  Index slot_count() const { return experts * slots_per_expert; }
  bool learned() const { return dispatch == Mixing::learned || combine == Mixing::learned; }
  bool normalized() const { return learned() && normalize; }

  /// Throws ValueError for sizes below 1, more than `most_experts`, and more than 2^40 slots.
  template <class Scalar = double>
  void expect_valid(std::string_view where) const {
    detail::expect_at_least(where, "model_dim", model_dim, 1);
    detail::expect_experts(where, experts);
    detail::expect_at_least(where, "slots_per_expert", slots_per_expert, 1);
    detail::expect_at_least(where, "gate_dim", gate_dim, 0);
    detail::expect_scale<Scalar>(where, scale);
    detail::expect_in_scalar<Scalar>(where, "initial_scale", initial_scale);
    detail::expect_value(
        double(slots_per_expert) * double(experts) <= (std::min)(0x1p40, double((std::numeric_limits<Index>::max)())), where,
        "there are too many slots");
  }
  /// `phi.weight` (E·S,G), a row a slot, and `scale` () where the logits are normalized; nothing if nothing is learned.
  Layout layout() const {
    Layout layout;
    if (learned()) {
      layout.add("phi.weight", {slot_count(), gate_input_dim()}, {.role = Role::gate});
    }
    if (normalized()) {
      layout.add("scale", {}, {.role = Role::scale});
    }
    return layout;
  }
};

}  // namespace moxie::inline MOXIE_NAMESPACE

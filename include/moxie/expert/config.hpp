// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/layout.hpp>
#include <string>

namespace moxie::inline MOXIE_NAMESPACE {

/// What a forward keeps for its backward.
enum class Keep {
  activations,  ///< all that backward needs
  inputs,       ///< the routing alone: backward computes the experts again, in scratch
  nothing,      ///< no backward follows (inference)
};

/// Options of perceptrons with one hidden layer.
struct HiddenConfig {
  Index hidden_dim = 0;  ///< H
};

/// Options of gated linear units whose gated unit has options itself:
///
///     {.hidden_dim = 64, .bias = true, .unit = {.limit = 7, .alpha = 1.702, .beta = 1}}
template <class Unit = void>
struct GluConfig {
  Index hidden_dim = 0;  ///< H
  bool bias = false;     ///< of gate_proj, up_proj and down_proj
  Unit unit = {};        ///< limits and factors
};
/// Of gated linear units that are an activation times the up-projection: one type for all activations.
template <>
struct GluConfig<void> {
  Index hidden_dim = 0;
  bool bias = false;
};

/// How the tensors of a bank are called: "experts.3." for E numbered experts, "shared_experts." for one that has no number.
struct BankNames {
  std::string base = "experts";
  bool numbered = true;

  /// What a layout is told of an expert's tensors: the number, or that they have none.
  TensorOptions options(Index expert, Role role = Role::weight) const {
    return {.role = role, .expert = numbered ? expert : -1};
  }
  std::string prefix(Index expert) const { return numbered ? base + "." + std::to_string(expert) + "." : base + "."; }
};

namespace detail {

inline void expect_hidden_bank(std::string_view where, Index experts, Index model_dim, Index hidden_dim) {
  expect_at_least(where, "experts", experts, 1);
  expect_at_least(where, "model_dim", model_dim, 1);
  expect_at_least(where, "hidden_dim", hidden_dim, 1);
}

}  // namespace detail

/// The tensors of E gated linear units: `gate_proj.weight` (H,D), `up_proj.weight` (H,D) and `down_proj.weight` (D,H) of each,
/// then, with `bias`, `gate_proj.bias` (H), `up_proj.bias` (H) and `down_proj.bias` (D). Throws ValueError for sizes below 1.
inline Layout glu_layout(Index experts, Index model_dim, const GluConfig<>& config, const BankNames& names = {}) {
  detail::expect_hidden_bank("GluExperts", experts, model_dim, config.hidden_dim);
  Layout layout;
  for (Index e = 0; e < experts; ++e) {
    const std::string name = names.prefix(e);
    layout.add(name + "gate_proj.weight", {config.hidden_dim, model_dim}, names.options(e));
    layout.add(name + "up_proj.weight", {config.hidden_dim, model_dim}, names.options(e));
    layout.add(name + "down_proj.weight", {model_dim, config.hidden_dim}, names.options(e));
    if (config.bias) {
      layout.add(name + "gate_proj.bias", {config.hidden_dim}, names.options(e, Role::bias));
      layout.add(name + "up_proj.bias", {config.hidden_dim}, names.options(e, Role::bias));
      layout.add(name + "down_proj.bias", {model_dim}, names.options(e, Role::bias));
    }
  }
  return layout;
}

/// The tensors of E perceptrons: `fc1.weight` (H,D), `fc1.bias` (H), `fc2.weight` (D,H) and `fc2.bias` (D) of each. Throws
/// ValueError for sizes below 1.
inline Layout mlp_layout(Index experts, Index model_dim, const HiddenConfig& config, const BankNames& names = {}) {
  detail::expect_hidden_bank("MlpExperts", experts, model_dim, config.hidden_dim);
  Layout layout;
  for (Index e = 0; e < experts; ++e) {
    const std::string name = names.prefix(e);
    layout.add(name + "fc1.weight", {config.hidden_dim, model_dim}, names.options(e));
    layout.add(name + "fc1.bias", {config.hidden_dim}, names.options(e, Role::bias));
    layout.add(name + "fc2.weight", {model_dim, config.hidden_dim}, names.options(e));
    layout.add(name + "fc2.bias", {model_dim}, names.options(e, Role::bias));
  }
  return layout;
}

}  // namespace moxie::inline MOXIE_NAMESPACE

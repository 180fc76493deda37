// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/field_count.hpp>
#include <moxie/routing/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// In the place of the options of shared experts, for a layer that has none: setting them does not compile.
struct NoSharedExperts {};

/// Options of `TopKMoE` and `SharedExpertMoE`. Those of the router mean what `TopKRouterConfig` says.
template <class ExpertConfig, class SharedConfig = NoSharedExperts>
struct TopKMoEConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index top_k = 1;
  ExpertConfig expert = {};
  /// Only for `SharedExpertMoE`. All shared experts together: n of width H' are one feed-forward of
  /// hidden_dim n·H' (DiT-MoE: 2·D).
  SharedConfig shared = {};
  TopKOrder order = TopKOrder::softmax_top_k;
  bool normalize = false;
  double scale = 1;
  Balance balance = {};
  bool allow_constant_weights = false;
  Score score = Score::softmax;
  ExpertGroups groups = {};
  bool selection_bias = false;
  Capacity capacity = {};
  GateNoise noise = {};
  Index gate_dim = 0;

  TopKRouterConfig router() const {
    static_assert(field_count<TopKRouterConfig> == 14, "an option of the router is missing here");
    return {model_dim, experts, top_k,          order,    normalize, scale,   balance, allow_constant_weights,
            score,     groups,  selection_bias, capacity, noise,     gate_dim};
  }
};

/// Options of `SharedExpertMoE`: those of `TopKMoE`, with `shared`.
template <class ExpertConfig>
using SharedExpertMoEConfig = TopKMoEConfig<ExpertConfig, ExpertConfig>;

/// Options of `SoftMoE`; the meaning of each is `SoftRouterConfig`'s.
template <class ExpertConfig>
struct SoftMoEConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index slots_per_expert = 1;
  ExpertConfig expert = {};
  bool normalize = true;
  Mixing dispatch = Mixing::learned;
  Mixing combine = Mixing::learned;
  double scale = 1;
  double initial_scale = 1;
  Index gate_dim = 0;

  SoftRouterConfig router() const {
    static_assert(field_count<SoftRouterConfig> == 9, "an option of the router is missing here");
    return {model_dim, experts, slots_per_expert, normalize, dispatch, combine, scale, initial_scale, gate_dim};
  }
};

/// Options of `ExpertChoiceMoE`; those of the router mean what `ExpertChoiceRouterConfig` says.
template <class ExpertConfig>
struct ExpertChoiceMoEConfig {
  Index model_dim = 0;
  Index experts = 0;
  ExpertConfig expert = {};
  Capacity capacity = {.factor = 1};
  GateNoise noise = {};
  double scale = 1;
  Index gate_dim = 0;

  ExpertChoiceRouterConfig router() const {
    static_assert(field_count<ExpertChoiceRouterConfig> == 6, "an option of the router is missing here");
    return {model_dim, experts, capacity, noise, scale, gate_dim};
  }
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/glu.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/top_k.hpp>

namespace moxie {

/// In the place of the options of shared experts, for a layer that has none: setting them does not compile.
struct NoSharedExperts {};

/// Options of `TopKMoE` and `SharedExpertMoE`. Those of the router mean what `TopKRouterConfig` says.
template <class ExpertConfig, class SharedConfig = NoSharedExperts>
struct TopKMoEConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index top_k = 1;
  ExpertConfig expert = {};
  /// `SharedExpertMoE` alone: all shared experts together, n of width H' are one feed-forward of hidden_dim n·H' (DiT-MoE:
  /// 2·D).
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

  TopKRouterConfig router() const {
    return {model_dim, experts, top_k,          order,    normalize, scale, balance, allow_constant_weights,
            score,     groups,  selection_bias, capacity, noise};
  }
};

/// Sparse top-k: every token goes to its K best experts.
///
///     y_t = Σ_{i in top-K} w_ti f_i(x_t)
///
/// See `TopKRouter` for w, the balance losses, and the options that make it V-MoE, GShard, Switch, Mixtral or DeepSeek, and the
/// bank (`SwiGluExperts` unless another is named) for f.
template <class Scalar, class Experts = SwiGluExperts<Scalar>>
class TopKMoE : public Moe<TopKRouter<Scalar>, Experts, Scalar> {
 public:
  using Config = TopKMoEConfig<typename Experts::Config>;

  explicit TopKMoE(const Config& config)
      : Moe<TopKRouter<Scalar>, Experts, Scalar>(TopKRouter<Scalar>(config.router()),
                                                 Experts(config.experts, config.model_dim, config.expert), std::nullopt,
                                                 "TopKMoE") {}
};

}  // namespace moxie

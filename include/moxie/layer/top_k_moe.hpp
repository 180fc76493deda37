// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/glu.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/top_k.hpp>

namespace moxie {

/// Options of `TopKMoE`; the meaning of each is `TopKRouterConfig`'s.
template <class ExpertConfig>
struct TopKMoEConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index top_k = 1;
  ExpertConfig expert = {};
  TopKOrder order = TopKOrder::softmax_top_k;
  bool normalize = false;
  double scale = 1;
  Balance balance = {};
  bool allow_constant_weights = false;

  TopKRouterConfig router() const {
    return {model_dim, experts, top_k, order, normalize, scale, balance, allow_constant_weights};
  }
};

/// Sparse top-k: every token goes to its K best experts, without capacity.
///
///     y_t = Σ_{i in top-K} w_ti f_i(x_t)
///
/// See `TopKRouter` for w and the balance losses, and the bank (`SwiGluExperts` unless another is named) for f.
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

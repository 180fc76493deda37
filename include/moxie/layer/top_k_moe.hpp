// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/glu.hpp>
#include <moxie/layer/config.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/top_k.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

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

  // Braces: the router is made first, and refuses sizes before the bank names tensors.
  explicit TopKMoE(const Config& config)
      : Moe<TopKRouter<Scalar>, Experts, Scalar>{TopKRouter<Scalar>(config.router()),
                                                 Experts(config.experts, config.model_dim, config.expert), std::nullopt,
                                                 "TopKMoE"} {}
};

}  // namespace moxie::inline MOXIE_NAMESPACE

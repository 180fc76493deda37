// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/layer/top_k_moe.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// DiT-MoE's block: top-k and a feed-forward that every token passes, not gated.
///
///     y_t = Σ_{i in top-K} w_ti f_i(x_t) + f_shared(x_t)
///
/// DeepSeekMoE (Dai et al. 2024) equation 9; DiT-MoE (Fei et al. 2024). The shared tensors are `shared_experts.*`.
template <class Scalar, class Experts = SwiGluExperts<Scalar>>
class SharedExpertMoE : public Moe<TopKRouter<Scalar>, Experts, Scalar> {
 public:
  using Config = SharedExpertMoEConfig<typename Experts::Config>;

  // Braces: the router is made first, and refuses sizes before the bank names tensors.
  explicit SharedExpertMoE(const Config& config)
      : Moe<TopKRouter<Scalar>, Experts, Scalar>{
            TopKRouter<Scalar>(config.router()), Experts(config.experts, config.model_dim, config.expert),
            Experts(1, config.model_dim, config.shared, BankNames{"shared_experts", false}), "SharedExpertMoE"} {}
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/mlp.hpp>
#include <moxie/layer/config.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/soft.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Soft MoE: Y = C f(Dᵀ X), fully differentiable, no token is dropped and no expert is idle.
///
/// Puigcerver et al. 2023. See `SoftRouter` for D and C. Sequences are mixed within themselves, so tell the layer their length:
/// `layer.forward({x, sequence_length}, y, tape, exec)`. Not causal.
template <class Scalar, class Experts = GeluTanhExperts<Scalar>>
class SoftMoE : public Moe<SoftRouter<Scalar>, Experts, Scalar> {
 public:
  using Config = SoftMoEConfig<typename Experts::Config>;

  // Braces: the router is made first, and refuses sizes before the bank names tensors.
  explicit SoftMoE(const Config& config)
      : Moe<SoftRouter<Scalar>, Experts, Scalar>{SoftRouter<Scalar>(config.router()),
                                                 Experts(config.experts, config.model_dim, config.expert), std::nullopt,
                                                 "SoftMoE"} {}
};

}  // namespace moxie::inline MOXIE_NAMESPACE

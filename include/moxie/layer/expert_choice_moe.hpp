// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/glu.hpp>
#include <moxie/layer/config.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/expert_choice.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Expert choice: every expert takes its best tokens of each sequence.
///
///     y_t = Σ_{i that took t} s_ti f_i(x_t)
///
/// Zhou et al. 2022. See `ExpertChoiceRouter`. A token that no expert took has output 0. Tell the layer its sequences:
/// `layer.forward({x, sequence_length}, y, tape)`. Not causal.
template <class Scalar, class Experts = SwiGluExperts<Scalar>>
class ExpertChoiceMoE : public Moe<ExpertChoiceRouter<Scalar>, Experts, Scalar> {
 public:
  using Config = ExpertChoiceMoEConfig<typename Experts::Config>;

  // Braces: the router is made first, and refuses sizes before the bank names tensors.
  explicit ExpertChoiceMoE(const Config& config)
      : Moe<ExpertChoiceRouter<Scalar>, Experts, Scalar>{ExpertChoiceRouter<Scalar>(config.router()),
                                                         Experts(config.experts, config.model_dim, config.expert), std::nullopt,
                                                         "ExpertChoiceMoE"} {}
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/config.hpp>
#include <moxie/layer/config.hpp>

/// The options of the layer, for both sides.
inline moxie::SharedExpertMoEConfig<moxie::GluConfig<>> layer_config() {
  return {.model_dim = 64,
          .experts = 8,
          .top_k = 2,
          .expert = {.hidden_dim = 96},
          .shared = {.hidden_dim = 128},
          .normalize = true,
          .balance = {.expert_level = 0.01}};
}

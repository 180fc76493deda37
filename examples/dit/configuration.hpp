// SPDX-License-Identifier: MIT
#pragma once

#include <dit/model.hpp>
#include <dit/optimizer.hpp>
#include <dit/process.hpp>
#include <moxie/moxie.hpp>
#include <nlohmann/json.hpp>
#include <string>

namespace dit {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(ModelConfig, image_size, channels, patch, dim, depth, heads, classes,
                                                learn_sigma, qk_norm, switch_experts, switch_top_k)

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(AdamWConfig, rate, beta1, beta2, epsilon, weight_decay, clip, warm_up,
                                                ema_decay)

/// How a model is trained, whatever it is.
struct Recipe {
  double balance = 0.01;               ///< weight of the balance loss
  double prior = 1;                    ///< weight of Switch-DiT's prior loss
  std::string times = "logit-normal";  ///< of rectified flow: or uniform
  bool stratified = false;             ///< a batch's times are spread evenly
  Index batch = 48;
  Index micro_batch = 0;  ///< images of a batch that are computed at once; 0: all
  double label_dropout = 0.1;
  AdamWConfig optimizer = {};
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Recipe, balance, prior, times, stratified, batch, micro_batch, label_dropout,
                                                optimizer, seed)

/// Everything that decides what a run computes. It is stored in the checkpoint, and a run that goes on must agree with it.
struct TrainingConfig {
  ModelConfig model;
  std::string feed_forward = "shared";  ///< shared, top-k, expert-choice, soft or dense
  Index experts = 8;
  Index top_k = 2;
  Index hidden_dim = 128;           ///< of an expert
  Index shared_hidden_dim = 256;    ///< of the shared experts
  std::string expert = "swiglu";    ///< of top-k: or gelu, the perceptron of a dense DiT
  bool normalize = false;           ///< the weights of a token's experts sum to 1 (shared, top-k)
  Index slots_per_expert = 1;       ///< soft
  double capacity_factor = 2;       ///< expert-choice: experts that a token has on average
  std::string process = "flow";     ///< or ddpm
  std::string schedule = "linear";  ///< of DDPM: or cosine
  Index diffusion_steps = 1000;
  Recipe recipe = {};
  bool latents = false;  ///< images are not pixels in [-1,1]: they are neither clamped nor drawn
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(TrainingConfig, model, feed_forward, experts, top_k, hidden_dim,
                                                shared_hidden_dim, expert, normalize, slots_per_expert, capacity_factor,
                                                process, schedule, diffusion_steps, recipe, latents)

/// What a configuration's images become noise by. Throws ValueError for names that there are not.
inline Process process_of(const TrainingConfig& c) {
  constexpr std::string_view where = "TrainingConfig";
  moxie::detail::expect_value(c.process == "flow" || c.process == "ddpm", where, "process is flow or ddpm");
  moxie::detail::expect_value(c.recipe.times == "logit-normal" || c.recipe.times == "uniform", where,
                              "times is logit-normal or uniform");
  moxie::detail::expect_value(c.schedule == "linear" || c.schedule == "cosine", where, "schedule is linear or cosine");
  if (c.process == "flow") {
    return RectifiedFlow{c.recipe.times == "logit-normal"};
  }
  return GaussianDiffusion(
      DiffusionSchedule(c.schedule == "linear" ? NoiseSchedule::linear : NoiseSchedule::cosine, c.diffusion_steps),
      c.model.learn_sigma ? StepVariance::learned_range : StepVariance::fixed_large);
}

/// The shape of a configuration's model, with the timesteps of its process and the prior's weight.
inline ModelConfig shape_of(const TrainingConfig& c) {
  ModelConfig shape = c.model;
  shape.prior = c.recipe.prior;
  shape.timesteps = c.process == "ddpm" ? c.diffusion_steps : 1000;
  shape.timestep_unit = c.process == "ddpm" ? 1 : 1e-3;
  return shape;
}

/// The feed-forward that a configuration asks for, handed to `f` with the name that its tensors have in a block. With another
/// `Element`, experts hold and multiply such numbers; only SwiGLU experts can. Throws ValueError.
template <class Element = float, class F>
auto with_layer(const TrainingConfig& c, F&& f) {
  using SwiGlu = moxie::SwiGluExperts<float, Element>;
  const Index dim = c.model.dim;
  const auto balance = moxie::Balance{.expert_level = c.recipe.balance};
  moxie::detail::expect_value(c.expert == "swiglu" || (c.expert == "gelu" && c.feed_forward == "top-k"), "TrainingConfig",
                              "expert is swiglu, or gelu for top-k");
  const auto top_k = [&]<class Experts>(std::type_identity<Experts>) {
    return f(moxie::TopKMoE<float, Experts>({.model_dim = dim,
                                             .experts = c.experts,
                                             .top_k = c.top_k,
                                             .expert = {.hidden_dim = c.hidden_dim},
                                             .normalize = c.normalize,
                                             .balance = balance}),
             "moe.");
  };
  if (c.feed_forward == "shared") {
    using Layer = moxie::SharedExpertMoE<float, SwiGlu>;
    const Layer layer({.model_dim = dim,
                       .experts = c.experts,
                       .top_k = c.top_k,
                       .expert = {.hidden_dim = c.hidden_dim},
                       .shared = {.hidden_dim = c.shared_hidden_dim},
                       .normalize = c.normalize,
                       .balance = balance});
    return f(layer, "moe.");
  }
  if (c.feed_forward == "top-k" && c.expert == "swiglu") {
    return top_k(std::type_identity<SwiGlu>());
  }
  if (c.feed_forward == "expert-choice") {
    return f(moxie::ExpertChoiceMoE<float, SwiGlu>({.model_dim = dim,
                                                    .experts = c.experts,
                                                    .expert = {.hidden_dim = c.hidden_dim},
                                                    .capacity = {.factor = c.capacity_factor}}),
             "moe.");
  }
  if constexpr (std::is_same_v<Element, float>) {
    if (c.feed_forward == "top-k") {
      return top_k(std::type_identity<moxie::GeluTanhExperts<float>>());
    }
    if (c.feed_forward == "soft") {
      return f(moxie::SoftMoE<float>({.model_dim = dim,
                                      .experts = c.experts,
                                      .slots_per_expert = c.slots_per_expert,
                                      .expert = {.hidden_dim = c.hidden_dim}}),
               "moe.");
    }
    moxie::detail::expect_value(c.feed_forward == "dense", "TrainingConfig",
                                "feed_forward is shared, top-k, expert-choice, soft or dense");
    return f(DenseFeedForward<float>({.model_dim = dim, .hidden_dim = c.hidden_dim}), "");
  } else {
    throw moxie::ValueError("TrainingConfig: only SwiGLU experts hold numbers of another kind than float");
  }
}

/// The model that a configuration asks for, handed to `f`: its type depends on the feed-forward. Throws ValueError.
template <class F>
auto with_model(const TrainingConfig& c, F&& f) {
  return with_layer(c, [&](const auto& layer, const char* name) {
    return f(Model<std::decay_t<decltype(layer)>>(shape_of(c), layer, name));
  });
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <dit/model.hpp>
#include <dit/process.hpp>
#include <moxie/moxie.hpp>
#include <nlohmann/json.hpp>
#include <nn/adamw.hpp>
#include <string>

namespace nn {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(AdamWConfig, rate, beta1, beta2, epsilon, weight_decay, clip, warm_up,
                                                ema_decay)

}  // namespace nn

namespace dit {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(ModelConfig, image_size, channels, patch, dim, depth, heads, classes,
                                                learn_sigma, qk_norm, switch_experts, switch_top_k)

/// How a model is trained, whatever it is.
struct Recipe {
  double balance = 0.01;               ///< weight of the balance loss
  double bias_rate = 0;                ///< of the loss-free selection bias (shared, top-k); 0: there is none
  double prior = 1;                    ///< weight of Switch-DiT's prior loss
  std::string times = "logit-normal";  ///< of rectified flow: or uniform
  bool stratified = false;             ///< a batch's times are spread evenly
  Index batch = 48;
  Index micro_batch = 0;  ///< images of a batch that are computed at once; 0: all
  double label_dropout = 0.1;
  nn::AdamWConfig optimizer = {};
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Recipe, balance, bias_rate, prior, times, stratified, batch, micro_batch,
                                                label_dropout, optimizer, seed)

/// Everything that decides what a run computes. It is stored in the checkpoint, and a run that goes on must agree with it.
struct TrainingConfig {
  ModelConfig model;
  std::string feed_forward = "shared";  ///< shared, top-k, expert-choice, soft or dense
  Index experts = 8;
  Index top_k = 2;
  Index hidden_dim = 128;            ///< of an expert
  Index shared_hidden_dim = 256;     ///< of the shared experts
  std::string expert = {};           ///< swiglu or gelu; by default as the papers: gelu for soft and dense, else swiglu
  bool normalize = false;            ///< the weights of a token's experts sum to 1 (shared, top-k)
  std::string score = "softmax";     ///< of a logit: or sigmoid (shared, top-k)
  double token_capacity = 0;         ///< room of an expert, in even shares of an image's tokens; 0: no limit (shared, top-k)
  bool batch_priority = false;       ///< where there is no room for all, the tokens of larger weight come first
  Index slots_per_expert = 1;        ///< soft
  std::string dispatch = "learned";  ///< of soft, what slots take of tokens: or uniform
  std::string combine = "learned";   ///< of soft, what tokens get of slots: or uniform
  double capacity_factor = 2;        ///< expert-choice: experts that a token has on average
  Index mixture_from = 0;            ///< blocks from here on have experts; those before one, as wide as K (shared, top-k)
  Index mixture_to = 0;              ///< and so have those from here on; 0: none
  std::string process = "flow";      ///< or ddpm
  std::string schedule = "linear";   ///< of DDPM: or cosine
  Index diffusion_steps = 1000;
  Recipe recipe = {};
  bool latents = false;  ///< images are not pixels in [-1,1]: they are neither clamped nor drawn
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(TrainingConfig, model, feed_forward, experts, top_k, hidden_dim,
                                                shared_hidden_dim, expert, normalize, score, token_capacity, batch_priority,
                                                slots_per_expert, dispatch, combine, capacity_factor, mixture_from, mixture_to,
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

/// Whether experts are GELU perceptrons, not SwiGLU. Throws ValueError.
inline bool has_gelu_experts(const TrainingConfig& c) {
  const bool gelu_by_default = c.feed_forward == "soft" || c.feed_forward == "dense";
  moxie::detail::expect_value(c.expert.empty() || c.expert == "swiglu" || c.expert == "gelu", "TrainingConfig",
                              "expert is swiglu or gelu");
  const bool gelu = c.expert == "gelu" || (c.expert.empty() && gelu_by_default);
  moxie::detail::expect_value(!gelu || gelu_by_default || c.feed_forward == "top-k", "TrainingConfig",
                              "expert is gelu for top-k, soft and dense alone");
  return gelu;
}

/// The numbers that experts hold and multiply.
enum class ExpertNumbers { float32, bfloat16 };

/// The feed-forward that a configuration asks for. Throws ValueError; bfloat16 is for SwiGLU experts of shared, top-k and
/// expert-choice alone. `layers.cpp` compiles all of them, once for all programs.
moxie::AnyLayer<float> feed_forward_of(const TrainingConfig& c, ExpertNumbers numbers = ExpertNumbers::float32);
/// What its tensors are called in a block.
inline const char* feed_forward_name(const TrainingConfig& c) { return c.feed_forward == "dense" ? "" : "moe."; }

/// `moxie::upcycle` of two layers that `feed_forward_of` made. Throws ValueError if the experts are of another kind than the
/// dense feed-forward.
void upcycle_feed_forward(const moxie::AnyLayer<float>& dense, ParameterView<const float> from,
                          const moxie::AnyLayer<float>& sparse, ParameterView<float> to);

/// The configuration of a block: the whole one's, or that of a block of one expert, which every token passes.
inline TrainingConfig config_of_block(const TrainingConfig& c, Index block) {
  const Index end = c.mixture_to == 0 ? c.model.depth : c.mixture_to;
  moxie::detail::expect_value(0 <= c.mixture_from && c.mixture_from < end && end <= c.model.depth, "TrainingConfig",
                              "the blocks with experts, from " + std::to_string(c.mixture_from) + " to " + std::to_string(end) +
                                  ", are not of " + std::to_string(c.model.depth));
  if (c.mixture_from <= block && block < end) {
    return c;
  }
  moxie::detail::expect_value(c.feed_forward == "shared" || c.feed_forward == "top-k", "TrainingConfig",
                              "only top-k and shared can leave blocks without experts");
  TrainingConfig one = c;
  one.experts = 1;
  one.top_k = 1;
  one.hidden_dim = c.top_k * c.hidden_dim;
  one.score = "softmax";
  one.normalize = false;
  one.token_capacity = 0;
  one.recipe.balance = 0;
  one.recipe.bias_rate = 0;
  return one;
}

/// The model that a configuration asks for. Throws ValueError.
inline Model<moxie::AnyLayer<float>> model_of(const TrainingConfig& c) {
  c.model.validate();
  std::vector<moxie::AnyLayer<float>> layers;
  for (Index block = 0; block < c.model.depth; ++block) {
    layers.push_back(feed_forward_of(config_of_block(c, block)));
  }
  return {shape_of(c), layers, feed_forward_name(c)};
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/configuration.hpp>
#include <utility>

using nlohmann::json;

TEST_CASE("TrainingConfig: survives JSON") {
  dit::TrainingConfig config;
  config.recipe.seed = 18446744073709551615U;
  config.model.qk_norm = true;
  config.model.switch_experts = 5;
  config.process = "ddpm";
  config.recipe.optimizer.rate = 1.0 / 3;
  const auto back = json::parse(json(config).dump()).get<dit::TrainingConfig>();
  CHECK(json(back) == json(config));
  CHECK(back.recipe.seed == config.recipe.seed);
  CHECK(back.recipe.optimizer.rate == config.recipe.optimizer.rate);
  CHECK(back.model.switch_experts == 5);
}

TEST_CASE("with_model: every feed-forward, and no other") {
  dit::TrainingConfig config;
  config.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 1, .heads = 2, .classes = 2};
  for (const char* name : {"shared", "top-k", "expert-choice", "soft", "dense"}) {
    config.feed_forward = name;
    const bool moe = dit::with_model(config, [](const auto& model) {
      return model.layout().find("blocks.0.moe.experts.0.gate_proj.weight") >= 0 ||
             model.layout().find("blocks.0.moe.experts.0.fc1.weight") >= 0;
    });
    CHECK(moe == (config.feed_forward != "dense"));
  }
  config.feed_forward = "loud";
  CHECK_THROWS_AS(dit::with_model(config, [](const auto& /*model*/) { return 0; }), moxie::ValueError);
}

TEST_CASE("with_model: the prior's timesteps are those of the process") {
  dit::TrainingConfig config;
  config.feed_forward = "dense";
  config.process = "ddpm";
  config.diffusion_steps = 50;
  CHECK(dit::with_model(config, [](const auto& model) { return model.config().timestep(49); }) == 49);
  config.process = "flow";
  CHECK(dit::with_model(config, [](const auto& model) { return model.config().timestep(0.5); }) == 500);
}

TEST_CASE("process_of: the two processes, and no others") {
  dit::TrainingConfig config;
  CHECK(std::get<dit::RectifiedFlow>(dit::process_of(config)).logit_normal_times);
  config.recipe.times = "uniform";
  CHECK_FALSE(std::get<dit::RectifiedFlow>(dit::process_of(config)).logit_normal_times);
  config.process = "ddpm";
  config.diffusion_steps = 30;
  config.schedule = "cosine";
  const auto fixed = std::get<dit::GaussianDiffusion>(dit::process_of(config));
  CHECK(fixed.schedule().steps() == 30);
  CHECK(fixed.schedule().betas.back() == 0.999);
  CHECK(fixed.output_columns(7) == 7);
  config.model.learn_sigma = true;
  CHECK(std::get<dit::GaussianDiffusion>(dit::process_of(config)).output_columns(7) == 14);
  for (std::string* name : {&config.process, &config.recipe.times, &config.schedule}) {
    const std::string good = std::exchange(*name, "other");
    CHECK_THROWS_AS(dit::process_of(config), moxie::ValueError);
    *name = good;
  }
}

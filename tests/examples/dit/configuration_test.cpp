// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/configuration.hpp>
#include <utility>

using dit::Index;
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

TEST_CASE("model_of: every feed-forward, and no other") {
  dit::TrainingConfig config;
  config.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 1, .heads = 2, .classes = 2};
  for (const char* name : {"shared", "top-k", "expert-choice", "soft", "dense"}) {
    config.feed_forward = name;
    const auto model = dit::model_of(config);
    const bool moe = model.layout().find("blocks.0.moe.experts.0.gate_proj.weight") >= 0 ||
                     model.layout().find("blocks.0.moe.experts.0.fc1.weight") >= 0;
    CHECK(moe == (config.feed_forward != "dense"));
  }
  config.feed_forward = "loud";
  CHECK_THROWS_AS(dit::model_of(config), moxie::ValueError);
}

TEST_CASE("model_of: experts are of the papers' kind, or of the one that is asked for") {
  dit::TrainingConfig config;
  config.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 1, .heads = 2, .classes = 2};
  const auto has = [&](const char* tensor) {
    return dit::model_of(config).layout().find(std::string("blocks.0.") + tensor) >= 0;
  };
  config.feed_forward = "dense";
  CHECK(has("mlp.fc1.weight"));
  config.expert = "swiglu";
  CHECK(has("mlp.gate_proj.weight"));
  config.feed_forward = "soft";
  CHECK(has("moe.experts.0.gate_proj.weight"));
  config.expert = "";
  CHECK(has("moe.experts.0.fc1.weight"));
  config.feed_forward = "top-k";
  CHECK(has("moe.experts.0.gate_proj.weight"));
  config.expert = "gelu";
  CHECK(has("moe.experts.0.fc1.weight"));
  for (const char* name : {"shared", "expert-choice"}) {
    config.feed_forward = name;
    CHECK_THROWS_AS(has(""), moxie::ValueError);
  }
  config.expert = "relu";
  CHECK_THROWS_AS(has(""), moxie::ValueError);
}

TEST_CASE("model_of: options of the router and of Soft MoE reach their layers") {
  dit::TrainingConfig config;
  config.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 1, .heads = 2, .classes = 2};
  config.experts = 4;
  config.score = "sigmoid";
  config.token_capacity = 1.25;
  config.batch_priority = true;
  config.recipe.bias_rate = 0.001;
  const auto check = [](const auto* layer) {
    REQUIRE(layer != nullptr);
    const moxie::TopKRouterConfig& router = layer->router().config();
    CHECK(router.score == moxie::Score::sigmoid);
    CHECK(router.capacity.factor == 1.25);
    CHECK(router.capacity.priority == moxie::Priority::weight);
    CHECK(router.selection_bias);
  };
  config.feed_forward = "shared";
  const moxie::AnyLayer<float> shared = dit::feed_forward_of(config);
  check(shared.get_if<moxie::SharedExpertMoE<float>>());
  config.feed_forward = "top-k";
  const moxie::AnyLayer<float> top_k = dit::feed_forward_of(config);
  check(top_k.get_if<moxie::TopKMoE<float>>());
  config.feed_forward = "soft";
  config.dispatch = "uniform";
  const moxie::AnyLayer<float> soft = dit::feed_forward_of(config);
  const auto* const layer = soft.get_if<moxie::SoftMoE<float, moxie::GeluTanhExperts<float>>>();
  REQUIRE(layer != nullptr);
  CHECK(layer->router().config().dispatch == moxie::Mixing::uniform);
  CHECK(layer->router().config().combine == moxie::Mixing::learned);
  config.combine = "none";
  CHECK_THROWS_AS(dit::model_of(config), moxie::ValueError);
  config = {};
  config.score = "none";
  CHECK_THROWS_AS(dit::model_of(config), moxie::ValueError);
}

TEST_CASE("model_of: some blocks have experts, the others one that is as wide as all that a token chooses") {
  dit::TrainingConfig config;
  config.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 4, .heads = 2, .classes = 2};
  config.feed_forward = "top-k";
  config.experts = 4;
  config.top_k = 2;
  config.hidden_dim = 16;
  config.recipe.bias_rate = 0.1;
  config.mixture_from = 1;
  config.mixture_to = 3;
  {
    const auto model = dit::model_of(config);
    for (const Index block : {0, 1, 2, 3}) {
      const bool mixture = block == 1 || block == 2;
      const std::string name = "blocks." + std::to_string(block) + ".moe.";
      CHECK((model.layout().find(name + "experts.3.up_proj.weight") >= 0) == mixture);
      CHECK((model.layout().find(name + "gate.e_score_correction_bias") >= 0) == mixture);
      const auto& tensors = model.layout().tensors();
      CHECK(tensors[std::size_t(model.layout().find(name + "experts.0.up_proj.weight"))].shape ==
            std::vector<Index>{mixture ? 16 : 32, 8});
    }
  }
  config.mixture_to = 0;
  {
    const auto model = dit::model_of(config);
    CHECK(model.layout().find("blocks.3.moe.experts.3.up_proj.weight") >= 0);
  }
  for (const auto& [from, to] : {std::pair{-1, 2}, std::pair{2, 2}, std::pair{0, 5}, std::pair{4, 0}}) {
    config.mixture_from = from;
    config.mixture_to = to;
    CHECK_THROWS_AS(dit::model_of(config), moxie::ValueError);
  }
  config.mixture_from = 1;
  config.mixture_to = 0;
  config.feed_forward = "soft";
  CHECK_THROWS_AS(dit::model_of(config), moxie::ValueError);
}

TEST_CASE("model_of: the prior's timesteps are those of the process") {
  dit::TrainingConfig config;
  config.feed_forward = "dense";
  config.process = "ddpm";
  config.diffusion_steps = 50;
  CHECK(dit::model_of(config).config().timestep(49) == 49);
  config.process = "flow";
  CHECK(dit::model_of(config).config().timestep(0.5) == 500);
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

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/cost.hpp>
#include <moxie/moxie.hpp>

using dit::Cost;
using dit::cost_of;
using dit::Index;

namespace {

dit::TrainingConfig small(const std::string& feed_forward) {
  dit::TrainingConfig c;
  c.model = {.image_size = 12, .channels = 3, .patch = 4, .dim = 24, .depth = 3, .heads = 2, .classes = 5};
  c.feed_forward = feed_forward;
  c.experts = 6;
  c.top_k = 2;
  c.hidden_dim = 20;
  c.shared_hidden_dim = 28;
  return c;
}

std::int64_t counted(const dit::TrainingConfig& c) { return dit::model_of(c).layout().parameter_count(); }

}  // namespace

TEST_CASE("cost_of: counts the parameters that a model has") {
  for (const char* feed_forward : {"shared", "top-k", "expert-choice", "soft", "dense"}) {
    CAPTURE(feed_forward);
    dit::TrainingConfig c = small(feed_forward);
    CHECK(cost_of(c).parameters == counted(c));
    c.model.qk_norm = true;
    c.model.switch_experts = 4;
    c.model.learn_sigma = true;
    c.slots_per_expert = 3;
    CHECK(cost_of(c).parameters == counted(c));
    if (c.feed_forward == "shared" || c.feed_forward == "top-k") {
      c.recipe.bias_rate = 0.1;
      CHECK(cost_of(c).parameters == counted(c));
      c.mixture_from = 1;
      c.mixture_to = 2;
      CHECK(cost_of(c).parameters == counted(c));
    }
    if (c.feed_forward == "soft") {
      c.dispatch = "uniform";
      CHECK(cost_of(c).parameters == counted(c));
      c.combine = "uniform";
      CHECK(cost_of(c).parameters == counted(c));
    }
    for (const char* expert : {"swiglu", "gelu"}) {
      c.expert = expert;
      if (c.feed_forward != "shared" && c.feed_forward != "expert-choice") {
        CHECK(cost_of(c).parameters == counted(c));
      }
    }
  }
}

TEST_CASE("cost_of: what a token meets and multiplies, beside one expert that is as wide") {
  // Per block of 9 tokens of width 24 each: a dense SwiGLU of width 40 has 3 * 24 * 40 = 2880 numbers.
  dit::TrainingConfig dense = small("dense");
  dense.expert = "swiglu";
  dense.hidden_dim = 40;
  const Cost base = cost_of(dense);
  CHECK(base.parameters == base.activated);
  CHECK(base.multiply_adds - base.linear_multiply_adds == 3 * 2 * 9 * 9 * 24);
  const auto more = [&](const dit::TrainingConfig& c) {
    const Cost cost = cost_of(c);
    return std::pair{cost.activated - base.activated, cost.multiply_adds - base.multiply_adds};
  };
  // Two experts of width 20 and a gate of 6 x 24.
  CHECK(more(small("top-k")) == std::pair<std::int64_t, std::int64_t>{3 * 144, 9 * 3 * 144});
  // And shared ones of width 28.
  CHECK(more(small("shared")) == std::pair<std::int64_t, std::int64_t>{3 * (144 + 2016), 9 * 3 * (144 + 2016)});
  // Six experts take three of nine tokens each: two for a token.
  CHECK(more(small("expert-choice")) == std::pair<std::int64_t, std::int64_t>{3 * 144, 9 * 3 * 144});
  // 18 slots of nine tokens: two for a token; logits, dispatch and combine are products with 18 x 24.
  dit::TrainingConfig soft = small("soft");
  soft.expert = "swiglu";
  soft.slots_per_expert = 3;
  CHECK(more(soft) == std::pair<std::int64_t, std::int64_t>{3 * (432 + 1), 9 * 3 * 3 * 432});
  // Blocks without experts have none of their gate.
  dit::TrainingConfig half = small("top-k");
  half.mixture_from = 2;
  CHECK(more(half) == std::pair<std::int64_t, std::int64_t>{144 + 2 * 24, 9 * (144 + 2 * 24)});
  // Switch-DiT: two of four experts of 24 x 25 numbers and a gate of 4 x 25; the gate works once an image.
  dit::TrainingConfig switched = dense;
  switched.model.switch_experts = 4;
  CHECK(more(switched) == std::pair<std::int64_t, std::int64_t>{3 * (2 * 600 + 100), 3 * (9 * 2 * 576 + 4 * 24)});
}

TEST_CASE("cost_of: refuses what no model is") {
  dit::TrainingConfig c = small("dense");
  c.model.patch = 5;
  CHECK_THROWS_AS(cost_of(c), moxie::ValueError);
  c = small("soft");
  c.mixture_from = 1;
  CHECK_THROWS_AS(cost_of(c), moxie::ValueError);
}

TEST_CASE("feed_forward_cost: the multiply-adds that the layers count themselves") {
  for (const char* feed_forward : {"shared", "top-k", "expert-choice", "soft", "dense"}) {
    CAPTURE(feed_forward);
    dit::TrainingConfig c = small(feed_forward);
    c.slots_per_expert = 3;
    for (const double capacity : {1., 1.5, 2.}) {
      c.capacity_factor = capacity;
      const Index length = c.model.tokens();
      const double expected = double(length) * dit::feed_forward_cost(c).multiply_adds;
      const auto check = [&](const auto& layer) {
        const moxie::Cost cost = layer.multiply_adds(length);
        CHECK(cost.forward == doctest::Approx(expected).epsilon(1e-15));
        CHECK(cost.backward == 2 * cost.forward);
        CHECK(layer.multiply_adds(4 * length, length) == 4 * cost);  // of a batch of images
      };
      const Index dim = c.model.dim;
      if (c.feed_forward == "shared") {
        check(moxie::SharedExpertMoE<float>({.model_dim = dim,
                                             .experts = c.experts,
                                             .top_k = c.top_k,
                                             .expert = {c.hidden_dim},
                                             .shared = {c.shared_hidden_dim}}));
      } else if (c.feed_forward == "top-k") {
        check(moxie::TopKMoE<float>({.model_dim = dim, .experts = c.experts, .top_k = c.top_k, .expert = {c.hidden_dim}}));
      } else if (c.feed_forward == "expert-choice") {
        check(moxie::ExpertChoiceMoE<float>(
            {.model_dim = dim, .experts = c.experts, .expert = {c.hidden_dim}, .capacity = {.factor = c.capacity_factor}}));
      } else if (c.feed_forward == "soft") {
        check(moxie::SoftMoE<float>(
            {.model_dim = dim, .experts = c.experts, .slots_per_expert = c.slots_per_expert, .expert = {c.hidden_dim}}));
      } else {
        check(moxie::DenseFeedForward<moxie::GeluTanhExperts<float>>({.model_dim = dim, .expert = {c.hidden_dim}}));
      }
    }
  }
}

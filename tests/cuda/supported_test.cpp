// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/cuda/cuda.hpp>
#include <moxie/expert/expert_bank.hpp>
#include <moxie/expert/linear.hpp>
#include <moxie/routing/hash.hpp>
#include <moxie/routing/top_p.hpp>
#include <string>
#include <support.hpp>

namespace {

using moxie::cuda::expect_supported;
using moxie::test::message_of;

template <class Config>
concept Known = requires(const Config& config) {
  expect_supported(config);
};

template <class Config>
std::string refusal(const Config& config) {
  return message_of<moxie::ValueError>([&] { expect_supported(config); });
}

TEST_CASE("device: options that it does not have are refused by name, by the check and by layers alike") {
  moxie::TopKMoEConfig<moxie::GluConfig<>> config{
      .model_dim = 8, .experts = 128, .top_k = 2, .expert = {.hidden_dim = 8}, .groups = {.count = 64, .chosen = 4}};
  CHECK(refusal(config) == "nothing was thrown");
  config.groups.count = 128;
  const std::string expected = "moxie::cuda: groups.count is 128, and a device has at most 64 groups of experts";
  CHECK(refusal(config) == expected);
  CHECK(refusal(config.router()) == expected);
  CHECK(message_of<moxie::ValueError>([&] { moxie::cuda::TopKMoE<float> layer(config); }) == expected);
  CHECK(message_of<moxie::ValueError>([&] { moxie::cuda::TopKRouter<float> router(config.router()); }) == expected);
  moxie::SharedExpertMoEConfig<moxie::GluConfig<>> shared{.model_dim = 8,
                                                          .experts = 128,
                                                          .top_k = 2,
                                                          .expert = {.hidden_dim = 8},
                                                          .shared = {.hidden_dim = 8},
                                                          .groups = {.count = 128, .chosen = 4}};
  CHECK(refusal(shared) == expected);
  CHECK(message_of<moxie::ValueError>([&] { moxie::cuda::SharedExpertMoE<float> layer(shared); }) == expected);
}

TEST_CASE("device: what it has is not refused") {
  CHECK(refusal(moxie::TopKRouterConfig{.model_dim = 8,
                                        .experts = 8,
                                        .top_k = 2,
                                        .normalize = true,
                                        .scale = 2.5,
                                        .balance = {.expert_level = 1, .sequence_level = 1, .device_level = 1, .devices = 2},
                                        .score = moxie::Score::sigmoid,
                                        .groups = {.count = 4, .chosen = 2},
                                        .selection_bias = true,
                                        .capacity = {.factor = 1, .priority = moxie::Priority::weight},
                                        .noise = {.logits = 1, .jitter = 0.1}}) == "nothing was thrown");
  CHECK(refusal(moxie::ExpertChoiceMoEConfig<moxie::GluConfig<>>{.model_dim = 8, .experts = 4}) == "nothing was thrown");
  CHECK(refusal(moxie::SoftMoEConfig<moxie::HiddenConfig>{.model_dim = 8, .experts = 4, .dispatch = moxie::Mixing::uniform}) ==
        "nothing was thrown");
}

TEST_CASE("device: options of the gate's input, of groups and of scale are refused by name") {
  const auto expect = [](const auto& config, const char* option) {
    CHECK_THROWS_WITH_AS(moxie::cuda::expect_supported(config),
                         (std::string("moxie::cuda: a device does not have the option ") + option).c_str(), moxie::ValueError);
  };
  moxie::TopKMoEConfig<moxie::GluConfig<>> top_k{.model_dim = 4, .experts = 4, .expert = {.hidden_dim = 8}};
  top_k.gate_dim = 3;
  expect(top_k, "gate_dim");
  top_k.gate_dim = 0;
  top_k.capacity.group = moxie::Grouping::call;
  expect(top_k, "capacity.group");
  moxie::ExpertChoiceRouterConfig choice{.model_dim = 4, .experts = 4};
  CHECK_NOTHROW(moxie::cuda::expect_supported(choice));
  choice.scale = 2;
  expect(choice, "scale");
  moxie::SoftRouterConfig soft{.model_dim = 4, .experts = 4};
  CHECK_NOTHROW(moxie::cuda::expect_supported(soft));
  soft.scale = 2;
  expect(soft, "scale");
  soft.scale = 1;
  soft.gate_dim = 3;
  expect(soft, "gate_dim");
}

TEST_CASE("device: gated units may have options, biases are refused by name") {
  moxie::TopKMoEConfig<moxie::GluConfig<moxie::ClampedSwiGlu>> config{
      .model_dim = 4, .experts = 4, .expert = {.hidden_dim = 8, .unit = {.limit = 7, .alpha = 1.702, .beta = 1}}};
  CHECK(refusal(config) == "nothing was thrown");
  config.expert.bias = true;
  const std::string expected = "moxie::cuda: a device does not have the option bias";
  CHECK(refusal(config) == expected);
  CHECK(message_of<moxie::ValueError>(
            [&] { moxie::cuda::TopKMoE<float, moxie::cuda::ClampedSwiGluExperts<float>> layer(config); }) == expected);
  CHECK(refusal(moxie::GluConfig<>{.hidden_dim = 8, .bias = true}) == expected);
  CHECK(message_of<moxie::ValueError>([&] { moxie::cuda::SwiGluExperts<float> bank(2, 4, {.hidden_dim = 8, .bias = true}); }) ==
        expected);
  CHECK(message_of<moxie::ValueError>([&] {
          moxie::cuda::ClampedSwiGluExperts<float> bank(2, 4, {.hidden_dim = 8, .unit = {.limit = -1}});
        }) == "GluExperts: the limit of a gated unit must be above 0");
}

TEST_CASE("device: for options of layers, routers and experts that it does not have there is no check to pass") {
  static_assert(Known<moxie::TopKMoEConfig<moxie::HiddenConfig>>);
  static_assert(Known<moxie::TopKMoEConfig<moxie::GluConfig<>>>);
  static_assert(Known<moxie::SoftRouterConfig>);
  static_assert(!Known<moxie::TopPRouter<float>::Config>);
  static_assert(!Known<moxie::LinearExperts<float>::Config>);
  static_assert(!Known<moxie::NullConfig>);
  CHECK(Known<moxie::ExpertChoiceRouterConfig>);
}

}  // namespace

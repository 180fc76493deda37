// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/shared_expert_moe.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/timestep_moe.hpp>
#include <moxie/routing/cluster.hpp>
#include <moxie/routing/config.hpp>
#include <moxie/routing/hash.hpp>
#include <moxie/routing/top_p.hpp>
#include <support.hpp>

namespace {

using moxie::Capacity;
using moxie::expert_capacity;
using moxie::Index;
using moxie::Layout;
using moxie::Mixing;
using moxie::Rounding;

TEST_CASE("capacity: is rounded up, or to the nearest with halves to even, then up to a multiple") {
  CHECK(expert_capacity(16, 4, {.factor = 1}) == 4);
  CHECK(expert_capacity(17, 4, {.factor = 1}) == 5);
  CHECK(expert_capacity(10, 4, {.factor = 1, .rounding = Rounding::round}) == 2);  // 2.5
  CHECK(expert_capacity(14, 4, {.factor = 1, .rounding = Rounding::round}) == 4);  // 3.5
  CHECK(expert_capacity(17, 4, {.factor = 1, .multiple_of = 4}) == 8);
  CHECK(expert_capacity(1, 8, {.factor = 0.1}) == 1);
}

TEST_CASE("capacity: below 1 is refused, and options that no capacity follows from") {
  const auto message = [](Index n, const Capacity& c) {
    return moxie::test::message_of<moxie::ValueError>([&] { expert_capacity(n, 8, c); });
  };
  CHECK(moxie::test::contains(message(1, {.factor = 1, .rounding = Rounding::round}), "rounds to a capacity of 0"));
  CHECK(moxie::test::contains(message(0, {.factor = 1}), "rounds to a capacity of 0"));
  CHECK(moxie::test::contains(message(10, {.factor = 1e300}), "too large"));
  const auto options = [](const Capacity& c) {
    return moxie::test::message_of<moxie::ValueError>([&] { moxie::detail::expect_capacity("f", c); });
  };
  CHECK(options({.factor = -1}) == "f: the capacity factor must be finite and not negative");
  CHECK(options({.factor = std::numeric_limits<double>::quiet_NaN()}) ==
        "f: the capacity factor must be finite and not negative");
  CHECK(options({.factor = 1, .multiple_of = 0}) == "f: capacity.multiple_of is 0, expected at least 1");
  CHECK(options({}) == "nothing was thrown");
}

std::vector<std::string> names_of(const Layout& layout) {
  std::vector<std::string> names;
  for (const auto& t : layout.tensors()) {
    names.push_back(t.name);
  }
  return names;
}

TEST_CASE("config: routers say which tensors they have") {
  using Names = std::vector<std::string>;
  moxie::TopKRouterConfig top_k{.model_dim = 3, .experts = 4};
  CHECK(names_of(top_k.layout()) == Names{"gate.weight"});
  CHECK(top_k.layout().tensors()[0].shape == std::vector<Index>{4, 3});
  top_k.selection_bias = true;
  CHECK(names_of(top_k.layout()) == Names{"gate.weight", "gate.e_score_correction_bias"});
  CHECK(top_k.layout().tensors()[1].trained == moxie::Trained::elsewhere);
  CHECK(names_of(moxie::ExpertChoiceRouterConfig{.model_dim = 3, .experts = 4}.layout()) == Names{"gate.weight"});
  moxie::SoftRouterConfig soft{.model_dim = 3, .experts = 4, .slots_per_expert = 2};
  CHECK(names_of(soft.layout()) == Names{"phi.weight", "scale"});
  CHECK(soft.layout().tensors()[0].shape == std::vector<Index>{8, 3});
  soft.normalize = false;
  CHECK(names_of(soft.layout()) == Names{"phi.weight"});
  soft.dispatch = soft.combine = Mixing::uniform;
  CHECK(names_of(soft.layout()).empty());
}

TEST_CASE("config: weights of losses below 0 are refused") {
  CHECK_THROWS_AS(moxie::TopKRouterConfig({.model_dim = 4, .experts = 5, .top_k = 2, .balance = {.z = -1}}).expect_valid("f"),
                  moxie::ValueError);
}

TEST_CASE("config: expert choice has room for no more than there are tokens") {
  const moxie::ExpertChoiceRouterConfig config{.model_dim = 3, .experts = 4, .capacity = {.factor = 2}};
  CHECK(config.room(0) == 0);
  CHECK(config.room(1) == 1);
  CHECK(config.room(7) == 4);
  CHECK(moxie::ExpertChoiceRouterConfig{.model_dim = 3, .experts = 1, .capacity = {.factor = 2}}.room(7) == 7);
}

TEST_CASE("config: a selection is biased where others than the best may be chosen") {
  moxie::TopKRouterConfig config{.model_dim = 3, .experts = 4};
  CHECK_FALSE(config.biased());
  config.groups = {.count = 2, .chosen = 2};
  CHECK_FALSE(config.biased());
  config.groups.chosen = 1;
  CHECK(config.biased());
  config.groups = {};
  config.selection_bias = true;
  CHECK(config.biased());
  CHECK_FALSE(config.normalized());
  config.order = moxie::TopKOrder::top_k_softmax;
  CHECK(config.normalized());
}

using moxie::test::contains;
using moxie::test::message_of;

TEST_CASE("config: options are checked in the scalar that computes with them") {
  const auto valid = [](const moxie::TopKRouterConfig& config, bool in_float) {
    try {
      in_float ? config.expect_valid<float>("f") : config.expect_valid<double>("f");
      return true;
    } catch (const moxie::ValueError&) {
      return false;
    }
  };
  const auto with = [](auto&& change) {
    moxie::TopKRouterConfig config{.model_dim = 4, .experts = 5, .top_k = 2};
    change(config);
    return config;
  };
  for (const double bad : {1e300, 1e39, 1e20, 1e-20, 1e-39, 1e-310}) {
    const bool in_double = bad > 1e-150 && bad < 1e150;
    CAPTURE(bad);
    for (double moxie::Balance::*weight : {&moxie::Balance::expert_level, &moxie::Balance::sequence_level,
                                           &moxie::Balance::device_level, &moxie::Balance::gshard, &moxie::Balance::importance,
                                           &moxie::Balance::z, &moxie::Balance::mean_entropy, &moxie::Balance::token_entropy}) {
      const auto config = with([&](auto& c) { c.balance.*weight = bad; });
      CHECK_FALSE(valid(config, true));
      CHECK(valid(config, false) == in_double);
    }
    CHECK_FALSE(valid(with([&](auto& c) { c.noise.logits = bad; }), true));
    CHECK(valid(with([&](auto& c) { c.noise.logits = bad; }), false) == in_double);
    CHECK_FALSE(valid(with([&](auto& c) { c.scale = -bad; }), true));
    CHECK(valid(with([&](auto& c) { c.scale = -bad; }), false) == in_double);
  }
  CHECK(valid(with([](auto& c) { c.scale = 0; }), true));  // routed experts switched off
  CHECK(valid(with([](auto& c) { c.noise.logits = c.balance.load = 1e-18; }), true));
  CHECK(valid(with([](auto& c) { c.balance.z = 1e19; }), true));
  // Each is a number of float, and the gradient divides one by the other.
  CHECK_FALSE(valid(with([](auto& c) { c.noise.logits = 1e-10, c.balance.load = 1e10; }), true));
  CHECK(valid(with([](auto& c) { c.noise.logits = 1e-10, c.balance.load = 1e10; }), false));
}

TEST_CASE("config: a load loss without noise on the logits is refused") {
  moxie::TopKRouterConfig config{.model_dim = 4, .experts = 5, .top_k = 2, .balance = {.load = 1}};
  CHECK(message_of<moxie::ValueError>([&] { config.expect_valid("f"); }) ==
        "f: balance.load is a loss of the noise on the logits, and noise.logits is 0");
  config.noise.logits = 1;
  CHECK(message_of<moxie::ValueError>([&] { config.expect_valid("f"); }) == "nothing was thrown");
}

TEST_CASE("config: more experts than can have names are refused by every router") {
  for (const Index many : {moxie::most_experts + 1, Index{1} << 31, Index{1} << 40}) {
    const std::string refused = "experts is " + std::to_string(many) + ", expected at most 1048576";
    const auto message = [](auto&& make) { return message_of<moxie::ValueError>(make); };
    CHECK(contains(message([&] { moxie::TopKRouter<float>({.model_dim = 4, .experts = many}); }), refused));
    CHECK(contains(message([&] { moxie::ExpertChoiceRouter<float>({.model_dim = 4, .experts = many}); }), refused));
    CHECK(contains(message([&] { moxie::SoftRouter<float>({.model_dim = 4, .experts = many}); }), refused));
    CHECK(contains(message([&] { moxie::TopPRouter<float>({.model_dim = 4, .experts = many}); }), refused));
    CHECK(contains(message([&] { moxie::HashRouter<float>({.experts = many}); }), refused));
    CHECK(contains(message([&] { moxie::TimestepRouter<float>({.condition_dim = 4, .experts = many}); }), refused));
    CHECK(contains(message([&] { moxie::ClusterRouter<float>({.feature_dim = 4, .experts = many}); }), refused));
    CHECK(contains(message([&] { moxie::TopKMoE<float>({.model_dim = 4, .experts = many, .expert = {4}}); }), refused));
    CHECK(contains(message([&] { moxie::SharedExpertMoE<float>({.model_dim = 4, .experts = many, .expert = {4}}); }), refused));
    CHECK(contains(message([&] { moxie::ExpertChoiceMoE<float>({.model_dim = 4, .experts = many, .expert = {4}}); }), refused));
    CHECK(contains(message([&] { moxie::SoftMoE<float>({.model_dim = 4, .experts = many, .expert = {4}}); }), refused));
    CHECK(
        contains(message([&] { moxie::TimestepMoE<float>({.model_dim = 4, .condition_dim = 4, .experts = many}); }), refused));
  }
}

}  // namespace

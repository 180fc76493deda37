// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <limits>
#include <map>
#include <moxie/layer/top_k_moe.hpp>
#include <nn/adamw.hpp>
#include <nn/embedding.hpp>
#include <nn/layer_norm.hpp>
#include <nn/linear.hpp>
#include <string>
#include <vector>

using moxie::Exec;
using moxie::Parameters;
using moxie::Rng;

namespace {

moxie::Layout layout() {
  moxie::Layout l;
  l.add("w", {200, 170});
  l.add("b", {3});
  return l;
}

}  // namespace

TEST_CASE("AdamW: two steps by hand, with warm-up, decay, clipping and averages") {
  Parameters<double> w(layout());
  Parameters<double> g = w.zeros_like();
  w["b"].eigen() << 1, -2, 0.5;
  g["b"].eigen() << 3, 0, -4;  // norm 5, clipped to 1
  nn::AdamW<double> adam({.rate = 0.1, .weight_decay = 0.01, .clip = 1, .warm_up = 2, .ema_decay = 0.9}, w);
  CHECK(adam.step(w, g, Exec{1}) == doctest::Approx(5));
  // Step 1: rate 0.05; m̂ / √v̂ is the sign of the gradient.
  CHECK(w["b"](0, 0) == doctest::Approx(1 - 0.05 * 1 - 0.05 * 0.01 * 1));
  CHECK(w["b"](0, 1) == doctest::Approx(-2 + 0.05 * 0.01 * 2));
  CHECK(w["b"](0, 2) == doctest::Approx(0.5 + 0.05 - 0.05 * 0.01 * 0.5));
  CHECK(adam.ema()["b"](0, 0) == doctest::Approx(0.1 * 1 + 0.9 * w["b"](0, 0)));  // d = 1 / 10
  const double before = w["b"](0, 0);
  g["b"].eigen() << 0.5, 0, 0;
  adam.step(w, g, Exec{1});
  const double m = 0.9 * 0.1 * 0.6 + 0.1 * 0.5;
  const double v = 0.999 * 0.001 * 0.36 + 0.001 * 0.25;
  const double step = (m / (1 - 0.81)) / (std::sqrt(v / (1 - 0.999 * 0.999)) + 1e-8);
  CHECK(w["b"](0, 0) == doctest::Approx(before - 0.1 * step - 0.1 * 0.01 * before));
  CHECK(w["w"].eigen().cwiseAbs().maxCoeff() == 0);
}

TEST_CASE("AdamW: the result is bit-identical for any number of threads") {
  Parameters<float> start(layout());
  Parameters<float> g = start.zeros_like();
  Rng(1).fill_normal(start["w"]);
  Rng(2).fill_normal(g["w"]);
  Parameters<float> expected = start;
  nn::AdamW<float> one({}, expected);
  const double norm = one.step(expected, g, Exec{1});
  for (const int threads : {2, 7}) {
    Parameters<float> w = start;
    nn::AdamW<float> adam({}, w);
    CHECK(adam.step(w, g, Exec{threads}) == norm);
    CHECK((w.flat() == expected.flat()).all());
  }
}

TEST_CASE("AdamW: a gradient that is not finite is refused and changes nothing") {
  Parameters<float> w(layout());
  Parameters<float> g = w.zeros_like();
  nn::AdamW<float> adam({}, w);
  g["b"](0, 1) = std::numeric_limits<float>::infinity();
  CHECK_THROWS_AS(adam.step(w, g, Exec{1}), moxie::ValueError);
  CHECK(adam.steps() == 0);
  CHECK(w.flat().abs().maxCoeff() == 0);
  CHECK(adam.m().flat().abs().maxCoeff() == 0);
}

TEST_CASE("AdamW: rate, decay and schedule are a function of the tensor") {
  moxie::Layout l;
  l.add("matrix", {2, 3});
  l.add("vector", {3});
  l.add("slow", {3});
  l.add("frozen", {3});
  Parameters<double> w(l);
  Parameters<double> g = w.zeros_like();
  for (const auto& tensor : w.layout().tensors()) {
    w[tensor.name].eigen().setConstant(2);
    g[tensor.name].eigen().setConstant(0.1);
  }
  std::vector<std::string> asked;
  const auto rule = [&](const moxie::TensorInfo& t) -> nn::TensorRule {
    asked.push_back(t.name);
    if (t.name == "slow") {
      return {.rate = 0.25, .weight_decay = 0.5, .schedule = [](std::int64_t n) { return 1.0 / double(n); }};
    }
    return {.rate = t.name == "frozen" ? 0.0 : 1.0, .weight_decay = t.shape.size() > 1 ? 0.5 : 0.0};
  };
  nn::AdamW<double> adam({.rate = 0.1, .weight_decay = 100, .clip = 0, .warm_up = 2}, w, rule);
  CHECK(asked == std::vector<std::string>{"matrix", "vector", "slow", "frozen"});

  // A constant gradient moves a weight by its rate, and the decay shrinks it: w - η (1 + λ w), up to ε.
  const auto moved = [](double start, double rate, double decay) { return start - rate * (1 + decay * start); };
  std::map<std::string, double> expected{{"matrix", 2}, {"vector", 2}, {"slow", 2}, {"frozen", 2}};
  for (int step = 1; step <= 3; ++step) {
    adam.step(w, g, Exec{1});
    const double rate = step == 1 ? 0.05 : 0.1;  // the config's warm-up
    expected["matrix"] = moved(expected["matrix"], rate, 0.5);
    expected["vector"] = moved(expected["vector"], rate, 0);
    expected["slow"] = moved(expected["slow"], 0.1 * 0.25 / step, 0.5);
    for (const auto& entry : expected) {
      CAPTURE(entry.first);
      CAPTURE(step);
      CHECK((w[entry.first].eigen().array() - entry.second).abs().maxCoeff() < 1e-6);
    }
  }
  CHECK(asked.size() == 4);
  CHECK((w["frozen"].eigen().array() == 2).all());
  CHECK((adam.ema()["frozen"].eigen().array() - 2).abs().maxCoeff() < 1e-14);
}

TEST_CASE("AdamW: a rule may go by the role of a tensor, of the parts of a transformer and of a layer with experts alike") {
  moxie::Layout l;
  const nn::Linear<float> linear(l, "linear", 4, 3);
  const nn::LayerNorm<float> norm(l, "norm", 4);
  const nn::LabelEmbedding<float> labels(l, "labels", 5, 4);
  const moxie::TopKMoE<float> layer(
      {.model_dim = 4, .experts = 2, .expert = {.hidden_dim = 3, .bias = true}, .selection_bias = true});
  l.add_part("moe.", layer.layout());
  const Parameters<float> w(l);
  std::map<moxie::Role, std::vector<std::string>> names;
  const nn::AdamW<float> adam({}, w, [&](const moxie::TensorInfo& t) {
    names[t.role].push_back(t.name);
    return nn::TensorRule{};
  });
  using moxie::Role;
  CHECK(names[Role::norm] == std::vector<std::string>{"norm.weight"});
  CHECK(names[Role::embedding] == std::vector<std::string>{"labels.weight"});
  CHECK(names[Role::gate] == std::vector<std::string>{"moe.gate.weight"});
  CHECK(names[Role::weight].size() == 1 + 2 * 3);
  CHECK(names[Role::bias].size() == 2 + 2 * 3);
  CHECK(names[Role::state].empty());  // no gradient trains it: it is not asked for
}

TEST_CASE("AdamW: a tensor that no gradient trains is neither moved nor decayed, and its average follows it") {
  moxie::Layout l;
  l.add("w", {3});
  l.add("bias", {3}, {.role = moxie::Role::state, .trained = moxie::Trained::elsewhere});
  Parameters<float> w(l);
  Parameters<float> g = w.zeros_like();
  w["w"].eigen().setConstant(1);
  w["bias"].eigen().setConstant(1);
  nn::AdamW<float> adam({.rate = 0.1, .weight_decay = 0.5, .warm_up = 0, .ema_decay = 0.5}, w);
  w["bias"].eigen().setConstant(3);  // by a rule of its own
  adam.step(w, g, Exec{1});
  CHECK(w["w"](0, 0) == doctest::Approx(0.95));
  CHECK(w["bias"](0, 0) == 3);
  CHECK(adam.ema()["bias"](0, 0) == doctest::Approx(0.1 * 1 + 0.9 * 3));
}

TEST_CASE("AdamW: a rule with a rate or a decay that is negative or not finite is refused") {
  const Parameters<float> w(layout());
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const nn::TensorRule& bad : {nn::TensorRule{.rate = -1}, {.rate = nan}, {.weight_decay = -1}, {.weight_decay = nan}}) {
    CHECK_THROWS_AS(nn::AdamW<float>({}, w, [&](const auto&) { return bad; }), moxie::ValueError);
  }
}

TEST_CASE("schedules: warm-up is linear, cosine decay ends at its last factor and stays there") {
  const nn::Schedule ramp = nn::linear_warm_up(4);
  CHECK(ramp(1) == 0.25);
  CHECK(ramp(4) == 1);
  CHECK(ramp(100) == 1);
  CHECK(nn::linear_warm_up(0)(1) == 1);
  const nn::Schedule cosine = nn::cosine_decay(10, 110, 0.2);
  CHECK(cosine(5) == 0.5);
  CHECK(cosine(10) == 1);
  CHECK(cosine(60) == doctest::Approx(0.6));
  CHECK(cosine(110) == doctest::Approx(0.2));
  CHECK(cosine(1000) == doctest::Approx(0.2));
  CHECK(nn::cosine_decay(10, 5)(20) == doctest::Approx(0));
}

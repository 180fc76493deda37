// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <nn/adamw.hpp>
#include <limits>

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

TEST_CASE("AdamW: the same bits for any number of threads") {
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

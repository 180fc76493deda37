// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <limits>
#include <moxie/routing/formula.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
namespace formula = moxie::formula;

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

moxie::Score score_of(bool softmax) { return softmax ? moxie::Score::softmax : moxie::Score::sigmoid; }

// Shares of the chosen experts of a token.
struct Shares {
  static constexpr std::size_t k = 3;
  std::array<double, k> w{};
  std::array<double, 5> s{};

  Shares(bool softmax, const std::array<double, 5>& z, const std::array<int, k>& chosen) {
    double sum = 0;
    for (const double x : z) {
      sum += std::exp(x);
    }
    for (std::size_t e = 0; e < z.size(); ++e) {
      s[e] = softmax ? std::exp(z[e]) / sum : sigmoid(z[e]);
    }
    const auto all = formula::share_sum(score_of(softmax), z.data(), s.data(), chosen.data(), Index{k});
    for (std::size_t j = 0; j < k; ++j) {
      const auto e = std::size_t(chosen[j]);
      w[j] = formula::share(score_of(softmax), z[e], s[e], all);
    }
  }
};

constexpr std::array<int, Shares::k> chosen{4, 0, 2};

TEST_CASE("formula: shares are scores over their sum, from softmax and from sigmoid scores") {
  const std::array<double, 5> z{0.3, -1.2, 2.0, 0.1, -0.7};
  for (const bool softmax : {false, true}) {
    const Shares shares(softmax, z, chosen);
    double sum = 0;
    for (const int e : chosen) {
      sum += shares.s[std::size_t(e)];
    }
    for (std::size_t j = 0; j < Shares::k; ++j) {
      CHECK(shares.w[j] == doctest::Approx(shares.s[std::size_t(chosen[j])] / sum).epsilon(1e-15));
    }
  }
}

TEST_CASE("formula: shares keep their ratios where all scores vanish, and tend to those of softmax scores") {
  const std::array<double, 5> z{-900.3, -901.2, -899.0, -900.1, -900.7};
  const std::array<double, 5> shifted{-0.3, -1.2, 1.0, -0.1, -0.7};
  const Shares vanishing(false, z, chosen);
  const Shares expected(true, shifted, chosen);
  for (std::size_t j = 0; j < Shares::k; ++j) {
    CHECK(vanishing.s[std::size_t(chosen[j])] == 0);
    CHECK(vanishing.w[j] == doctest::Approx(expected.w[j]).epsilon(1e-12));
  }
  const int one[] = {3};
  const auto alone = formula::share_sum(moxie::Score::sigmoid, z.data(), vanishing.s.data(), one, 1);
  CHECK(formula::share(moxie::Score::sigmoid, z[3], vanishing.s[3], alone) == 1);
}

TEST_CASE("formula: the adjoint of shares matches central differences") {
  std::array<double, 5> z{0.3, -1.2, -0.4, 0.1, -0.7};
  const std::array<double, Shares::k> dw{0.7, -0.2, 1.3};
  for (const bool softmax : {false, true}) {
    for (const double shift : {0.0, -60.0}) {  // there all scores are tiny
      auto at = z;
      for (double& x : at) {
        x += shift;
      }
      const Shares shares(softmax, at, chosen);
      double dot = 0;
      for (std::size_t j = 0; j < Shares::k; ++j) {
        dot += dw[j] * shares.w[j];
      }
      for (std::size_t j = 0; j < Shares::k; ++j) {
        const auto e = std::size_t(chosen[j]);
        const auto loss = [&](double x) {
          auto moved = at;
          moved[e] = x;
          const Shares of(softmax, moved, chosen);
          return dw[0] * of.w[0] + dw[1] * of.w[1] + dw[2] * of.w[2];
        };
        const double h = 1e-5;
        CHECK(formula::share_slope(score_of(softmax), shares.s[e], shares.w[j], dw[j], dot) ==
              doctest::Approx((loss(at[e] + h) - loss(at[e] - h)) / (2 * h)).epsilon(1e-7));
      }
    }
  }
}

TEST_CASE("formula: a sigmoid's slope, and l2norm with its adjoint, match central differences") {
  const double h = 1e-5;
  CHECK(formula::sigmoid_slope(sigmoid(0.4)) == doctest::Approx((sigmoid(0.4 + h) - sigmoid(0.4 - h)) / (2 * h)).epsilon(1e-8));
  const std::array<double, 3> v{0.3, -0.8, 0.1};
  const std::array<double, 3> d{1.0, 0.5, -2.0};
  const auto factor = [](const std::array<double, 3>& x) {
    return formula::l2norm_factor(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
  };
  const auto loss = [&](const std::array<double, 3>& x) { return factor(x) * (d[0] * x[0] + d[1] * x[1] + d[2] * x[2]); };
  const double r = factor(v);
  CHECK(r == doctest::Approx(1 / std::sqrt(0.74 + 1e-6)).epsilon(1e-15));
  for (std::size_t i = 0; i < 3; ++i) {
    auto up = v;
    auto down = v;
    up[i] += h;
    down[i] -= h;
    CHECK(formula::l2norm_slope(r, r * v[i], d[i], loss(v)) ==
          doctest::Approx((loss(up) - loss(down)) / (2 * h)).epsilon(1e-7));
  }
  CHECK(formula::l2norm_factor(0.0) == doctest::Approx(1000).epsilon(1e-12));
  CHECK(std::isnan(formula::l2norm_factor(std::numeric_limits<float>::infinity())));
}

TEST_CASE("formula: factors of jitter lie around 1") {
  CHECK(formula::jitter_factor(0.1, 0.0) == 0.9);
  CHECK(formula::jitter_factor(0.1, 0.5) == 1);
  CHECK(formula::jitter_factor(0, 0.9) == 1);
}

}  // namespace

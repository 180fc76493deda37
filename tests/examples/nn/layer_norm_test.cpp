// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/testing/gradient_check.hpp>
#include <nn/layer_norm.hpp>

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Parameters;
using moxie::random_normal;
using moxie::Rng;
using moxie::testing::check_gradient;

namespace {

constexpr double tolerance = 1e-6;

}  // namespace

TEST_CASE("LayerNorm: normalizes each group of d numbers, and its gradients agree with finite differences, in place too") {
  constexpr Index T = 5, D = 12;
  for (const Index d : {Index{12}, Index{4}}) {
    CAPTURE(d);
    moxie::Layout layout;
    const nn::LayerNorm<double> norm(layout, "n", d);
    Parameters<double> p(layout);
    norm.initialize(p);
    Matrix<double> x = random_normal<double>(T, D, Rng(1), 3.0);
    Matrix<double> y(T, D);
    nn::LayerNorm<double>::Tape tape;
    norm.forward(p, x, y, tape, Exec{1});
    for (Index t = 0; t < T; ++t) {
      for (Index g = 0; g < D / d; ++g) {
        const auto group = y.row(t).segment(g * d, d).array();
        CHECK(std::abs(group.mean()) < 1e-14);
        CHECK(group.square().mean() == doctest::Approx(1).epsilon(1e-4));
      }
    }

    Rng(2).fill_normal(p["n.weight"]);
    Rng(3).fill_normal(p["n.bias"]);
    const Matrix<double> dy = random_normal<double>(T, D, Rng(4));
    const auto loss = [&] {
      norm.forward(p, x, y, tape, Exec{1});
      return y.cwiseProduct(dy).sum();
    };
    loss();
    Parameters<double> dp = p.zeros_like();
    Matrix<double> dx(T, D);
    norm.backward(p, dy, dx, dp, tape, Exec{2});
    CHECK(check_gradient(loss, x, dx).passes(tolerance));
    CHECK(check_gradient(loss, p["n.weight"], dp["n.weight"]).passes(tolerance));
    CHECK(check_gradient(loss, p["n.bias"], dp["n.bias"]).passes(tolerance));

    Matrix<double> in_place = x;
    norm.forward(p, in_place, in_place, tape, Exec{1});
    loss();
    CHECK(in_place == y);
    Matrix<double> d_in_place = dy;
    norm.backward(p, d_in_place, d_in_place, dp, tape, Exec{1});
    CHECK(d_in_place == dx);
  }
}

TEST_CASE("LayerNorm: a row that is not made of whole groups is refused") {
  moxie::Layout layout;
  const nn::LayerNorm<double> norm(layout, "n", 4);
  const Parameters<double> p(layout);
  Matrix<double> x = Matrix<double>::Zero(2, 6);
  nn::LayerNorm<double>::Tape tape;
  CHECK_THROWS_AS(norm.forward(p, x, x, tape, Exec{1}), moxie::ValueError);
}

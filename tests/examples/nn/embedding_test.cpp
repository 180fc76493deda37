// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <moxie/testing/gradient_check.hpp>
#include <nn/embedding.hpp>
#include <vector>

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

TEST_CASE("position_embedding: sines and cosines of the column, then of the row") {
  const Matrix<double> table = nn::position_embedding<double>(3, 8);
  REQUIRE(table.rows() == 9);
  const Index row = 2, column = 1, token = row * 3 + column;
  const std::vector<double> expected{std::sin(1.0), std::sin(0.01), std::cos(1.0), std::cos(0.01),
                                     std::sin(2.0), std::sin(0.02), std::cos(2.0), std::cos(0.02)};
  for (Index i = 0; i < 8; ++i) {
    CHECK(table(token, i) == doctest::Approx(expected[std::size_t(i)]));
  }
}

TEST_CASE("timestep_frequencies: cosines, then sines, of t at falling frequencies") {
  Matrix<double> out(2, 4);
  nn::timestep_frequencies<double>({0.0, 3.0}, out);
  CHECK(out.row(0) == Matrix<double>{{1, 1, 0, 0}});
  CHECK(out.row(1).isApprox(Matrix<double>{{std::cos(3.0), std::cos(0.03), std::sin(3.0), std::sin(0.03)}}));
}

TEST_CASE("TimestepEmbedding: its gradients agree with finite differences") {
  moxie::Layout layout;
  const nn::TimestepEmbedding<double> embedding(layout, "t", 6);
  Parameters<double> p(layout);
  for (std::size_t i = 0; i < layout.tensors().size(); ++i) {
    Rng(1).split(i).fill_normal(p.view()[Index(i)], 0.3);
  }
  const std::vector<double> t{0.1, 0.9, 25};
  const Matrix<double> dout = random_normal<double>(3, 6, Rng(2));
  Matrix<double> out(3, 6);
  nn::TimestepEmbedding<double>::Tape tape;
  const auto loss = [&] {
    embedding.forward(p, t, out, tape, Exec{1});
    return out.cwiseProduct(dout).sum();
  };
  loss();
  Parameters<double> dp = p.zeros_like();
  moxie::Workspace workspace;
  embedding.backward(p, dout, dp, tape, {workspace, Exec{1}});
  for (const auto& tensor : layout.tensors()) {
    CAPTURE(tensor.name);
    CHECK(check_gradient(loss, p[tensor.name], dp[tensor.name], {.max_elements = 200}).passes(tolerance));
  }
}

TEST_CASE("LabelEmbedding: adds the label's row, accumulates its gradient, and refuses a label without a row") {
  moxie::Layout layout;
  const nn::LabelEmbedding<double> embedding(layout, "y", 3, 4);
  Parameters<double> p(layout);
  embedding.initialize(p, Rng(1));
  CHECK(p["y.weight"].eigen().cwiseAbs().minCoeff() > 0);
  const std::vector<Index> labels{2, 0, 2};
  const Matrix<double> dout = random_normal<double>(3, 4, Rng(2));
  Matrix<double> out = Matrix<double>::Ones(3, 4);
  embedding.add(p, labels, out);
  CHECK((out.row(0).array() - 1 - p["y.weight"].eigen().row(2).array()).abs().maxCoeff() < 1e-15);
  Parameters<double> dp = p.zeros_like();
  embedding.backward(labels, dout, dp);
  CHECK(dp["y.weight"].eigen().row(0) == dout.row(1));
  CHECK(dp["y.weight"].eigen().row(1).isZero());
  CHECK(dp["y.weight"].eigen().row(2).isApprox(dout.row(0) + dout.row(2)));
  const Matrix<double> before = out;
  for (const Index bad : {Index{-1}, Index{3}}) {
    CHECK_THROWS_AS(embedding.add(p, {0, 1, bad}, out), moxie::ValueError);
    CHECK(out == before);
  }
}

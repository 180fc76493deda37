// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/testing/gradient_check.hpp>
#include <nn/attention.hpp>

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

TEST_CASE("Attention: equals softmax(q k' / sqrt d) v, and its gradient agrees with finite differences") {
  constexpr Index B = 2, L = 5, D = 6, heads = 2, d = D / heads;
  const nn::Attention<double> attention{heads, L};
  Matrix<double> qkv = random_normal<double>(B * L, 3 * D, Rng(1));
  const Matrix<double> dout = random_normal<double>(B * L, D, Rng(2));
  Matrix<double> out(B * L, D), dqkv(B * L, 3 * D);
  moxie::Workspace workspace;
  const auto loss = [&] {
    attention.forward(qkv, out, {workspace, Exec{1}});
    return out.cwiseProduct(dout).sum();
  };
  loss();
  for (Index b = 0; b < B; ++b) {
    for (Index h = 0; h < heads; ++h) {
      const Matrix<double> q = qkv.block(b * L, h * d, L, d);
      const Matrix<double> k = qkv.block(b * L, D + h * d, L, d);
      const Matrix<double> v = qkv.block(b * L, 2 * D + h * d, L, d);
      Matrix<double> weight = (q * k.transpose() / std::sqrt(double(d))).array().exp();
      weight.array().colwise() /= weight.rowwise().sum().array().eval();
      CHECK((out.block(b * L, h * d, L, d) - weight * v).cwiseAbs().maxCoeff() < 1e-13);
    }
  }
  attention.backward(qkv, dout, dqkv, {workspace, Exec{1}});
  const auto report = check_gradient(loss, qkv, dqkv);
  CHECK_MESSAGE(report.passes(tolerance), report.message());
}

// Sequences do not see each other, so a part of the batch is bit-identical to itself computed without the others.
TEST_CASE("Attention: long sequences are computed in parts") {
  constexpr Index L = 600, heads = 3, D = 6, B = 5;  // four sequences exceed the scratch
  static_assert(4 * heads * L * L > nn::Attention<float>::scratch);
  const nn::Attention<float> attention{heads, L};
  const Matrix<float> qkv = random_normal<float>(B * L, 3 * D, Rng(1));
  const Matrix<float> dout = random_normal<float>(B * L, D, Rng(2));
  Matrix<float> out(B * L, D), dqkv(B * L, 3 * D);
  moxie::Workspace workspace;
  attention.forward(qkv, out, {workspace, Exec{2}});
  attention.backward(qkv, dout, dqkv, {workspace, Exec{2}});
  for (Index b = 0; b < B; ++b) {
    const Matrix<float> one = qkv.middleRows(b * L, L);
    const Matrix<float> done = dout.middleRows(b * L, L);
    Matrix<float> y(L, D), dx(L, 3 * D);
    attention.forward(one, y, {workspace, Exec{1}});
    attention.backward(one, done, dx, {workspace, Exec{1}});
    CHECK(y == out.middleRows(b * L, L));
    CHECK(dx == dqkv.middleRows(b * L, L));
  }
}

TEST_CASE("SelfAttention: its gradients agree with finite differences, with normalized heads and without") {
  constexpr Index B = 2, L = 3, D = 8, heads = 2;
  for (const bool qk_norm : {false, true}) {
    moxie::Layout layout;
    const nn::SelfAttention<double> attention(layout, "a.", D, heads, L, qk_norm);
    CHECK(layout.tensors().size() == (qk_norm ? 8 : 4));
    Parameters<double> p(layout);
    attention.initialize(p, Rng(4));
    if (qk_norm) {
      CHECK(p["a.q_norm.weight"].eigen().isOnes());
      CHECK(p["a.k_norm.bias"].eigen().isZero());
    }
    for (std::size_t i = 0; i < layout.tensors().size(); ++i) {
      Rng(5).split(i).fill_normal(p.view()[Index(i)], 0.6);
    }
    Matrix<double> x = random_normal<double>(B * L, D, Rng(6));
    const Matrix<double> dy = random_normal<double>(B * L, D, Rng(7));
    Matrix<double> y(B * L, D), dx(B * L, D);
    nn::SelfAttention<double>::Tape tape;
    moxie::Workspace workspace;
    const auto loss = [&] {
      attention.forward(p, x, y, tape, {workspace, Exec{1}});
      return y.cwiseProduct(dy).sum();
    };
    loss();
    Parameters<double> dp = p.zeros_like();
    attention.backward(p, x, dy, dx, dp, tape, {workspace, Exec{2}});
    const auto report = check_gradient(loss, x, dx);
    CHECK_MESSAGE(report.passes(tolerance), report.message());
    for (const auto& tensor : layout.tensors()) {
      CAPTURE(tensor.name);
      if (tensor.name == "a.k_norm.bias") {  // adds the same to all logits of a row, which softmax does not see
        CHECK(dp[tensor.name].eigen().cwiseAbs().maxCoeff() < 1e-13);
      } else {
        CHECK(check_gradient(loss, p[tensor.name], dp[tensor.name]).passes(tolerance));
      }
    }
  }
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/testing/gradient_check.hpp>
#include <nn/adaln.hpp>

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::random_normal;
using moxie::Rng;
using moxie::testing::check_gradient;

namespace {

constexpr double tolerance = 1e-6;

double inner(const Matrix<double>& a, const Matrix<double>& b) { return (a.array() * b.array()).sum(); }

}  // namespace

TEST_CASE("ModulatedNorm: has mean 0 and variance 1 before modulation, and its gradients agree with finite differences") {
  constexpr Index B = 2, L = 3, D = 8;
  const nn::ModulatedNorm<double> norm{L};
  Matrix<double> x = random_normal<double>(B * L, D, Rng(1), 3.0);
  Matrix<double> shift = random_normal<double>(B, D, Rng(2));
  Matrix<double> scale = random_normal<double>(B, D, Rng(3));
  const Matrix<double> dh = random_normal<double>(B * L, D, Rng(4));
  Matrix<double> h(B * L, D);
  nn::ModulatedNorm<double>::Tape tape;
  const auto loss = [&] {
    norm.forward(x, shift, scale, h, tape, Exec{1});
    return inner(h, dh);
  };
  loss();
  const auto n = tape.n.view(B * L, D).eigen();
  CHECK(n.rowwise().mean().cwiseAbs().maxCoeff() < 1e-14);
  CHECK((n.rowwise().squaredNorm().array() / double(D) - 1).abs().maxCoeff() < 1e-5);
  CHECK((h.row(4) - (n.row(4).array() * (1 + scale.row(1).array()) + shift.row(1).array()).matrix()).norm() < 1e-13);
  Matrix<double> dshift(B, D), dscale(B, D);
  Matrix<double> dx = Matrix<double>::Ones(B * L, D);  // it adds
  norm.backward(scale, dh, dshift, dscale, dx, tape, Exec{1});
  dx.array() -= 1;
  CHECK(check_gradient(loss, x, dx).passes(tolerance));
  CHECK(check_gradient(loss, shift, dshift).passes(tolerance));
  CHECK(check_gradient(loss, scale, dscale).passes(tolerance));
}

TEST_CASE("add_gated: its gradients agree with finite differences") {
  Matrix<double> x = random_normal<double>(6, 4, Rng(1));
  Matrix<double> f = random_normal<double>(6, 4, Rng(2));
  Matrix<double> gate = random_normal<double>(2, 4, Rng(3));
  const Matrix<double> dout = random_normal<double>(6, 4, Rng(4));
  Matrix<double> out(6, 4), df(6, 4), dgate(2, 4);
  const auto loss = [&] {
    nn::add_gated<double>(x, gate, f, out, Exec{1});
    return inner(out, dout);
  };
  nn::add_gated_backward<double>(gate, f, dout, df, dgate, Exec{1});
  CHECK(check_gradient(loss, x, dout).passes(tolerance));
  CHECK(check_gradient(loss, f, df).passes(tolerance));
  CHECK(check_gradient(loss, gate, dgate).passes(tolerance));
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/modules.hpp>
#include <moxie/testing/gradient_check.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
using moxie::Parameters;
using moxie::random_normal;
using moxie::testing::check_gradient;

namespace {

constexpr double tolerance = 1e-6;

double inner(const Matrix<double>& a, const Matrix<double>& b) { return (a.array() * b.array()).sum(); }

}  // namespace

TEST_CASE("Linear: is x W' + b, and its gradients agree with finite differences") {
  moxie::Layout layout;
  const dit::Linear<double> linear(layout, "l", 5, 3);
  Parameters<double> p(layout);
  p["l.weight"].eigen() = random_normal<double>(3, 5, Rng(1));
  p["l.bias"].eigen() = random_normal<double>(1, 3, Rng(2));
  Matrix<double> x = random_normal<double>(7, 5, Rng(3));
  const Matrix<double> dy = random_normal<double>(7, 3, Rng(4));
  Matrix<double> y(7, 3);
  const auto loss = [&] {
    linear.forward(p, x, y, Exec{1});
    return inner(y, dy);
  };
  loss();
  const Matrix<double> expected =
      (x * p["l.weight"].eigen().transpose()).rowwise() + Eigen::RowVectorXd(p["l.bias"].eigen().row(0));
  CHECK((y - expected).cwiseAbs().maxCoeff() < 1e-13);
  Parameters<double> dp = p.zeros_like();
  Matrix<double> dx(7, 5);
  linear.backward(p, x, dy, dx, dp, Exec{1});
  CHECK(check_gradient(loss, x, dx).passes(tolerance));
  CHECK(check_gradient(loss, p["l.weight"], dp["l.weight"]).passes(tolerance));
  CHECK(check_gradient(loss, p["l.bias"], dp["l.bias"]).passes(tolerance));
  const Matrix<double> once = dx;
  linear.backward(p, x, dy, dx, dp, Exec{1}, true);
  CHECK((dx - 2 * once).cwiseAbs().maxCoeff() < 1e-12);
}

TEST_CASE("ModulatedNorm: has mean 0 and variance 1 before modulation, and its gradients agree with finite differences") {
  constexpr Index B = 2, L = 3, D = 8;
  const dit::ModulatedNorm<double> norm{L};
  Matrix<double> x = random_normal<double>(B * L, D, Rng(1), 3.0);
  Matrix<double> shift = random_normal<double>(B, D, Rng(2));
  Matrix<double> scale = random_normal<double>(B, D, Rng(3));
  const Matrix<double> dh = random_normal<double>(B * L, D, Rng(4));
  Matrix<double> h(B * L, D);
  dit::ModulatedNorm<double>::Tape tape;
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
    dit::add_gated<double>(x, gate, f, out, Exec{1});
    return inner(out, dout);
  };
  dit::add_gated_backward<double>(gate, f, dout, df, dgate, Exec{1});
  CHECK(check_gradient(loss, x, dout).passes(tolerance));
  CHECK(check_gradient(loss, f, df).passes(tolerance));
  CHECK(check_gradient(loss, gate, dgate).passes(tolerance));
}

TEST_CASE("activate: its gradient agrees with finite differences") {
  Matrix<double> in = random_normal<double>(3, 7, Rng(1), 2.0);
  const Matrix<double> dout = random_normal<double>(3, 7, Rng(2));
  Matrix<double> out(3, 7);
  Matrix<double> d = dout;
  dit::activate_backward<moxie::Silu, double>(in, d);
  const auto loss = [&] {
    dit::activate<moxie::Silu, double>(in, out);
    return inner(out, dout);
  };
  CHECK(check_gradient(loss, in, d).passes(tolerance));
}

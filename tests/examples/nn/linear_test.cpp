// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/testing/gradient_check.hpp>
#include <nn/linear.hpp>

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Parameters;
using moxie::random_normal;
using moxie::Rng;
using moxie::testing::check_gradient;

namespace {

constexpr double tolerance = 1e-6;

double inner(const Matrix<double>& a, const Matrix<double>& b) { return (a.array() * b.array()).sum(); }

}  // namespace

TEST_CASE("Linear: is x W' + b, and its gradients agree with finite differences") {
  moxie::Layout layout;
  const nn::Linear<double> linear(layout, "l", 5, 3);
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
  const Parameters<double> dp_once = dp;
  linear.backward(p, x, dy, dx, dp, Exec{1}, true);
  CHECK((dx - 2 * once).cwiseAbs().maxCoeff() < 1e-12);
  CHECK((dp.flat() - 2 * dp_once.flat()).abs().maxCoeff() < 1e-12);
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/testing/gradient_check.hpp>
#include <nn/activation.hpp>

using moxie::Matrix;
using moxie::random_normal;
using moxie::Rng;
using moxie::testing::check_gradient;

namespace {

constexpr double tolerance = 1e-6;

double inner(const Matrix<double>& a, const Matrix<double>& b) { return (a.array() * b.array()).sum(); }

}  // namespace

TEST_CASE("activate: its gradient agrees with finite differences") {
  Matrix<double> in = random_normal<double>(3, 7, Rng(1), 2.0);
  const Matrix<double> dout = random_normal<double>(3, 7, Rng(2));
  Matrix<double> out(3, 7);
  Matrix<double> d = dout;
  nn::activate_backward<moxie::Silu, double>(in, d);
  const auto loss = [&] {
    nn::activate<moxie::Silu, double>(in, out);
    return inner(out, dout);
  };
  CHECK(check_gradient(loss, in, d).passes(tolerance));
}

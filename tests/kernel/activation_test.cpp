// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/activation.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::test::Tolerance;
namespace kernel = moxie::kernel;
namespace reference = moxie::test::reference;

template <class Activation, class S>
Matrix<S> value(const Matrix<S>& x) {
  Matrix<S> y(x.rows(), x.cols());
  kernel::map(
      x.size(), y.data(), [](auto v) { return Activation::value(v); }, x.data());
  return y;
}
template <class Activation, class S>
Matrix<S> derivative(const Matrix<S>& x) {
  Matrix<S> y(x.rows(), x.cols());
  kernel::map(
      x.size(), y.data(), [](auto v) { return Activation::derivative(v); }, x.data());
  return y;
}

double relu(double x) { return x > 0 ? x : 0; }

// n points of [-range, range], 0 among them.
template <class S>
Matrix<S> points(Index n, double range) {
  Matrix<S> x(1, n);
  for (Index i = 0; i < n; ++i) {
    x(0, i) = S(range * (2 * double(i) / double(n - 1) - 1));
  }
  return x;
}

template <class Activation, class S>
void check_values(double (*expected)(double)) {
  const Matrix<S> x = points<S>(2001, 30);
  const Matrix<S> y = value<Activation>(x);
  double worst = 0;
  for (Index i = 0; i < x.size(); ++i) {
    const double f = expected(double(x(0, i)));
    const double error = std::abs(double(y(0, i)) - f) / std::max(1.0, std::abs(f));
    worst = error <= worst ? worst : error;
  }
  CHECK(worst < Tolerance<S>::function);
  CHECK(y(0, 1000) == S(0));  // f(0) = 0
}

// `kink`: half the width of what is left out around 0, where a derivative jumps.
template <class Activation>
void check_derivative(double kink = 0) {
  for (const double range : {6.0, 20.0}) {
    Matrix<double> x = points<double>(401, range);
    const Matrix<double> d = derivative<Activation>(x);
    const Matrix<double> ones = Matrix<double>::Ones(1, x.cols());
    // One element at a time: a sum over all would round by its size.
    for (Index i = 0; i < x.cols(); ++i) {
      Matrix<double> point = x.middleCols(i, 1);
      if (std::abs(point(0, 0)) < kink) {
        continue;
      }
      const Matrix<double> slope = d.middleCols(i, 1);
      const auto f = [&] { return value<Activation>(point)(0, 0); };
      const auto report = moxie::testing::check_gradient(f, point, slope, {.step = 1e-3});
      // Relative to the slope, or to 1 where the function is flat.
      const double error = std::abs(report.analytic - report.numeric) / std::max(1.0, std::abs(report.numeric));
      CHECK(error < 1e-10);
    }
  }
}

TEST_CASE_TEMPLATE("SiLU: is x σ(x)", S, float, double) { check_values<moxie::Silu, S>(&reference::silu); }
TEST_CASE_TEMPLATE("GELU: is x Φ(x)", S, float, double) { check_values<moxie::GeluErf, S>(&reference::gelu_erf); }
TEST_CASE_TEMPLATE("GELU, tanh: is the approximation", S, float, double) {
  check_values<moxie::GeluTanh, S>(&reference::gelu_tanh);
}

TEST_CASE_TEMPLATE("ReLU: is max(x, 0)", S, float, double) { check_values<moxie::Relu, S>(&relu); }
TEST_CASE_TEMPLATE("ReLU squared: is max(x, 0)²", S, float, double) {
  check_values<moxie::ReluSquared, S>([](double x) { return relu(x) * relu(x); });
}

TEST_CASE("SiLU: the derivative matches central differences") { check_derivative<moxie::Silu>(); }
TEST_CASE("GELU: the derivative matches central differences") { check_derivative<moxie::GeluErf>(); }
TEST_CASE("GELU, tanh: the derivative matches central differences") { check_derivative<moxie::GeluTanh>(); }

TEST_CASE("ReLU: the derivative matches central differences away from 0") { check_derivative<moxie::Relu>(1e-2); }
TEST_CASE("ReLU squared: the derivative matches central differences away from 0") {
  check_derivative<moxie::ReluSquared>(1e-2);
}

TEST_CASE_TEMPLATE("ReLU, ReLU squared: the derivative at 0 is 0, and NaN stays NaN", S, float, double) {
  Matrix<S> x(1, 3);
  x << S(0), S(-0.0), std::numeric_limits<S>::quiet_NaN();
  for (const Matrix<S>& d : {derivative<moxie::Relu>(x), derivative<moxie::ReluSquared>(x)}) {
    CHECK(d(0, 0) == S(0));
    CHECK(d(0, 1) == S(0));
  }
  for (const Matrix<S>& y : {value<moxie::Relu>(x), value<moxie::ReluSquared>(x)}) {
    CHECK(std::isnan(y(0, 2)));
  }
}

TEST_CASE_TEMPLATE("activations: of a plain number, as a CUDA device computes, are those of vectors, NaN of NaN", S, float,
                   double) {
  const auto check = [](auto activation) {
    using Activation = decltype(activation);
    Matrix<S> x = points<S>(2001, 30);
    const Matrix<S> y = value<Activation>(x);
    const Matrix<S> d = derivative<Activation>(x);
    double worst = 0;
    for (Index i = 0; i < x.size(); ++i) {
      const S point = x(0, i);
      worst = std::max(worst,
                       std::abs(double(Activation::value(point)) - double(y(0, i))) / std::max(1.0, double(std::abs(point))));
      worst = std::max(worst, std::abs(double(Activation::derivative(point)) - double(d(0, i))));
    }
    CHECK(worst < Tolerance<S>::function);
    CHECK(std::isnan(Activation::value(std::numeric_limits<S>::quiet_NaN())));
    for (const S far : {S(1e30), S(-1e30)}) {
      CHECK(std::isfinite(Activation::derivative(far)));
    }
  };
  check(moxie::Silu{});
  check(moxie::Relu{});
  check(moxie::GeluErf{});
  check(moxie::GeluTanh{});
  CHECK(moxie::ReluSquared::value(S(-3)) == S(0));
  CHECK(moxie::ReluSquared::value(S(3)) == S(9));
  CHECK(moxie::ReluSquared::derivative(S(3)) == S(6));
  CHECK(std::isnan(moxie::ReluSquared::value(std::numeric_limits<S>::quiet_NaN())));
}

TEST_CASE("GELU: the approximation is one") {
  const Matrix<double> x = points<double>(601, 6);
  const double difference = (value<moxie::GeluErf>(x) - value<moxie::GeluTanh>(x)).cwiseAbs().maxCoeff();
  CHECK(difference < 1e-3);
  CHECK(difference > 1e-5);
}

TEST_CASE_TEMPLATE("activations: far out they are 0 or x, their slopes 0 or 1, and nothing is NaN", S, float, double) {
  const auto check = [](auto activation) {
    using Activation = decltype(activation);
    Matrix<S> x(1, 6);
    x << S(-1e4), S(-200), S(-60), S(60), S(200), S(1e4);
    const Matrix<S> y = value<Activation>(x);
    const Matrix<S> d = derivative<Activation>(x);
    for (Index i = 0; i < 3; ++i) {
      CHECK(std::abs(double(y(0, i))) < 1e-20);
      CHECK(std::abs(double(d(0, i))) < 1e-20);
      CHECK(y(0, i + 3) == x(0, i + 3));
      CHECK(d(0, i + 3) == S(1));
    }
  };
  check(moxie::Silu{});
  check(moxie::GeluErf{});
  check(moxie::GeluTanh{});
  check(moxie::Relu{});
}

TEST_CASE_TEMPLATE("activation: values and derivatives of huge numbers are their limits, not NaN", S, float, double) {
  const auto check = [](auto activation, S x, S derivative) {
    using Activation = decltype(activation);
    S out = 0;
    moxie::kernel::map(
        1, &out, [](auto v) { return Activation::derivative(v); }, &x);
    CHECK(double(out) == doctest::Approx(double(derivative)));
    moxie::kernel::map(
        1, &out, [](auto v) { return Activation::value(v); }, &x);
    CHECK(double(out) == doctest::Approx(double(derivative) * double(x)));
  };
  for (const S x : {S(1e10), S(1e20), S(1e30)}) {
    check(moxie::Silu{}, x, S(1));
    check(moxie::GeluTanh{}, x, S(1));
    check(moxie::GeluErf{}, x, S(1));
    check(moxie::Silu{}, -x, S(0));
    check(moxie::GeluTanh{}, -x, S(0));
    check(moxie::GeluErf{}, -x, S(0));
  }
}

}  // namespace

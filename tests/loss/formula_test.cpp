// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/entropy.hpp>
#include <moxie/loss/formula.hpp>
#include <moxie/loss/importance.hpp>
#include <moxie/loss/z.hpp>
#include <support.hpp>

// The plain functions against the public ones of the CPU, and their slopes against central differences.
namespace {

using moxie::Index;
using moxie::Matrix;
namespace formula = moxie::formula;

// The difference quotient of f at x.
template <class F>
double slope(const F& f, double x) {
  const double h = 1e-5;
  return (f(x + h) - f(x - h)) / (2 * h);
}

TEST_CASE_TEMPLATE("formula: the logarithm of a sum of exponentials is z.hpp's, and does not overflow", S, float, double) {
  const Matrix<S> z = 200 * moxie::test::random<S>(1, 17, 1);
  CHECK(formula::log_sum_exp(17, z.data()) == moxie::log_sum_exp(std::span<const S>(z.data(), 17)));
  const S one[] = {S(-1000)};
  CHECK(formula::log_sum_exp(1, one) == -1000);
}

TEST_CASE("formula: the slope of the z-loss is that of the square of the logarithm") {
  Matrix<double> z = moxie::test::random<double>(1, 5, 2);
  for (Index i = 0; i < 5; ++i) {
    const double at = z(0, i);
    const double expected = slope(
        [&](double x) {
          z(0, i) = x;
          const double value = formula::log_sum_exp(5, z.data());
          return value * value;
        },
        at);
    z(0, i) = at;
    CHECK(formula::z_loss_slope(at, formula::log_sum_exp(5, z.data())) == doctest::Approx(expected).epsilon(1e-8));
  }
}

TEST_CASE("formula: entropy is a sum of its terms, with the slope of each; 0 has a slope, too") {
  const double p[] = {0.5, 0.3, 0.2, 0.0};
  double sum = 0;
  for (const double x : p) {
    sum += formula::entropy_term(x);
  }
  CHECK(sum == doctest::Approx(moxie::entropy(std::span<const double>(p))).epsilon(1e-15));
  CHECK(formula::entropy_term(0) == 0);
  CHECK(formula::entropy_slope<double>(0.3) == doctest::Approx(slope(&formula::entropy_term, 0.3)).epsilon(1e-8));
  CHECK(formula::entropy_slope<double>(0) == doctest::Approx(-std::log(std::numeric_limits<double>::min()) - 1));
  CHECK(formula::entropy_slope<float>(0) == doctest::Approx(-std::log(double(std::numeric_limits<float>::min())) - 1));
}

TEST_CASE("formula: frequencies are 1 for an even load, and sum to E") {
  CHECK(formula::frequency(6, 8, 48) == 1);
  CHECK(formula::frequency(48, 8, 48) == 8);
  CHECK(formula::sequence_factor(8, 2, 10) == doctest::Approx(8.0 / 200));
}

TEST_CASE("formula: the squared variation is importance.hpp's, with its slope; 0 of zeros") {
  std::array<double, 4> v{1.0, 2.5, 0.5, 4.0};
  const moxie::detail::Moments m(v);
  CHECK(formula::squared_variation(m.mean, m.variance) == moxie::squared_variation(v));
  auto gradient = v;
  moxie::squared_variation_backward(gradient);
  for (std::size_t i = 0; i < v.size(); ++i) {
    const double found = formula::squared_variation_slope(v[i], 4, m.mean, m.variance);
    CHECK(found == doctest::Approx(gradient[i]).epsilon(1e-14));
    auto w = v;
    CHECK(found == doctest::Approx(slope(
                                       [&](double x) {
                                         w[i] = x;
                                         return moxie::squared_variation(w);
                                       },
                                       v[i]))
                       .epsilon(1e-7));
  }
  CHECK(formula::squared_variation(0, 0) == 0);
  CHECK(formula::squared_variation_slope(0, 4, 0, 0) == 0);
}

TEST_CASE("formula: the density is the slope of the normal distribution") {
  CHECK(formula::normal_distribution(0) == 0.5);
  CHECK(formula::normal_distribution(1.96) == doctest::Approx(0.975).epsilon(1e-4));
  CHECK(formula::normal_distribution(-40) >= 0);
  for (const double u : {-2.0, -0.3, 0.0, 1.1}) {
    CHECK(formula::normal_density(u) == doctest::Approx(slope(&formula::normal_distribution, u)).epsilon(1e-8));
  }
}

TEST_CASE("formula: a bias moves up for less than the mean load, and not at it") {
  CHECK(formula::load_direction(1, 12, 4) == 1);
  CHECK(formula::load_direction(5, 12, 4) == -1);
  CHECK(formula::load_direction(3, 12, 4) == 0);
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <limits>
#include <moxie/kernel/math.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::test::Tolerance;
namespace kernel = moxie::kernel;

// f of one number as a plain one, and as the first of a vector.
template <class S, class F>
void check_same(const F& f, S x) {
  const S plain = f(x);
  S of_vector = 0;
  kernel::map(1, &of_vector, f, &x);
  CAPTURE(x);
  if (std::isnan(plain)) {
    CHECK(std::isnan(of_vector));
  } else if (std::isinf(plain)) {
    CHECK(of_vector == plain);
  } else {
    CHECK(std::abs(double(plain) - double(of_vector)) <= Tolerance<S>::function * std::max(1.0, std::abs(double(plain))));
  }
}

TEST_CASE_TEMPLATE("math: functions of plain numbers are those of vectors, far out and of NaN too", S, float, double) {
  std::vector<S> numbers{S(0), S(1e4), S(-1e4), S(1e30), S(-1e30), std::numeric_limits<S>::quiet_NaN()};
  for (S x = -60; x <= 60; x += S(0.37)) {
    numbers.push_back(x);
  }
  for (const S x : numbers) {
    check_same([](auto v) { return kernel::tanh(v); }, x);
    check_same([](auto v) { return kernel::erf(v); }, x);
    check_same([](auto v) { return kernel::sigmoid(v); }, x);
    check_same([](auto v) { return kernel::limited(v); }, std::isnan(x) ? S(0) : x);
    check_same([](auto v) { return kernel::clamp(v, kernel::constant<decltype(v)>(-2), kernel::constant<decltype(v)>(3)); }, x);
    check_same([](auto v) { return kernel::min(v, kernel::constant<decltype(v)>(1.5)); }, std::isnan(x) ? S(0) : x);
    check_same([](auto v) { return kernel::max(v, kernel::constant<decltype(v)>(1.5)); }, std::isnan(x) ? S(0) : x);
    check_same([](auto v) { return kernel::select(v > kernel::constant<decltype(v)>(0), v, -v); }, x);
    if (!(std::abs(x) < 60) || x < 20) {
      check_same([](auto v) { return kernel::exp(v); }, x);
    }
  }
}

TEST_CASE("math: sigmoid and clamp have the values of their formulas") {
  CHECK(kernel::sigmoid(0.0) == 0.5);
  CHECK(kernel::sigmoid(std::log(3.0)) == doctest::Approx(0.75).epsilon(1e-15));
  CHECK(kernel::sigmoid(-800.0F) == 0.0F);
  CHECK(kernel::clamp(5.0, -2.0, 3.0) == 3);
  CHECK(kernel::clamp(-5.0, -2.0, 3.0) == -2);
  CHECK(kernel::clamp(1.0, -2.0, 3.0) == 1);
  CHECK(std::isnan(kernel::clamp(std::numeric_limits<double>::quiet_NaN(), -2.0, 3.0)));
}

TEST_CASE("math: constants are rounded to the precision of the numbers") {
  CHECK(kernel::constant<float>(0.1) == 0.1F);
  CHECK(kernel::constant<double>(0.1) == 0.1);
  CHECK(kernel::constant<kernel::One<float>>(0.1).value == 0.1F);
}

}  // namespace

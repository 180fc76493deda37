// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/selection_bias.hpp>
#include <support.hpp>

namespace {

using moxie::Matrix;
using moxie::RowView;

TEST_CASE_TEMPLATE("selection bias: rises below the mean load, falls above it, stays at it", S, float, double) {
  Matrix<S> bias(1, 4);
  bias << S(1), S(2), S(3), S(4);
  const std::vector<std::int64_t> load{1, 3, 3, 5};
  moxie::update_selection_bias(RowView<S>(bias), load, 0.5);
  Matrix<S> expected(1, 4);
  expected << S(1.5), S(2), S(3), S(3.5);
  CHECK(bias == expected);
}

TEST_CASE("selection bias: compares exactly where the mean load is no whole number") {
  Matrix<double> bias = Matrix<double>::Zero(1, 3);
  const std::int64_t large = std::int64_t{1} << 54;  // doubles no longer tell neighbours apart
  const std::vector<std::int64_t> load{large, large + 1, large};
  moxie::update_selection_bias(RowView<double>(bias), load, 1);
  CHECK(bias(0, 0) == 1);
  CHECK(bias(0, 1) == -1);
  CHECK(bias(0, 2) == 1);
}

TEST_CASE("selection bias: recentred, its mean is zero") {
  Matrix<double> bias = moxie::test::random<double>(1, 5, 581);
  const std::vector<std::int64_t> load{9, 0, 1, 2, 3};
  moxie::update_selection_bias(RowView<double>(bias), load, 0.01, true);
  CHECK(std::abs(bias.mean()) < 1e-16);
}

TEST_CASE("selection bias: another number of experts is refused") {
  Matrix<double> bias = Matrix<double>::Zero(1, 3);
  const std::vector<std::int64_t> load(4, 1);
  CHECK_THROWS_AS(moxie::update_selection_bias(RowView<double>(bias), load, 0.1), moxie::ShapeError);
  const std::vector<std::int64_t> three(3, 1);
  CHECK_THROWS_AS(moxie::update_selection_bias(RowView<double>(bias), three, std::numeric_limits<double>::quiet_NaN()),
                  moxie::ValueError);
  CHECK((bias.array() == 0).all());
}

TEST_CASE("selection bias: a rate that is no ordinary number of the scalar is refused, and nothing is written") {
  Matrix<float> bias = moxie::test::untouched<float>(1, 2);
  const std::vector<std::int64_t> load{1, 3};
  for (const double rate : {1e300, 1e-300, std::nan("")}) {
    CHECK_THROWS_AS(moxie::update_selection_bias(RowView<float>(bias), load, rate), moxie::ValueError);
  }
  CHECK(moxie::test::is_untouched(bias));
}

}  // namespace

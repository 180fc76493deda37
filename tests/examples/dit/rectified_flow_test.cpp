// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/rectified_flow.hpp>
#include <moxie/core/random.hpp>

using dit::Index;
using dit::RectifiedFlow;
using dit::RowView;
using moxie::Matrix;
using moxie::Rng;

TEST_CASE("normal_quantile: the distribution function undoes it, and known values") {
  for (const double u : {1e-9, 1e-4, 0.025, 0.3, 0.5, 0.8, 0.975, 1 - 1e-6}) {
    CHECK(std::abs(0.5 * std::erfc(-dit::normal_quantile(u) / std::sqrt(2.0)) / u - 1) < 1e-12);
  }
  CHECK(std::abs(dit::normal_quantile(0.5)) < 1e-12);
  CHECK(dit::normal_quantile(0.975) == doctest::Approx(1.959963984540054));
}

TEST_CASE("RectifiedFlow: times are logit-normal or uniform, inside (0,1) whatever u is") {
  const RectifiedFlow logit;
  const RectifiedFlow uniform{false};
  double mean = 0;
  double square = 0;
  constexpr int n = 2000;
  for (int i = 0; i < n; ++i) {
    const double u = (i + 0.5) / n;
    const double t = logit.time(u);
    mean += std::log(t / (1 - t)) / n;
    square += std::log(t / (1 - t)) * std::log(t / (1 - t)) / n;
    CHECK(uniform.time(u) == u);
  }
  CHECK(std::abs(mean) < 1e-9);
  CHECK(std::abs(square - 1) < 1e-2);
  for (const RectifiedFlow& flow : {logit, uniform}) {
    CHECK(flow.time(0) > 0.0);
    CHECK(flow.time(1) < 1.0);
  }
}

TEST_CASE(
    "RectifiedFlow: the loss is the mean square, doutput its gradient, and outputs beyond the velocity have no part in it") {
  const Matrix<double> x = moxie::random_normal<double>(3, 4, Rng(1));
  const Matrix<double> z = moxie::random_normal<double>(3, 4, Rng(2));
  Matrix<double> v = moxie::random_normal<double>(3, 6, Rng(3));
  Matrix<double> dv(3, 6);
  const double loss = RectifiedFlow::loss<double>(x, z, v, 1, 0.7, dv);
  CHECK(loss == doctest::Approx((v.row(1).leftCols(4) - (z - x).row(1)).squaredNorm() / 4));
  for (Index j = 0; j < 6; ++j) {
    v(1, j) += 1e-6;
    const double up = RectifiedFlow::loss<double>(x, z, v, 1, 0.7, {});
    v(1, j) -= 2e-6;
    const double down = RectifiedFlow::loss<double>(x, z, v, 1, 0.7, {});
    v(1, j) += 1e-6;
    CHECK(std::abs(0.7 * (up - down) / 2e-6 - dv(1, j)) < 1e-8);
  }
}

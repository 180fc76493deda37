// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/entropy.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Matrix;

std::span<const double> span_of(const Matrix<double>& m) { return {m.data(), std::size_t(m.size())}; }

TEST_CASE("entropy: ln E for a uniform distribution, 0 for a certain one") {
  CHECK(moxie::entropy(span_of(Matrix<double>::Constant(1, 8, 0.125))) == doctest::Approx(std::log(8.0)).epsilon(1e-14));
  Matrix<double> certain = Matrix<double>::Zero(1, 4);
  certain(0, 2) = 1;
  CHECK(moxie::entropy(span_of(certain)) == 0);
}

TEST_CASE("entropy: backward matches central differences and adds; it is finite at 0") {
  Matrix<double> p = moxie::test::random<double>(1, 6, 571).cwiseAbs();
  const Matrix<double> start = moxie::test::random<double>(1, 6, 572);
  Matrix<double> dp = start;
  moxie::entropy_backward(span_of(p), 0.3, std::span<double>(dp.data(), 6));
  const auto report =
      moxie::testing::check_gradient([&] { return 0.3 * moxie::entropy(span_of(p)) + p.cwiseProduct(start).sum(); }, p, dp);
  INFO(report.message());
  CHECK(report.passes(moxie::test::gradient_tolerance));
  p.setZero();
  dp.setZero();
  moxie::entropy_backward(span_of(p), 1.0, std::span<double>(dp.data(), 6));
  CHECK(dp.allFinite());
}

TEST_CASE("entropy: a gradient of another size is refused") {
  const std::vector<double> p{0.5, 0.5};
  std::vector<double> dp{7};
  CHECK(moxie::test::message_of<moxie::ShapeError>([&] { moxie::entropy_backward(p, 1, std::span<double>(dp)); }) ==
        "entropy_backward: dp has 1 elements, expected 2");
  CHECK(dp[0] == 7);
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/load.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Matrix;
using moxie::RowView;

double loss_of(const Matrix<double>& z, const Matrix<double>& threshold, double deviation) {
  std::vector<double> scratch(std::size_t(z.cols()));
  return moxie::load_loss<double>(z, {threshold.data(), std::size_t(threshold.size())}, deviation, scratch);
}

TEST_CASE("load loss: 0 for equal logits, near E/K - 1 for K experts that always win") {
  CHECK(loss_of(Matrix<double>::Ones(6, 4), Matrix<double>::Constant(1, 6, 0.3), 0.5) == doctest::Approx(0).epsilon(1e-14));
  Matrix<double> z = Matrix<double>::Constant(6, 4, -100);
  z.leftCols(2).setConstant(100);
  CHECK(loss_of(z, Matrix<double>::Zero(1, 6), 0.5) == doctest::Approx(1).epsilon(1e-12));
}

TEST_CASE("load loss: backward matches central differences of logits and thresholds, and adds") {
  Matrix<double> z = moxie::test::random<double>(7, 5, 551);
  Matrix<double> threshold = moxie::test::random<double>(1, 7, 552);
  const Matrix<double> start = moxie::test::random<double>(7, 5, 553);
  const Matrix<double> start_threshold = moxie::test::random<double>(1, 7, 554);
  Matrix<double> dz = start, dthreshold = start_threshold;
  std::vector<double> scratch(5);
  moxie::load_loss_backward<double>(z, std::span<const double>(threshold.data(), 7), 0.6, 0.3,
                                    {dz, std::span<double>(dthreshold.data(), 7)}, scratch);
  const auto loss = [&] {
    return 0.3 * loss_of(z, threshold, 0.6) + z.cwiseProduct(start).sum() + threshold.cwiseProduct(start_threshold).sum();
  };
  for (const auto& report : {moxie::testing::check_gradient(loss, z, dz, {}, "logits"),
                             moxie::testing::check_gradient(loss, threshold, dthreshold, {}, "thresholds")}) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE("load loss: other sizes and a deviation that is not above 0 are refused") {
  const moxie::Matrix<double> z = moxie::test::random<double>(3, 4, 552);
  const std::vector<double> two(2), three(3);
  std::vector<double> scratch(4);
  const auto message = [&](const std::vector<double>& threshold, double deviation, std::vector<double> into) {
    return moxie::test::message_of<std::invalid_argument>(
        [&] { moxie::load_loss<double>(z, std::span<const double>(threshold), deviation, into); });
  };
  CHECK(message(three, 0.1, scratch) == "nothing was thrown");
  CHECK(message(two, 0.1, scratch) == "load_loss: threshold has 2 elements, expected 3");
  CHECK(message(three, 0.1, two) == "load_loss: scratch has 2 elements, expected 4");
  CHECK(message(three, 0, scratch) == "load_loss: the deviation must be above 0");
  CHECK(message(three, std::nan(""), scratch) == "load_loss: the deviation must be above 0");
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/importance.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Matrix;
using moxie::RowView;

double loss_of(const Matrix<double>& p) {
  std::vector<double> scratch(std::size_t(p.cols()));
  return moxie::importance_loss<double>(p, scratch);
}

TEST_CASE("importance loss: 0 for equal importance, E - 1 for one expert alone") {
  CHECK(loss_of(Matrix<double>::Constant(7, 4, 0.25)) == doctest::Approx(0).epsilon(1e-15));
  Matrix<double> one = Matrix<double>::Zero(7, 4);
  one.col(2).setOnes();
  CHECK(loss_of(one) == doctest::Approx(3).epsilon(1e-14));
  CHECK(loss_of(Matrix<double>::Zero(7, 4)) == 0);  // no importance at all
}

TEST_CASE("importance loss: is the variance over the squared mean, of the population") {
  const Matrix<double> p = moxie::test::random<double>(9, 5, 541).cwiseAbs();
  const Eigen::VectorXd sum = p.colwise().sum();
  const double variance = (sum.array() - sum.mean()).square().sum() / 5;
  CHECK(loss_of(p) == doctest::Approx(variance / (sum.mean() * sum.mean())).epsilon(1e-13));
}

TEST_CASE("importance loss: backward matches central differences and adds") {
  Matrix<double> p = moxie::test::random<double>(9, 5, 542).cwiseAbs();
  const Matrix<double> start = moxie::test::random<double>(9, 5, 543);
  Matrix<double> dp = start;
  std::vector<double> scratch(5);
  moxie::importance_loss_backward(RowView<const double>(p), 0.3, RowView<double>(dp), scratch);
  const auto report = moxie::testing::check_gradient([&] { return 0.3 * loss_of(p) + p.cwiseProduct(start).sum(); }, p, dp);
  INFO(report.message());
  CHECK(report.passes(moxie::test::gradient_tolerance));
}

TEST_CASE("squared variation: backward is zero where there is nothing") {
  std::vector<double> zero(3, 0.0);
  moxie::squared_variation_backward(zero);
  CHECK(zero == std::vector<double>(3, 0.0));
}

TEST_CASE("importance loss: other sizes are refused before anything is written") {
  const Matrix<double> p = moxie::test::random<double>(3, 4, 551);
  std::vector<double> small(3), scratch(4);
  Matrix<double> dp = moxie::test::untouched<double>(3, 5);
  using moxie::test::message_of;
  CHECK(message_of<moxie::ShapeError>([&] { moxie::importance_loss<double>(p, small); }) ==
        "importance_loss: scratch has 3 elements, expected 4");
  CHECK(message_of<moxie::ShapeError>([&] { moxie::importance_loss_backward(p, 1, RowView<double>(dp), scratch); }) ==
        "importance_loss_backward: dprobabilities is (3,5), expected (3,4)");
  CHECK(moxie::test::is_untouched(dp));
}

}  // namespace

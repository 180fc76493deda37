// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/z.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Matrix;

template <class S>
std::span<const S> span_of(const Matrix<S>& m) {
  return {m.data(), std::size_t(m.size())};
}

TEST_CASE_TEMPLATE("z-loss: (ln E)² for logits of zero, c² for a shift by c of one logit", S, float, double) {
  const Matrix<S> zero = Matrix<S>::Zero(1, 8);
  CHECK(moxie::z_loss(span_of(zero)) == doctest::Approx(std::log(8.0) * std::log(8.0)).epsilon(1e-14));
  const Matrix<S> one = Matrix<S>::Constant(1, 1, S(-3));
  CHECK(moxie::z_loss(span_of(one)) == doctest::Approx(9).epsilon(1e-14));
}

TEST_CASE("z-loss: large logits do not overflow") {
  Matrix<float> z = Matrix<float>::Constant(1, 3, 1e30F);
  CHECK(moxie::z_loss(span_of(z)) == doctest::Approx(1e60).epsilon(1e-5));
  z.setConstant(-1e30F);
  CHECK(moxie::z_loss(span_of(z)) == doctest::Approx(1e60).epsilon(1e-5));
}

TEST_CASE("z-loss: backward matches central differences and adds") {
  Matrix<double> z = moxie::test::random<double>(1, 6, 561);
  const Matrix<double> start = moxie::test::random<double>(1, 6, 562);
  Matrix<double> dz = start;
  moxie::z_loss_backward(span_of(z), 0.3, std::span<double>(dz.data(), 6));
  const auto report =
      moxie::testing::check_gradient([&] { return 0.3 * moxie::z_loss(span_of(z)) + z.cwiseProduct(start).sum(); }, z, dz);
  INFO(report.message());
  CHECK(report.passes(moxie::test::gradient_tolerance));
}

TEST_CASE("z-loss: no logits and a gradient of another size are refused") {
  const std::vector<double> z{1, 2};
  std::vector<double> dz{7};
  using moxie::test::message_of;
  CHECK(message_of<moxie::ShapeError>([] { moxie::z_loss(std::span<const double>()); }) == "log_sum_exp: there are no logits");
  CHECK(message_of<moxie::ShapeError>([&] { moxie::z_loss_backward(z, 1, std::span<double>(dz)); }) ==
        "z_loss_backward: dlogits has 1 elements, expected 2");
  CHECK(dz[0] == 7);
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/top_k_moe.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::testing::check_gradient;
using moxie::testing::GradientReport;

// f(v) = Σ_ij c_ij sin(v_ij) + v_00 v_01
struct Wave {
  Matrix<double> v = moxie::test::random<double>(3, 4, 1);
  Matrix<double> c = moxie::test::random<double>(3, 4, 2);
  double operator()() const { return (c.array() * v.array().sin()).sum() + v(0, 0) * v(0, 1); }
  Matrix<double> gradient() const {
    Matrix<double> g = c.array() * v.array().cos();
    g(0, 0) += v(0, 1);
    g(0, 1) += v(0, 0);
    return g;
  }
};

TEST_CASE("gradient check: a right gradient agrees to 1e-10") {
  Wave wave;
  const GradientReport report = check_gradient(wave, wave.v, wave.gradient());
  INFO(report.message());
  CHECK(report.checked == 12);
  CHECK(report.skipped == 0);
  CHECK(report.error < 1e-10);
  CHECK(report.passes(moxie::test::gradient_tolerance));
}

TEST_CASE("gradient check: the variables are as they were") {
  Wave wave;
  const Matrix<double> before = wave.v;
  check_gradient(wave, wave.v, wave.gradient());
  CHECK(moxie::test::same_bits(before, wave.v));
}

TEST_CASE("gradient check: one wrong element is found and named") {
  Wave wave;
  Matrix<double> wrong = wave.gradient();
  wrong(2, 1) += 1e-4;
  const GradientReport report = check_gradient(wave, wave.v, wrong, {}, "wave");
  CHECK_FALSE(report.passes(moxie::test::gradient_tolerance));
  CHECK(report.row == 2);
  CHECK(report.col == 1);
  CHECK(report.analytic == wrong(2, 1));
  CHECK(report.numeric == doctest::Approx(wave.gradient()(2, 1)));
  CHECK(moxie::test::contains(report.message(), "wave(2,1)"));
}

TEST_CASE("gradient check: a NaN in the gradient does not pass") {
  Wave wave;
  Matrix<double> wrong = wave.gradient();
  wrong(1, 1) = std::numeric_limits<double>::quiet_NaN();
  const GradientReport report = check_gradient(wave, wave.v, wrong);
  CHECK_FALSE(report.passes(1e100));
  CHECK(report.row == 1);
  CHECK(report.col == 1);
}

TEST_CASE("gradient check: zero where the function does not depend on the variable passes, anything else does not") {
  Matrix<double> v = moxie::test::random<double>(2, 2, 3);
  Matrix<double> gradient = Matrix<double>::Zero(2, 2);
  CHECK(check_gradient([] { return 3.0; }, v, gradient).passes(0));
  gradient(1, 0) = 1e-12;
  CHECK_FALSE(check_gradient([] { return 3.0; }, v, gradient).passes(0.99));
}

TEST_CASE("gradient check: an element where the function returns NaN is skipped, and does not pass") {
  Wave wave;
  const auto f = [&] { return wave.v(1, 2) == Wave{}.v(1, 2) ? wave() : std::numeric_limits<double>::quiet_NaN(); };
  const GradientReport report = check_gradient(f, wave.v, wave.gradient());
  CHECK(report.checked == 11);
  CHECK(report.skipped == 1);
  CHECK_FALSE(report.passes(1));
}

TEST_CASE("gradient check: a random subset has the size that was asked for, and depends on the stream") {
  Wave wave;
  Matrix<double> wrong = wave.gradient();
  wrong.row(0).setConstant(9);
  const GradientReport report = check_gradient(wave, wave.v, wrong, {.max_elements = 8, .rng = moxie::Rng(5)});
  CHECK(report.checked == 8);
  CHECK_FALSE(report.passes(moxie::test::gradient_tolerance));
}

TEST_CASE("gradient check: the order of the difference is four") {
  // The error of a polynomial of degree 5 is 4 h⁴ exactly; of degree 4 there is none but rounding.
  Matrix<double> v = Matrix<double>::Constant(1, 1, 1);
  const Matrix<double> five = Matrix<double>::Constant(1, 1, 5);
  const GradientReport report = check_gradient([&] { return std::pow(v(0, 0), 5); }, v, five, {.step = 0.1});
  CHECK(report.numeric - 5 == doctest::Approx(-4 * 1e-4));
  const Matrix<double> four = Matrix<double>::Constant(1, 1, 4);
  CHECK(check_gradient([&] { return std::pow(v(0, 0), 4); }, v, four, {.step = 0.1}).error < 1e-14);
}

TEST_CASE("gradient check: a gradient of another shape is refused") {
  Wave wave;
  const Matrix<double> other = Matrix<double>::Zero(4, 3);
  CHECK_THROWS_AS(check_gradient(wave, wave.v, other), moxie::ShapeError);
}

TEST_CASE("layer gradients: a change of the selection is reported instead of compared") {
  moxie::TopKMoE<double> layer({.model_dim = 2, .experts = 2, .top_k = 1, .expert = {.hidden_dim = 3}});
  moxie::test::randomize(layer.parameters(), 4);
  // Token 0 lies almost between the two experts: moving it moves the choice.
  layer.parameters()["gate.weight"].eigen() << 1, 0, 0, 1;
  Matrix<double> x(2, 2);
  x << 0.5, 0.50001, 2, -1;
  const Matrix<double> dy = moxie::test::random<double>(2, 2, 5);
  const auto reports = moxie::testing::check_layer_gradients(layer, {x}, dy);
  CHECK(reports.front().tensor == "x");
  CHECK(reports.front().skipped == 2);
  CHECK_FALSE(reports.front().passes(1));
  CHECK(moxie::testing::worst(reports).skipped > 0);
  // With a step below the margin everything is compared.
  const auto close = moxie::testing::check_layer_gradients(layer, {x}, dy, {}, {.step = 1e-6});
  for (const GradientReport& report : close) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE("layer gradients: every tensor has a report, and the layer's parameters are as they were") {
  moxie::TopKMoE<double> layer({.model_dim = 3, .experts = 2, .top_k = 2, .expert = {.hidden_dim = 2}});
  moxie::test::randomize(layer.parameters(), 6);
  const moxie::Parameters<double> before = layer.parameters();
  const Matrix<double> x = moxie::test::random<double>(4, 3, 7);
  const Matrix<double> dy = moxie::test::random<double>(4, 3, 8);
  const auto reports = moxie::testing::check_layer_gradients(layer, {x}, dy);
  CHECK(reports.size() == 1 + layer.layout().tensors().size());
  CHECK(reports[1].tensor == "gate.weight");
  CHECK((before.flat() == layer.parameters().flat()).all());
  Index checked = 0;
  for (const GradientReport& report : reports) {
    checked += report.checked;
  }
  CHECK(checked == x.size() + layer.parameters().count());
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <moxie/routing/score.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::test::Tolerance;

TEST_CASE_TEMPLATE("softmax: rows are exponentials over their sum", S, float, double) {
  for (const Index n : {1, 2, 5, 8, 9, 33}) {
    const Matrix<S> z = moxie::test::random<S>(70, n, 301, 3);
    Matrix<S> s = z;
    moxie::softmax_rows(RowView<S>(s), Exec{});
    Matrix<double> expected(70, n);
    for (Index t = 0; t < 70; ++t) {
      expected.row(t) = moxie::test::reference::softmax(z.row(t).template cast<double>().transpose()).transpose();
    }
    CHECK(moxie::test::relative_error(s, expected) < Tolerance<S>::function);
  }
}

TEST_CASE_TEMPLATE("softmax: does not overflow, and a constant added to a row changes nothing much", S, float, double) {
  Matrix<S> s(4, 3);
  s << 1000, 1000, -1000, S(-1e30), S(-1e30), S(-1e30), S(1e30), 0, S(-1e30), 88, 89, 90;
  moxie::softmax_rows(RowView<S>(s), Exec{});
  CHECK(s.allFinite());
  CHECK(s(0, 0) == S(0.5));
  CHECK(s(0, 2) == S(0));
  CHECK(s(1, 1) == doctest::Approx(1.0 / 3));
  CHECK(s(2, 0) == S(1));
  CHECK(s(3, 0) == doctest::Approx(std::exp(-2.0) / (1 + std::exp(-1.0) + std::exp(-2.0))).epsilon(1e-6));
}

TEST_CASE("softmax: a single column is exactly 1") {
  Matrix<float> s = moxie::test::random<float>(5, 1, 302);
  moxie::softmax_rows(RowView<float>(s), Exec{});
  CHECK((s.array() == 1).all());
}

TEST_CASE("softmax: backward matches central differences") {
  for (const Index n : {1, 2, 5, 9}) {
    Matrix<double> z = moxie::test::random<double>(7, n, 303);
    const Matrix<double> ds = moxie::test::random<double>(7, n, 304);
    Matrix<double> s = z;
    moxie::softmax_rows(RowView<double>(s), Exec{});
    Matrix<double> dz = ds;
    moxie::softmax_rows_backward(s, RowView<double>(dz), Exec{});
    const auto loss = [&] {
      Matrix<double> moved = z;
      moxie::softmax_rows(RowView<double>(moved), Exec{.threads = 1});
      return moved.cwiseProduct(ds).sum();
    };
    if (n == 1) {
      CHECK((dz.array() == 0).all());
    } else {
      const auto report = moxie::testing::check_gradient(loss, z, dz);
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE_TEMPLATE("softmax: the same bits for any number of threads", S, float, double) {
  const Matrix<S> z = moxie::test::random<S>(200, 13, 305);
  Matrix<S> one = z, many = z;
  moxie::softmax_rows(RowView<S>(one), Exec{1});
  moxie::softmax_rows(RowView<S>(many), Exec{7});
  CHECK(moxie::test::same_bits(one, many));
  Matrix<S> d_one = z, d_many = z;
  moxie::softmax_rows_backward(one, RowView<S>(d_one), Exec{1});
  moxie::softmax_rows_backward(one, RowView<S>(d_many), Exec{7});
  CHECK(moxie::test::same_bits(d_one, d_many));
}

TEST_CASE_TEMPLATE("sigmoid: is 1 / (1 + exp(-z)), and finite for huge logits", S, float, double) {
  Matrix<S> z = moxie::test::random<S>(3, 7, 307);
  z(0, 0) = std::numeric_limits<S>::max();
  z(0, 1) = -std::numeric_limits<S>::max();
  Matrix<S> s = z;
  moxie::sigmoid_rows(RowView<S>(s), Exec{});
  CHECK(s(0, 0) == S(1));
  CHECK(s(0, 1) == S(0));
  for (Index i = 2; i < z.size(); ++i) {
    CHECK(double(s.data()[i]) ==
          doctest::Approx(1 / (1 + std::exp(-double(z.data()[i])))).epsilon(moxie::test::Tolerance<S>::function));
  }
}

TEST_CASE("sigmoid: backward matches central differences") {
  Matrix<double> z = moxie::test::random<double>(4, 5, 308);
  const Matrix<double> c = moxie::test::random<double>(4, 5, 309);
  Matrix<double> s = z;
  moxie::sigmoid_rows(RowView<double>(s), Exec{});
  Matrix<double> dz = c;
  moxie::sigmoid_rows_backward(s, RowView<double>(dz), Exec{});
  const auto report = moxie::testing::check_gradient(
      [&] {
        Matrix<double> v = z;
        moxie::sigmoid_rows(RowView<double>(v), Exec{});
        return v.cwiseProduct(c).sum();
      },
      z, dz);
  INFO(report.message());
  CHECK(report.passes(moxie::test::gradient_tolerance));
}

TEST_CASE_TEMPLATE("softmax: a NaN makes its own row NaN, forward and backward, and reads nothing else", S, float, double) {
  const S nan = std::numeric_limits<S>::quiet_NaN();
  for (const Index n : {1, 3, 8, 17}) {
    Matrix<S> s = moxie::test::random<S>(3, n, 310);
    moxie::softmax_rows(RowView<S>(s), Exec{});
    const Matrix<S> ds = moxie::test::random<S>(3, n, 311);
    Matrix<S> expected = ds;
    moxie::softmax_rows_backward(s, RowView<S>(expected), Exec{});
    s(1, n / 2) = nan;
    const std::vector<S> exact(ds.row(1).begin(), ds.row(1).end());  // a sanitizer sees what is read behind it
    std::vector<S> dz = exact;
    moxie::softmax_rows_backward(RowView<const S>(s.row(1)), RowView<S>(dz.data(), 1, n), Exec{});
    CHECK(std::ranges::all_of(dz, [](S v) { return std::isnan(v); }));
    Matrix<S> all = ds;
    moxie::softmax_rows_backward(s, RowView<S>(all), Exec{});
    CHECK(moxie::test::same_bits<S>(all.row(0), expected.row(0)));
    CHECK(moxie::test::same_bits<S>(all.row(2), expected.row(2)));
    Matrix<S> z = moxie::test::random<S>(3, n, 310);
    z(1, n - 1) = nan;
    moxie::softmax_rows(RowView<S>(z), Exec{});
    CHECK(z.row(1).array().isNaN().all());
    CHECK(z.row(0).allFinite());
  }
}

TEST_CASE_TEMPLATE("scores: rows without columns, other shapes and overlaps are refused", S, float, double) {
  using moxie::ShapeError;
  using moxie::ValueError;
  using moxie::test::message_of;
  Matrix<S> none(3, 0);
  Matrix<S> a = moxie::test::random<S>(3, 4, 312);
  const Matrix<S> before = a;
  Matrix<S> b(3, 5), c(2, 4);
  const Exec exec;
  CHECK(message_of<ShapeError>([&] { moxie::softmax_rows(RowView<S>(none), exec); }) ==
        "softmax_rows: z is (3,0), expected at least one column");
  CHECK(message_of<ShapeError>([&] { moxie::softmax_rows_backward(none, RowView<S>(none), exec); }) ==
        "softmax_rows_backward: s is (3,0), expected at least one column");
  CHECK(message_of<ShapeError>([&] { moxie::softmax_rows(b, RowView<S>(a), exec); }) ==
        "softmax_rows: s is (3,4), expected (3,5)");
  CHECK(message_of<ShapeError>([&] { moxie::softmax_rows_backward(c, RowView<S>(a), exec); }) ==
        "softmax_rows_backward: ds is (3,4), expected (2,4)");
  CHECK(message_of<ShapeError>([&] { moxie::sigmoid_rows_backward(b, RowView<S>(a), exec); }) ==
        "sigmoid_rows_backward: ds is (3,4), expected (3,5)");
  CHECK(message_of<ShapeError>([&] { moxie::sigmoid_probabilities<S>(a, b, a, exec); }) ==
        "sigmoid_probabilities: s is (3,5), expected (3,4)");
  CHECK(message_of<ShapeError>([&] { moxie::sigmoid_probabilities_backward<S>(a, a, b, exec); }) ==
        "sigmoid_probabilities_backward: dp is (3,5), expected (3,4)");
  const RowView<S> first(a.data(), 2, 4), second(a.data() + 4, 2, 4);
  CHECK(message_of<ValueError>([&] { moxie::softmax_rows(first, second, exec); }) ==
        "softmax_rows: the matrices overlap, and are not the same");
  CHECK(moxie::test::same_bits(a, before));
  Matrix<S> empty(0, 0);
  moxie::softmax_rows(RowView<S>(empty), exec);
}

TEST_CASE_TEMPLATE("sigmoid scores over their sum: sum to 1 for any logits", S, float, double) {
  Matrix<S> z(4, 3);
  z << 0, 1, 2, S(-1e30), S(-1e30), S(-1e30), -200, -201, -202, 1000, -1000, 1000;
  Matrix<S> s = z;
  moxie::sigmoid_rows(RowView<S>(s), Exec{});
  Matrix<S> p = z;
  moxie::sigmoid_probabilities<S>(Matrix<S>(z), s, p, Exec{});
  for (Index t = 0; t < 4; ++t) {
    CHECK(p.row(t).sum() == doctest::Approx(1).epsilon(Tolerance<S>::sum));
  }
  CHECK(std::abs(p(0, 2) - s(0, 2) / s.row(0).sum()) <= S(Tolerance<S>::sum));
  CHECK(p(2, 0) == doctest::Approx(1 / (1 + std::exp(-1.0) + std::exp(-2.0))).epsilon(Tolerance<S>::function));
  CHECK(p(3, 0) == S(0.5));
}

TEST_CASE_TEMPLATE("logits: the first token with one that is not finite is named", S, float, double) {
  const S infinity = std::numeric_limits<S>::infinity();
  const auto check = [](const Matrix<S>& z) {
    return moxie::test::message_of<moxie::ValueError>([&] {
      moxie::detail::expect_finite_logits<S>(
          "f", z, [](Index t) { return t; }, Exec{});
    });
  };
  Matrix<S> z = moxie::test::random<S>(9, 3, 306);
  z(2, 1) = std::numeric_limits<S>::max();
  z(2, 2) = std::numeric_limits<S>::max();  // large, but finite
  CHECK(check(z) == "nothing was thrown");
  CHECK(check(Matrix<S>(0, 3)) == "nothing was thrown");
  for (const S bad : {std::numeric_limits<S>::quiet_NaN(), infinity, -infinity}) {
    Matrix<S> broken = z;
    broken(4, 2) = bad;
    broken(7, 0) = bad;
    CHECK(check(broken) == "f: the logits of token 4 are not finite");
  }
  Matrix<S> cancelling = z;
  cancelling(8, 0) = infinity;
  cancelling(8, 1) = -infinity;
  CHECK(check(cancelling) == "f: the logits of token 8 are not finite");
}

}  // namespace

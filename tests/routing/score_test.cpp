// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

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

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/cuda/product.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::cuda::DeviceExec;
using moxie::cuda::DeviceRows;
using moxie::cuda::Groups;
using moxie::cuda::Product;

template <class S>
DeviceRows<S> view(Matrix<S>& m) {
  return {m.data(), m.rows(), m.cols()};
}
template <class S>
DeviceRows<const S> view(const Matrix<S>& m) {
  return {m.data(), m.rows(), m.cols()};
}

const std::vector<int> starts{0, 3, 3, 10, 12};
const Groups groups{starts, starts.data()};

TEST_CASE_TEMPLATE("product: rows of each group times its block, plain and transposed, replaced and added", S, float, double) {
  DeviceExec exec;
  const Matrix<S> a = moxie::test::random<S>(12, 5, 1);
  const Matrix<S> plain = moxie::test::random<S>(4 * 5, 7, 2);
  const Matrix<S> turned = moxie::test::random<S>(4 * 7, 5, 3);
  for (const bool transposed : {false, true}) {
    for (const bool add : {false, true}) {
      Matrix<S> c = Matrix<S>::Ones(12, 7);
      Matrix<S> expected = add ? c : Matrix<S>::Zero(12, 7);
      const Matrix<S>& b = transposed ? turned : plain;
      const Index rows = transposed ? 7 : 5;
      moxie::cuda::multiply<S, S>(exec, groups,
                                  {.m = Product<S, S>::of_group,
                                   .n = 7,
                                   .k = 5,
                                   .a = rows_of(view(a)),
                                   .b = block_of(DeviceRows<const S>(b.data(), rows, b.cols()), rows * b.cols(), transposed),
                                   .c = rows_of(view(c)),
                                   .add = add});
      for (Index g = 0; g < 4; ++g) {
        const Matrix<S> block = b.middleRows(g * rows, rows);
        const Matrix<S> factor = transposed ? Matrix<S>(block.transpose()) : block;
        expected.middleRows(groups.begin(g), groups.rows(g)) += a.middleRows(groups.begin(g), groups.rows(g)) * factor;
      }
      CHECK(moxie::test::relative_error(c, expected) <= 10 * moxie::test::Tolerance<S>::sum);
    }
  }
}

TEST_CASE_TEMPLATE("product: rows of each group times its rows; of none the product is 0", S, float, double) {
  DeviceExec exec;
  const Matrix<S> a = moxie::test::random<S>(12, 5, 1);
  const Matrix<S> b = moxie::test::random<S>(12, 6, 2);
  for (const bool add : {false, true}) {
    Matrix<S> c = Matrix<S>::Ones(4 * 5, 6);
    Matrix<S> expected = add ? c : Matrix<S>::Zero(4 * 5, 6);
    moxie::cuda::multiply<S, S>(exec, groups,
                                {.m = 5,
                                 .n = 6,
                                 .k = Product<S, S>::of_group,
                                 .a = rows_of(view(a), true),
                                 .b = rows_of(view(b)),
                                 .c = block_of(DeviceRows<S>(c.data(), 5, 6), 30),
                                 .add = add});
    for (Index g = 0; g < 4; ++g) {
      expected.middleRows(5 * g, 5) +=
          a.middleRows(groups.begin(g), groups.rows(g)).transpose() * b.middleRows(groups.begin(g), groups.rows(g));
    }
    CHECK(moxie::test::relative_error(c, expected) <= 10 * moxie::test::Tolerance<S>::sum);
  }
}

TEST_CASE("product: part of the columns of a matrix, and a single product") {
  DeviceExec exec;
  const Matrix<double> a = moxie::test::random<double>(4, 6, 1);
  const Matrix<double> b = moxie::test::random<double>(3, 5, 2);
  Matrix<double> c = Matrix<double>::Ones(4, 10);
  moxie::cuda::multiply<double, double>(exec, {.m = 4,
                                               .n = 5,
                                               .k = 3,
                                               .a = block_of(view(a).middle_cols(2, 3), 0),
                                               .b = block_of(view(b), 0),
                                               .c = block_of(view(c).middle_cols(4, 5), 0)});
  Matrix<double> expected = Matrix<double>::Ones(4, 10);
  expected.middleCols(4, 5) = a.middleCols(2, 3) * b;
  CHECK(moxie::test::relative_error(c, expected) <= 10 * moxie::test::Tolerance<double>::sum);
}

TEST_CASE("product: BFloat16 is added in float, and the sum rounded where it becomes one") {
  using moxie::BFloat16;
  DeviceExec exec;
  std::vector<BFloat16> a, b;
  Matrix<float> expected = Matrix<float>::Zero(12, 4);
  const Matrix<float> x = moxie::test::random<float>(12, 8, 1);
  const Matrix<float> w = moxie::test::random<float>(4 * 8, 4, 2);
  const auto rounded = [](const Matrix<float>& m, std::vector<BFloat16>& out) {
    Matrix<float> r(m.rows(), m.cols());
    for (Index i = 0; i < m.size(); ++i) {
      out.push_back(BFloat16(m.data()[i]));
      r.data()[i] = float(out.back());
    }
    return r;
  };
  const Matrix<float> xr = rounded(x, a);
  const Matrix<float> wr = rounded(w, b);
  for (Index g = 0; g < 4; ++g) {
    expected.middleRows(groups.begin(g), groups.rows(g)) =
        xr.middleRows(groups.begin(g), groups.rows(g)) * wr.middleRows(8 * g, 8);
  }
  Matrix<float> c(12, 4);
  std::vector<BFloat16> short_c(12 * 4);
  const auto run = [&]<class Out>(Out* to) {
    moxie::cuda::multiply<BFloat16, Out>(exec, groups,
                                         {.m = Product<BFloat16, Out>::of_group,
                                          .n = 4,
                                          .k = 8,
                                          .a = rows_of(DeviceRows<const BFloat16>(a.data(), 12, 8)),
                                          .b = block_of(DeviceRows<const BFloat16>(b.data(), 8, 4), 32),
                                          .c = rows_of(DeviceRows<Out>(to, 12, 4))});
  };
  run(c.data());
  CHECK(moxie::test::relative_error(c, expected) <= 1e-6);
  run(short_c.data());
  for (Index i = 0; i < c.size(); ++i) {
    CHECK(float(short_c[std::size_t(i)]) == doctest::Approx(double(c.data()[i])).epsilon(0.004));
  }
}

TEST_CASE("product: over nothing it is 0, or adds nothing") {
  DeviceExec exec;
  for (const bool add : {false, true}) {
    Matrix<float> c = Matrix<float>::Constant(3, 4, 7);
    moxie::cuda::multiply<float, float>(exec, {.m = 3,
                                               .n = 4,
                                               .k = 0,
                                               .a = block_of(DeviceRows<const float>(nullptr, 3, 0), 0),
                                               .b = block_of(DeviceRows<const float>(nullptr, 0, 4), 0),
                                               .c = block_of(DeviceRows<float>(c.data(), 3, 4), 0),
                                               .add = add});
    CHECK((c.array() == (add ? 7.F : 0.F)).all());
  }
}

}  // namespace

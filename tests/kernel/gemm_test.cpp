// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/gemm.hpp>
#include <numeric>
#include <support.hpp>

namespace {

using moxie::BFloat16;
using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::test::Tolerance;
namespace kernel = moxie::kernel;

const Index sizes[] = {0, 1, 2, 5, 7, 12, 13, 33, 129};
// About the depth of one pass, 256, and twice that.
const Index depths[] = {0, 1, 3, 17, 255, 256, 257, 520};

// Error of each element against what a sum of k products in this precision may be off: relative to Σ |a| |b|.
template <class S>
double error_of(const Matrix<S>& c, const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& start) {
  double worst = 0;
  for (Index i = 0; i < c.rows(); ++i) {
    for (Index j = 0; j < c.cols(); ++j) {
      double sum = start(i, j);
      double size = std::abs(start(i, j)) + 1e-30;
      for (Index p = 0; p < a.cols(); ++p) {
        sum += a(i, p) * b(p, j);
        size += std::abs(a(i, p) * b(p, j));
      }
      const double error = std::abs(double(c(i, j)) - sum) / size;
      worst = error <= worst ? worst : error;
    }
  }
  return worst;
}

TEST_CASE_TEMPLATE("gemm: agrees with the sum of products for all shapes, transposes and destinations", S, float, double) {
  const Exec exec{.threads = 2};
  double worst = 0;
  for (const Index m : sizes) {
    for (const Index n : sizes) {
      for (const Index k : depths) {
        if (m * n * k > Index{129} * 33 * 257) {
          continue;  // tried below
        }
        const Matrix<S> a = moxie::test::random<S>(m, k, 101);
        const Matrix<S> b = moxie::test::random<S>(k, n, 102);
        const Matrix<S> at = a.transpose();
        const Matrix<S> bt = b.transpose();
        const Matrix<S> start = moxie::test::random<S>(m, n, 103);
        for (const bool transpose_a : {false, true}) {
          for (const bool transpose_b : {false, true}) {
            const bool add = transpose_a != transpose_b;
            Matrix<S> c = start;
            kernel::gemm<S>({m, n, k, transpose_a ? kernel::transposed<S>(at) : kernel::plain<S>(a),
                             transpose_b ? kernel::transposed<S>(bt) : kernel::plain<S>(b),
                             add ? kernel::add_to<S>(c) : kernel::replace<S>(c)},
                            exec);
            const Matrix<S> from = add ? start : Matrix<S>(Matrix<S>::Zero(m, n));
            const double error =
                error_of<S>(c, moxie::test::as_double(a), moxie::test::as_double(b), moxie::test::as_double(from));
            worst = error <= worst ? worst : error;
            if (!(error < Tolerance<S>::sum)) {
              CAPTURE(m);
              CAPTURE(n);
              CAPTURE(k);
              CAPTURE(transpose_a);
              CAPTURE(transpose_b);
              CHECK(error < Tolerance<S>::sum);
            }
          }
        }
      }
    }
  }
  CHECK(worst < Tolerance<S>::sum);
}

TEST_CASE_TEMPLATE("gemm: agrees with Eigen for a large product", S, float, double) {
  const Matrix<S> a = moxie::test::random<S>(301, 400, 104);
  const Matrix<S> b = moxie::test::random<S>(400, 530, 105);
  Matrix<S> c(301, 530);
  kernel::gemm<S>({301, 530, 400, kernel::plain<S>(a), kernel::plain<S>(b), kernel::replace<S>(c)}, Exec{});
  const Matrix<double> expected = moxie::test::as_double(a) * moxie::test::as_double(b);
  CHECK(moxie::test::relative_error(c, expected) < Tolerance<S>::sum);
}

TEST_CASE_TEMPLATE("gemm: rows of each operand and of the destination may be gathered", S, float, double) {
  for (const Index k : {11, 3}) {
    const Index m = 19, n = 37;
    const Matrix<S> a_rows = moxie::test::random<S>(40, k, 106);
    const Matrix<S> b_rows = moxie::test::random<S>(40, n, 107);
    const Matrix<S> at_rows = moxie::test::random<S>(40, m, 108);
    const Matrix<S> bt_rows = moxie::test::random<S>(40, k, 109);
    std::vector<Index> index_m, index_n, index_k;
    for (Index i = 0; i < 40; ++i) {
      index_m.push_back(i * 7 % 40);
      index_n.push_back(i * 11 % 40);
      index_k.push_back(i * 13 % 40);
    }
    const auto pick = [](const Matrix<S>& rows, const std::vector<Index>& index, Index count) {
      Matrix<double> out(count, rows.cols());
      for (Index i = 0; i < count; ++i) {
        out.row(i) = rows.row(index[std::size_t(i)]).template cast<double>();
      }
      return out;
    };
    const Matrix<double> a = pick(a_rows, index_m, m);
    const Matrix<double> b = pick(b_rows, index_k, k);
    for (const bool transpose_a : {false, true}) {
      for (const bool transpose_b : {false, true}) {
        Matrix<S> c = moxie::test::untouched<S>(40, n);
        kernel::gemm<S>(
            {m, n, k, transpose_a ? kernel::transposed<S>(at_rows, index_k.data()) : kernel::plain<S>(a_rows, index_m.data()),
             transpose_b ? kernel::transposed<S>(bt_rows, index_n.data()) : kernel::plain<S>(b_rows, index_k.data()),
             kernel::replace<S>(c, index_m.data())},
            Exec{});
        const Matrix<double> left = transpose_a ? Matrix<double>(pick(at_rows, index_k, k).transpose()) : a;
        const Matrix<double> right = transpose_b ? Matrix<double>(pick(bt_rows, index_n, n).transpose()) : b;
        const Matrix<double> expected = left * right;
        Matrix<S> gathered(m, n);
        for (Index i = 0; i < m; ++i) {
          gathered.row(i) = c.row(index_m[std::size_t(i)]);
          c.row(index_m[std::size_t(i)]).setConstant(-77);
        }
        CHECK(moxie::test::relative_error(gathered, expected) < Tolerance<S>::sum);
        CHECK(moxie::test::is_untouched(c));  // the other rows
      }
    }
  }
}

TEST_CASE_TEMPLATE("gemm: rows may lie apart, and what is between them stays as it is", S, float, double) {
  const Matrix<S> a = moxie::test::random<S>(20, 30, 110);
  const Matrix<S> b = moxie::test::random<S>(20, 30, 111);
  Matrix<S> c = moxie::test::untouched<S>(20, 30);
  kernel::gemm<S>({7, 13, 9, kernel::plain<S>(a.block(2, 3, 7, 9)), kernel::plain<S>(b.block(5, 8, 9, 13)),
                   kernel::replace<S>(c.block(4, 6, 7, 13))},
                  Exec{});
  const Matrix<double> expected = a.block(2, 3, 7, 9).template cast<double>() * b.block(5, 8, 9, 13).template cast<double>();
  CHECK(moxie::test::relative_error(Matrix<S>(c.block(4, 6, 7, 13)), expected) < Tolerance<S>::sum);
  c.block(4, 6, 7, 13).setConstant(-77);
  CHECK(moxie::test::is_untouched(c));
}

TEST_CASE("gemm: an empty sum is zero, or nothing added") {
  const Matrix<float> a(3, 0), b(0, 4);
  Matrix<float> c = moxie::test::untouched<float>(3, 4);
  kernel::gemm<float>({3, 4, 0, kernel::plain<float>(a), kernel::plain<float>(b), kernel::add_to<float>(c)}, Exec{});
  CHECK(moxie::test::is_untouched(c));
  kernel::gemm<float>({3, 4, 0, kernel::plain<float>(a), kernel::plain<float>(b), kernel::replace<float>(c)}, Exec{});
  CHECK((c.array() == 0).all());
}

TEST_CASE_TEMPLATE("gemm: a row and a column alone have the bits that they have in the batch", S, float, double) {
  const Index m = 45, n = 75, k = 1700;
  const Matrix<S> a = moxie::test::random<S>(m, k, 112);
  const Matrix<S> b = moxie::test::random<S>(k, n, 113);
  const Matrix<S> at = a.transpose();
  const Matrix<S> bt = b.transpose();
  Matrix<S> c(m, n);
  kernel::gemm<S>({m, n, k, kernel::plain<S>(a), kernel::plain<S>(b), kernel::replace<S>(c)}, Exec{});
  for (const Index i : {Index{0}, Index{6}, Index{31}, m - 1}) {
    Matrix<S> row(1, n);
    kernel::gemm<S>({1, n, k, kernel::plain<S>(a.middleRows(i, 1)), kernel::plain<S>(b), kernel::replace<S>(row)}, Exec{});
    CHECK(moxie::test::same_bits<S>(row, c.row(i)));
  }
  for (const Index j : {Index{0}, Index{9}, Index{64}, n - 1}) {
    Matrix<S> column(m, 1);
    kernel::gemm<S>({m, 1, k, kernel::plain<S>(a), kernel::plain<S>(b.middleCols(j, 1)), kernel::replace<S>(column)}, Exec{});
    CHECK(moxie::test::same_bits<S>(column, c.col(j)));
  }
  // Nor do the bits depend on how B lies in memory, packed beforehand or not; passes of a transposed A are shorter.
  Matrix<S> other(m, n);
  kernel::gemm<S>({m, n, k, kernel::plain<S>(a), kernel::transposed<S>(bt), kernel::replace<S>(other)}, Exec{});
  CHECK(moxie::test::same_bits(other, c));
  for (const auto& operand : {kernel::plain<S>(b), kernel::transposed<S>(bt)}) {
    kernel::Product<S> product{.m = m, .n = n, .k = k, .a = kernel::plain<S>(a), .b = operand, .c = kernel::replace<S>(other)};
    moxie::Buffer<S> panels(kernel::panels_size(product));
    kernel::prepack(product, panels.data());
    product.b = {};
    product.panels = panels.data();
    other.setZero();
    kernel::gemm(product, Exec{});
    CHECK(moxie::test::same_bits(other, c));
  }
  kernel::gemm<S>({m, n, k, kernel::transposed<S>(at), kernel::plain<S>(b), kernel::replace<S>(c)}, Exec{});
  kernel::gemm<S>({m, n, k, kernel::transposed<S>(at), kernel::transposed<S>(bt), kernel::replace<S>(other)}, Exec{});
  CHECK(moxie::test::same_bits(other, c));
  for (const Index i : {Index{0}, Index{13}, m - 1}) {
    Matrix<S> row(1, n);
    kernel::gemm<S>({1, n, k, kernel::transposed<S>(at.middleCols(i, 1)), kernel::plain<S>(b), kernel::replace<S>(row)},
                    Exec{});
    CHECK(moxie::test::same_bits<S>(row, c.row(i)));
  }
}

// Every depth and remainder, both factors plain or transposed, B rounded while it is packed or before.
TEST_CASE_TEMPLATE("gemm: of BFloat16 elements is the sum of their products, in float", Source, float, BFloat16) {
  using T = kernel::detail::RegisterTile<float, kernel::DefaultArch>;
  using P = kernel::Product<float, BFloat16>;
  double worst = 0;
  Index cases = 0;
  for (const Index m : {Index{1}, T::rows + 3, 5 * T::rows}) {
    for (const Index n : {Index{1}, T::cols + 3, 3 * T::cols}) {
      for (const Index k : {1, 2, 7, 64, 515, 3200}) {
        const Matrix<BFloat16> a = moxie::test::random<float>(m, k, 131).cast<BFloat16>();
        const Matrix<Source> b = moxie::test::random<float>(k, n, 132).cast<Source>();
        const Matrix<BFloat16> at = a.transpose();
        const Matrix<Source> bt = b.transpose();
        const Matrix<double> expected = a.cast<double>() * b.template cast<BFloat16>().template cast<double>();
        const Matrix<double> size =
            a.cast<double>().cwiseAbs() * b.template cast<BFloat16>().template cast<double>().cwiseAbs();
        for (const int way : {0, 1, 2, 3}) {
          Matrix<float> c(m, n), again(m, n);
          P product{.m = m,
                    .n = n,
                    .k = k,
                    .a = way % 2 == 0 ? kernel::plain<BFloat16>(a) : kernel::transposed<BFloat16>(at),
                    .b = way / 2 == 0 ? kernel::plain<Source>(b) : kernel::transposed<Source>(bt),
                    .c = kernel::replace<float>(c)};
          kernel::grouped_gemm<float>(
              1, [&](Index) { return product; }, Exec{});
          const double error = ((c.cast<double>() - expected).cwiseAbs().cwiseQuotient(size)).maxCoeff();
          worst = error <= worst ? worst : error;
          ++cases;
          moxie::Buffer<std::uint32_t> panels(kernel::panels_size(product));
          kernel::prepack(product, panels.data());
          product.b = {};
          product.panels = panels.data();
          product.c = kernel::replace<float>(again);
          kernel::grouped_gemm<float>(
              1, [&](Index) { return product; }, Exec{.threads = 3});
          CHECK(moxie::test::same_bits(again, c));
        }
      }
    }
  }
  CHECK(cases == 216);
  CHECK(worst < Tolerance<float>::sum);
}

// Two matrices on top of one another, a gap between them, as both factors and as the destination.
TEST_CASE_TEMPLATE("gemm: stacked rows are one matrix", S, float, double) {
  for (const Index k : {14, 3}) {
    const Index m = 29, n = 69;
    const Matrix<S> a = moxie::test::random<S>(m + 5, k, 121);
    const Matrix<S> b = moxie::test::random<S>(k + 3, n, 122);
    Matrix<S> c = moxie::test::untouched<S>(m + 2, n);
    const auto stack = [](auto view, Index top, Index rows, Index gap) {
      return kernel::stacked(view.middle_rows(0, top), view.middle_rows(top + gap, rows - top));
    };
    kernel::gemm<S>({m,
                     n,
                     k,
                     {stack(moxie::RowView<const S>(a), 4, m, 5)},
                     kernel::Operand<S>{stack(moxie::RowView<const S>(b), k / 2, k, 3)},
                     {stack(moxie::RowView<S>(c), 2, m, 2)}},
                    Exec{});
    Matrix<double> top_a(m, k), top_b(k, n);
    top_a << moxie::test::as_double(a).topRows(4), moxie::test::as_double(a).bottomRows(m - 4);
    top_b << moxie::test::as_double(b).topRows(k / 2), moxie::test::as_double(b).bottomRows(k - k / 2);
    const Matrix<double> expected = top_a * top_b;
    CHECK(moxie::test::relative_error(Matrix<S>(c.topRows(2)), Matrix<double>(expected.topRows(2))) < Tolerance<S>::sum);
    CHECK(moxie::test::relative_error(Matrix<S>(c.bottomRows(m - 2)), Matrix<double>(expected.bottomRows(m - 2))) <
          Tolerance<S>::sum);
    CHECK(moxie::test::is_untouched<S>(c.middleRows(2, 2)));
  }
}

TEST_CASE_TEMPLATE("gemm: the bits do not depend on the number of threads", S, float, double) {
  for (const auto& [m, n, k] : {std::array<Index, 3>{301, 130, 270}, {5, 700, 64}, {700, 3, 500}, {1, 1, 1000}}) {
    const Matrix<S> a = moxie::test::random<S>(m, k, 114);
    const Matrix<S> b = moxie::test::random<S>(k, n, 115);
    Matrix<S> expected = moxie::test::random<S>(m, n, 116);
    const Matrix<S> start = expected;
    kernel::gemm<S>({m, n, k, kernel::plain<S>(a), kernel::plain<S>(b), kernel::add_to<S>(expected)}, Exec{.threads = 1});
    for (const int threads : {2, 3, 7}) {
      Matrix<S> c = start;
      kernel::gemm<S>({m, n, k, kernel::plain<S>(a), kernel::plain<S>(b), kernel::add_to<S>(c)}, Exec{.threads = threads});
      CHECK(moxie::test::same_bits(c, expected));
    }
  }
}

TEST_CASE_TEMPLATE("grouped gemm: computes every product of a list, empty ones too", S, float, double) {
  const Index m[] = {3, 0, 40, 1, 130, 7};
  const Index n[] = {5, 9, 70, 1, 20, 0};
  const Index k[] = {4, 3, 10, 0, 300, 6};
  std::vector<Matrix<S>> a, b, c;
  for (std::size_t i = 0; i < 6; ++i) {
    a.push_back(moxie::test::random<S>(m[i], k[i], 120 + i));
    b.push_back(moxie::test::random<S>(k[i], n[i], 130 + i));
    c.push_back(moxie::test::untouched<S>(m[i], n[i]));
  }
  for (const int threads : {1, 4}) {
    for (Matrix<S>& product : c) {
      product.setConstant(-77);
    }
    kernel::grouped_gemm<S>(
        6,
        [&](Index index) -> kernel::Product<S> {
          const std::size_t i = std::size_t(index);
          return {m[i], n[i], k[i], kernel::plain<S>(a[i]), kernel::plain<S>(b[i]), kernel::replace<S>(c[i])};
        },
        Exec{threads});
    for (std::size_t i = 0; i < 6; ++i) {
      CAPTURE(i);
      const Matrix<double> expected = moxie::test::as_double(a[i]) * moxie::test::as_double(b[i]);
      CHECK(moxie::test::relative_error(c[i], expected) < Tolerance<S>::sum);
    }
  }
  kernel::grouped_gemm<S>(
      0, [](Index) -> kernel::Product<S> { return {}; }, Exec{});
}

TEST_CASE("gemm: zeros beyond the depth of a pass do not hide a NaN, and none appears") {
  Matrix<float> a = moxie::test::random<float>(9, 260, 140);
  const Matrix<float> b = moxie::test::random<float>(260, 9, 141);
  a(4, 258) = std::numeric_limits<float>::quiet_NaN();
  Matrix<float> c(9, 9);
  kernel::gemm<float>({9, 9, 260, kernel::plain<float>(a), kernel::plain<float>(b), kernel::replace<float>(c)}, Exec{});
  for (Index i = 0; i < 9; ++i) {
    CHECK(c.row(i).array().isNaN().all() == (i == 4));
    CHECK(c.row(i).array().isNaN().any() == (i == 4));
  }
}

}  // namespace

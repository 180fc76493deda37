// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/gemm.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::test::Tolerance;
namespace kernel = moxie::kernel;

// Rows that start with a cache line, and rows that do not, where nothing can be streamed.
TEST_CASE_TEMPLATE("epilogue: streaming writes what storing writes, and nothing more", S, float, double) {
  constexpr Index line = 64 / Index{sizeof(S)};
  for (const Index n : {Index{1}, Index{31}, Index{32}, Index{77}, Index{128}}) {
    for (const Index m : {Index{1}, Index{7}, Index{12}, Index{45}}) {
      const Index k = n == 77 ? 1600 : 30;  // in two passes
      const Matrix<S> a = moxie::test::random<S>(m, k, 160);
      const Matrix<S> at = a.transpose();
      const Matrix<S> b = moxie::test::random<S>(k, n, 161);
      const Matrix<S> bias = moxie::test::random<S>(1, n, 162);
      Matrix<S> expected = moxie::test::untouched<S>(m, n), expected_with_bias = expected;
      const auto compute = [&](kernel::Destination<S> c, kernel::Destination<S> with_bias) {
        const auto product = [&](kernel::Destination<S> to) {
          const auto left = n == 128 ? kernel::transposed<S>(at) : kernel::plain<S>(a);
          return kernel::Product<S>{m, n, k, left, kernel::plain<S>(b), to};
        };
        kernel::gemm<S>(product(c), Exec{.threads = 2});
        auto biased = product(with_bias);
        biased.bias = bias.data();
        kernel::gemm<S>(biased, Exec{.threads = 2});
      };
      compute(kernel::replace<S>(expected), kernel::replace<S>(expected_with_bias));
      for (const Index offset : {Index{0}, Index{1}, line}) {
        for (const Index stride : {(n + line - 1) / line * line, (n + line - 1) / line * line + 1}) {
          const Index size = offset + m * stride;
          moxie::Buffer<S> c(size), with_bias(size);
          std::fill_n(c.data(), size, S(-7));
          std::fill_n(with_bias.data(), size, S(-7));
          const auto streamed = [&](S* first) {
            const moxie::RowView<S> rows(first, m, n, stride);
            return kernel::Destination<S>{kernel::rows_of(rows),
                                          kernel::fill_lines<kernel::Batch<S>, 2> && kernel::on_lines(rows)
                                              ? kernel::Write::stream
                                              : kernel::Write::replace};
          };
          compute(streamed(c.data() + offset), streamed(with_bias.data() + offset));
          bool same = true;
          for (Index i = 0; i < size; ++i) {
            const Index r = (i - offset) / stride, col = (i - offset) % stride;
            const bool inside = i >= offset && col < n;
            same = same && c.data()[i] == (inside ? expected(r, col) : S(-7)) &&
                   with_bias.data()[i] == (inside ? expected_with_bias(r, col) : S(-7));
          }
          CHECK(same);
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("epilogue: stream_to streams large matrices whose rows start with cache lines", S, float, double) {
  constexpr Index line = 64 / Index{sizeof(S)};
  constexpr bool can = kernel::fill_lines<kernel::Batch<S>, 2>;
  const Index rows = kernel::l2_cache() / 16 / 64;  // as many lines as stay in the caches
  moxie::Buffer<S> memory((rows + 1) * (line + 1) + 1);
  const auto view = [&](Index offset, Index count, Index stride) {
    return moxie::RowView<S>(memory.data() + offset, count, line, stride);
  };
  CHECK((kernel::stream_to<S>(view(0, rows + 1, line)).write == kernel::Write::stream) == can);
  CHECK(kernel::stream_to<S>(view(0, rows, line)).write == kernel::Write::replace);
  CHECK(kernel::stream_to<S>(view(1, rows + 1, line)).write == kernel::Write::replace);
  CHECK(kernel::stream_to<S>(view(0, rows + 1, line + 1)).write == kernel::Write::replace);

  // A part is as far away as all of it.
  const auto part = kernel::stream_to<S>(view(0, rows + 1, line), 3);
  CHECK((part.write == kernel::Write::stream) == can);
  CHECK(part.row(0) == memory.data() + 3 * line);
  CHECK(part.row(2) == memory.data() + 5 * line);
}

template <class S>
struct Subtract {
  moxie::RowView<S> c;

  void apply(const kernel::TileSums<S>& tile) const {
    using V = kernel::Batch<S>;
    CHECK(tile.product == 0);
    for (Index r = 0; r < tile.rows; ++r) {
      const S* const sums = tile.of_row(r);
      kernel::store(V::load_aligned(sums) - V::load_aligned(sums + V::size), c.row(tile.row + r) + tile.col, tile.cols);
    }
  }
  void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<S>& tile) const {
    list.add(c.row(tile.row) + tile.col, c.stride(), tile.rows, tile.cols);
  }
};

// Columns j and n + j of B meet in a tile; this epilogue subtracts them: two sums, twice the tolerance of one.
TEST_CASE_TEMPLATE("epilogue: gate and up columns of B end side by side", S, float, double) {
  for (const Index n : {Index{1}, Index{7}, Index{16}, Index{45}}) {
    const Index m = 17, k = 1600;
    const Matrix<S> a = moxie::test::random<S>(m, k, 123);
    const Matrix<S> b = moxie::test::random<S>(k, 2 * n, 124);
    const Matrix<S> bt = b.transpose();
    const Matrix<double> both = moxie::test::as_double(a) * moxie::test::as_double(b);
    for (const bool transpose : {false, true}) {
      Matrix<S> c = moxie::test::untouched<S>(m, n);
      const Subtract<S> subtract{c};
      kernel::TaskGraph<S> graph;
      graph.add(
          1,
          [&](Index) -> kernel::Product<S> {
            return {.m = m,
                    .n = n,
                    .k = k,
                    .a = kernel::plain<S>(a),
                    .b = transpose ? kernel::transposed<S>(bt) : kernel::plain<S>(b),
                    .gated = true};
          },
          kernel::Epilogue<S>::of(subtract));
      graph.run(Exec{.threads = 2});
      CHECK(moxie::test::relative_error(c, Matrix<double>(both.leftCols(n) - both.rightCols(n))) < 2 * Tolerance<S>::sum);
    }
  }
}

}  // namespace

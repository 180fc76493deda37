// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstring>
#include <moxie/core/buffer.hpp>
#include <moxie/kernel/packing.hpp>
#include <support.hpp>

namespace {

using moxie::Buffer;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
namespace kernel = moxie::kernel;

TEST_CASE_TEMPLATE("packing: a square of every vector width is transposed", S, float, double) {
  const auto check = [](auto width) {
    constexpr Index n = decltype(width)::value;
    const Matrix<S> from = moxie::test::random<S>(n, 2 * n + 1, 201);
    const S* rows[std::size_t(n)];
    for (Index j = 0; j < n; ++j) {
      rows[j] = from.data() + j * from.cols();
    }
    Matrix<S> to = moxie::test::untouched<S>(n, n + 3);
    kernel::detail::transpose_square<S, n>(rows, n, to.data(), to.cols());
    CHECK((to.leftCols(n).array() == from.middleCols(n, n).transpose().array()).all());
    CHECK(moxie::test::is_untouched<S>(to.rightCols(3)));
  };
  check(std::integral_constant<Index, 1>{});
  check(std::integral_constant<Index, 2>{});
  check(std::integral_constant<Index, 4>{});
  check(std::integral_constant<Index, 8>{});
  check(std::integral_constant<Index, 16>{});
}

// Every element of B is in its panel, once; zeros, or repeated columns that nobody reads, elsewhere.
TEST_CASE_TEMPLATE("packing: panels hold the columns of B, one vector after the other, or gate beside up", S, float, double) {
  using P = kernel::Panels<S, kernel::DefaultArch>;
  constexpr Index width = P::T::width, cols = P::T::cols;
  for (const bool gated : {false, true}) {
    for (const Index n : {Index{1}, width - 1, width, width + 1, 3 * cols + 2}) {
      const P panels{n, gated};
      const Index all = gated ? 2 * n : n;
      for (const Index depth : {Index{1}, width, 5 * width + 3}) {
        const Index k0 = 4;
        const Matrix<S> b = moxie::test::random<S>(k0 + depth + 2, all, 202);
        const Matrix<S> bt = b.transpose();
        for (const auto& [transpose, later] : {std::pair{false, false}, std::pair{true, false}, std::pair{true, true}}) {
          const Index stride = depth * cols + 64;
          Buffer<S> out(panels.count() * stride);
          panels.pack(transpose ? kernel::transposed<S>(bt) : kernel::plain<S>(b), {0, panels.count(), k0, depth}, out.data(),
                      stride,
                      later ? panels.source(kernel::transposed<S>(bt), 0, 0, 0, bt.cols()) : kernel::detail::PrefetchRun{});
          Index wrong = 0;
          Index outputs = 0;
          for (Index q = 0; q < panels.count(); ++q) {
            outputs += panels.outputs_of(q);
            for (Index p = 0; p < depth; ++p) {
              for (Index j = 0; j < cols; ++j) {
                const Index half = gated ? j / width : 0;
                const Index column = gated ? q * width + j % width : q * cols + j;
                if (column < n && out[q * stride + p * cols + j] != b(k0 + p, half * n + column)) {
                  ++wrong;
                }
              }
            }
          }
          CHECK(wrong == 0);
          CHECK(outputs == n);
        }
      }
    }
  }
}

// Rows from k0 on, by an index or two matrices one on top of the other, as a tile reads them.
template <class S, class Element, class Source>
void check_fresh(const kernel::Rows<const Source>& rows, Index k0, Index depth, Index columns) {
  using Arch = kernel::DefaultArch;
  constexpr Index cols = kernel::detail::RegisterTile<S, Arch>::cols;
  constexpr Index elements = kernel::UnitOf<Element>::elements;
  const kernel::Operand<Source> b{rows};
  const kernel::Panels<S, Arch, Element> panels{columns, false};
  const Index steps = (depth + elements - 1) / elements;
  for (Index q = 0; q < columns / cols; ++q) {
    Buffer<kernel::Unit<Element>> packed(steps * cols), fresh(steps * cols), loaded(steps * cols);
    panels.pack(b, {q, 1, k0, depth}, packed.data(), steps * cols);
    const kernel::detail::PackingPanel<S, Element, Arch, Source> panel{b, k0, k0 + depth, q * cols, fresh.data()};
    for (Index step = 0; step < steps; ++step) {
      const auto vectors = panel.load(step);
      std::memcpy(loaded.data() + step * cols, vectors.data(), sizeof(vectors));
    }
    const auto bytes = std::size_t(steps * cols) * sizeof(kernel::Unit<Element>);
    CHECK(std::memcmp(packed.data(), fresh.data(), bytes) == 0);
    CHECK(std::memcmp(packed.data(), loaded.data(), bytes) == 0);
  }
}

TEST_CASE("packing: what the first tile packs on the way is what packing packs") {
  const auto check = []<class S, class Element, class Source>(S, Element, const Matrix<Source>& m) {
    const Index index[] = {3, 0, 8, 1, 7, 2, 5, 4, 6};
    for (const Index depth : {1, 2, 5}) {
      for (const Index k0 : {0, 2}) {
        check_fresh<S, Element, Source>({m.data(), m.cols()}, k0, depth, m.cols());
        check_fresh<S, Element, Source>({m.data(), m.cols(), index}, k0, depth, m.cols());
        check_fresh<S, Element, Source>({m.data(), m.cols(), nullptr, 3, m.cols()}, k0, depth, m.cols());
      }
    }
  };
  const Matrix<float> floats =
      moxie::test::random<float>(9, 3 * kernel::detail::RegisterTile<float, kernel::DefaultArch>::cols + 1, 211);
  const Matrix<moxie::BFloat16> halves = floats.cast<moxie::BFloat16>();
  check(0.0F, 0.0F, floats);
  check(0.0, 0.0, Matrix<double>(floats.cast<double>()));
  check(0.0F, moxie::BFloat16(), floats);
  check(0.0F, moxie::BFloat16(), halves);
}

TEST_CASE_TEMPLATE("packing: rows of a transposed A are cut into tiles, padded with zeros", S, float, double) {
  using T = kernel::detail::RegisterTile<S, kernel::DefaultArch>;
  const Index depth = 9, k0 = 2, m0 = 3;
  const Matrix<S> a = moxie::test::random<S>(k0 + depth + 1, m0 + 3 * T::rows, 203);
  for (const Index rows : {Index{1}, T::rows, T::rows + 1, 3 * T::rows}) {
    const Index tiles = (rows + T::rows - 1) / T::rows;
    const Index stride = depth * T::rows + 5;
    Buffer<S> out(tiles * stride);
    kernel::detail::pack_transposed_rows<S, kernel::DefaultArch>(kernel::transposed<S>(a), k0, depth, m0, rows, out.data(),
                                                                 stride);
    for (Index i = 0; i < tiles * T::rows; ++i) {
      for (Index p = 0; p < depth; ++p) {
        CHECK(out[i / T::rows * stride + p * T::rows + i % T::rows] == (i < rows ? a(k0 + p, m0 + i) : S(0)));
      }
    }
  }
}

TEST_CASE_TEMPLATE("packing: a vector's memory is a run, where it lies at equal distances", S, float, double) {
  using P = kernel::Panels<S, kernel::DefaultArch>;
  constexpr Index width = P::T::width;
  constexpr std::ptrdiff_t size = sizeof(S);
  const Index n = 4 * width + 1;
  const Index depth = 11;
  const Matrix<S> b = moxie::test::random<S>(depth, 2 * n, 205);
  const Matrix<S> bt = b.transpose();
  const auto bytes = [](const S* p) { return reinterpret_cast<const std::byte*>(p); };
  for (const bool gated : {false, true}) {
    const P panels{n, gated};
    for (Index q = 0; q < panels.count(); ++q) {
      for (Index v = 0; v < 2; ++v) {
        const auto [column, columns] = panels.vector(q, v);
        const auto rows = panels.source(kernel::plain<S>(b), q, v, 3, 5);
        const auto cols = panels.source(kernel::transposed<S>(bt), q, v, 0, depth);
        CHECK(panels.source(kernel::transposed<S>(bt), q, v, 0, depth - 1).lines == 0);  // with holes
        if (columns == 0) {
          CHECK(rows.lines == 0);
          CHECK(cols.lines == 0);
          continue;
        }
        CHECK(rows.from == bytes(&b(3, column)));
        CHECK(rows.pitch == 2 * n * size);
        CHECK(rows.lines == 5);
        CHECK(cols.from == bytes(&bt(column, 0)));
        CHECK(cols.pitch <= 64);
        CHECK(cols.pitch * cols.lines >= columns * depth * size);
        CHECK(cols.pitch * (cols.lines - 1) < columns * depth * size);
      }
    }
  }
  const P panels{2 * n, false};
  const Index index[] = {1, 2, 3};
  CHECK(panels.source(kernel::plain<S>(b, index), 0, 0, 0, 3).lines == 0);
  const RowView<const S> view(b);
  const kernel::Operand<S> stacked{kernel::stacked(view.middle_rows(0, 4), view.middle_rows(6, 5))};
  CHECK(panels.source(stacked, 0, 0, 1, 8).lines == 3);  // up to the gap
  const auto beyond = panels.source(stacked, 0, 0, 5, 4);
  CHECK(beyond.from == bytes(&b(7, 0)));
  CHECK(beyond.lines == 4);
}

TEST_CASE("packing: where a step takes two numbers, all lines of both are in the run") {
  using P = kernel::Panels<float, kernel::DefaultArch, moxie::BFloat16>;
  const Index steps = 6;
  const Matrix<float> b = moxie::test::random<float>(2 * steps, 2 * P::T::cols, 206);
  const Matrix<float> bt = b.transpose();
  const P panels{b.cols(), false};
  const auto rows = panels.source(kernel::plain<float>(b), 1, 1, 2, steps - 2);
  CHECK(rows.from == reinterpret_cast<const std::byte*>(&b(4, P::T::cols + P::T::width)));
  CHECK(rows.pitch == b.cols() * Index{sizeof(float)});
  CHECK(rows.lines == 2 * (steps - 2));
  const auto cols = panels.source(kernel::transposed<float>(bt), 1, 1, 0, steps);
  CHECK(cols.from == reinterpret_cast<const std::byte*>(&bt(P::T::cols + P::T::width, 0)));
  CHECK(cols.pitch <= 64);
  CHECK(cols.pitch * cols.lines == P::T::width * 2 * steps * Index{sizeof(float)});
  const RowView<const float> view(b);
  const kernel::Operand<float> stacked{kernel::stacked(view.middle_rows(0, 5), view.middle_rows(7, 5))};
  CHECK(panels.source(stacked, 0, 0, 1, 4).lines == 3);  // up to the gap, within a step
}

}  // namespace

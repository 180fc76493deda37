// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/rows.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::RowView;

// Rows of 7 numbers, which fill no vector, within rows of 11.
TEST_CASE_TEMPLATE("rows: are filled, copied and added to by stride, and what is between them stays", S, float, double) {
  const Index rows = 5, cols = 7, stride = 11;
  const Matrix<S> from = moxie::test::random<S>(rows, cols + 2, 221);
  const Matrix<S> start = moxie::test::random<S>(rows, stride, 222);
  const RowView<const S> source(from.data() + 1, rows, cols, from.cols());
  const auto check = [&](const auto& act, const auto& expected) {
    Matrix<S> m = start;
    act(RowView<S>(m.data() + 2, rows, cols, stride));
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < stride; ++j) {
        const bool inside = j >= 2 && j < 2 + cols;
        CHECK(m(i, j) == (inside ? expected(i, j - 2) : start(i, j)));
      }
    }
  };
  check([](RowView<S> m) { moxie::detail::fill_rows(m, S(3)); }, [](Index, Index) { return S(3); });
  check([&](RowView<S> m) { moxie::detail::copy_rows(source, m); }, [&](Index i, Index j) { return from(i, j + 1); });
  check([&](RowView<S> m) { moxie::detail::add_rows(source, m); },
        [&](Index i, Index j) { return start(i, j + 2) + from(i, j + 1); });
}

TEST_CASE("rows: of no rows or columns nothing is written") {
  Matrix<float> m = moxie::test::untouched<float>(2, 2);
  moxie::detail::fill_rows(RowView<float>(m.data(), 0, 2, 2), 1.0F);
  moxie::detail::fill_rows(RowView<float>(m.data(), 2, 0, 2), 1.0F);
  CHECK(moxie::test::is_untouched(m));
}

}  // namespace

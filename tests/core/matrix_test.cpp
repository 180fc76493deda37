// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/matrix.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::RowView;

using ColumnMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic>;

// A view never copies: what is not rows of contiguous elements of the same scalar does not convert.
static_assert(std::is_convertible_v<Matrix<float>&, RowView<float>>);
static_assert(std::is_convertible_v<Matrix<float>&, RowView<const float>>);
static_assert(std::is_convertible_v<const Matrix<float>&, RowView<const float>>);
static_assert(std::is_convertible_v<RowView<float>, RowView<const float>>);
static_assert(std::is_convertible_v<Eigen::RowVectorXf&, RowView<float>>);
static_assert(!std::is_convertible_v<const Matrix<float>&, RowView<float>>);
static_assert(!std::is_convertible_v<RowView<const float>, RowView<float>>);
static_assert(!std::is_convertible_v<Matrix<double>&, RowView<float>>);
static_assert(!std::is_convertible_v<RowView<double>, RowView<const float>>);
static_assert(!std::is_convertible_v<ColumnMajor&, RowView<float>>);
static_assert(!std::is_convertible_v<decltype(std::declval<Matrix<float>&>() * 2.0F), RowView<const float>>);
static_assert(!std::is_convertible_v<decltype(std::declval<Matrix<float>&>().transpose()), RowView<const float>>);
static_assert(std::is_convertible_v<decltype(std::declval<Matrix<float>&>().middleRows(0, 1)), RowView<float>>);
static_assert(std::is_convertible_v<decltype(std::declval<Matrix<float>&>().block(0, 0, 1, 1)), RowView<float>>);
static_assert(!std::is_convertible_v<decltype(std::declval<const Matrix<float>&>().middleRows(0, 1)), RowView<float>>);

Matrix<double> counted(Index rows, Index cols) {
  Matrix<double> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) {
    m.data()[i] = double(i);
  }
  return m;
}

TEST_CASE("row view: sees the matrix itself") {
  Matrix<double> m = counted(3, 4);
  const RowView<double> v = m;
  CHECK(v.data() == m.data());
  CHECK(v.rows() == 3);
  CHECK(v.cols() == 4);
  CHECK(v.size() == 12);
  CHECK(v(2, 1) == 9);
  v(2, 1) = -1;
  CHECK(m(2, 1) == -1);
  v.eigen() *= 2;
  CHECK(m(2, 3) == 22);
}

TEST_CASE("row view: of a block keeps the distance between rows") {
  Matrix<double> m = counted(5, 6);
  const RowView<double> v = m.block(1, 2, 3, 2);
  CHECK(v.stride() == 6);
  CHECK(v(0, 0) == 8);
  CHECK(v(2, 1) == 21);
  CHECK(*v.row(1) == 14);
  const RowView<double> rows = v.middle_rows(1, 2);
  CHECK(rows.rows() == 2);
  CHECK(rows(1, 0) == 20);
  CHECK(rows.eigen() == m.block(2, 2, 2, 2));
}

TEST_CASE("row view: of plain memory, and empty ones") {
  const double data[] = {1, 2, 3, 4, 5, 6};
  const RowView<const double> v(data, 2, 3);
  CHECK(v(1, 2) == 6);
  const RowView<const double> strided(data, 3, 1, 2);
  CHECK(strided(2, 0) == 5);
  const RowView<double> none;
  CHECK(none.size() == 0);
  Matrix<double> empty(0, 4);
  CHECK(RowView<double>(empty).rows() == 0);
  CHECK(RowView<double>(empty).cols() == 4);
}

TEST_CASE("overlaps: rows in reverse share what they reach, and are apart from each other") {
  Matrix<double> m = counted(6, 3);
  const RowView<double> all = m;
  const RowView<double> reversed(m.row(2).data(), 3, 3, -3);  // rows 2, 1, 0
  CHECK(overlaps(reversed, all.middle_rows(0, 1)));
  CHECK(overlaps(all.middle_rows(0, 1), reversed));
  CHECK_FALSE(overlaps(reversed, all.middle_rows(3, 3)));
  CHECK_FALSE(rows_overlap(reversed));
  CHECK(rows_overlap(RowView<double>(m.row(2).data(), 3, 3, -2)));
  CHECK(rows_overlap(RowView<double>(m.data(), 3, 3, 0)));
  CHECK(rows_overlap(RowView<double>(m.data(), 3, 3, 2)));
  CHECK_FALSE(rows_overlap(RowView<double>(m.data(), 1, 3, 0)));
}

TEST_CASE("overlaps: is about address ranges, and empty views overlap nothing") {
  using moxie::overlaps;
  Matrix<double> m = counted(6, 3);
  Matrix<double> other = counted(6, 3);
  const RowView<double> all = m;
  CHECK(overlaps(all, RowView<const double>(m)));
  CHECK(overlaps(all.middle_rows(0, 3), all.middle_rows(2, 3)));
  CHECK(overlaps(all.middle_rows(2, 1), all));
  CHECK_FALSE(overlaps(all.middle_rows(0, 3), all.middle_rows(3, 3)));
  CHECK_FALSE(overlaps(all.middle_rows(3, 3), all.middle_rows(0, 3)));
  CHECK_FALSE(overlaps(all, RowView<double>(other)));
  CHECK_FALSE(overlaps(all.middle_rows(2, 0), all));
  // Columns of one matrix.
  const auto cols = [&](Index first, Index n) { return RowView<double>(m.middleCols(first, n)); };
  CHECK_FALSE(overlaps(cols(0, 1), cols(1, 2)));
  CHECK_FALSE(overlaps(cols(1, 2), cols(0, 1)));
  CHECK(overlaps(cols(0, 2), cols(1, 1)));
  CHECK(overlaps(cols(1, 1), cols(0, 2)));
  CHECK(overlaps(cols(0, 1), RowView<double>(m.data() + 1, 4, 1, 2)));  // of another stride: element 3 is in both
  CHECK_FALSE(overlaps(cols(0, 1), RowView<double>(m.data() + 1, 2, 1, 1)));
}

}  // namespace

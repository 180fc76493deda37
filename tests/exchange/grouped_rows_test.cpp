// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/exchange/grouped_rows.hpp>
#include <support.hpp>

namespace {

using moxie::GroupedRows;
using moxie::Index;
using moxie::Matrix;

TEST_CASE("grouped rows: expert e owns the rows from its start to the next one's") {
  const Matrix<float> x = moxie::test::random<float>(7, 2, 801);
  const Index starts[] = {0, 3, 3, 7};
  const GroupedRows<float> rows{starts, x, nullptr};
  CHECK(rows.experts() == 3);
  CHECK(rows.count() == 7);
  CHECK(rows.count(0) == 3);
  CHECK(rows.count(1) == 0);
  CHECK(rows.begin(2) == 3);
  CHECK(rows.row(4) == x.data() + 8);
}

TEST_CASE("grouped rows: with an index, row r is the one that it names") {
  const Matrix<float> x = moxie::test::random<float>(4, 3, 802);
  const Index starts[] = {0, 5};
  const Index index[] = {3, 3, 0, 1, 2};
  const GroupedRows<float> rows{starts, x, index};
  CHECK(rows.count() == 5);
  CHECK(rows.row(1) == x.data() + 9);
  CHECK(rows.row(2) == x.data());
}

}  // namespace

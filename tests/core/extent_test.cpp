// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <moxie/core/extent.hpp>

namespace {

using moxie::Extent;
using moxie::overlaps;

TEST_CASE("extent: matrices share memory where their rows do, columns side by side do not") {
  std::array<float, 40> memory{};
  const float* m = memory.data();
  const Extent whole(m, 4, 10, 10);
  CHECK(overlaps(whole, whole));
  CHECK(overlaps(whole, Extent(m + 39, 1, 1, 1)));
  CHECK_FALSE(overlaps(Extent(m, 2, 10, 10), Extent(m + 20, 2, 10, 10)));
  CHECK(overlaps(Extent(m, 2, 10, 10), Extent(m + 19, 2, 10, 10)));
  CHECK_FALSE(overlaps(Extent(m, 4, 4, 10), Extent(m + 4, 4, 6, 10)));
  CHECK(overlaps(Extent(m, 4, 5, 10), Extent(m + 4, 4, 6, 10)));
  CHECK(overlaps(Extent(m + 8, 3, 5, 10), Extent(m, 4, 4, 10)));  // rows that go round into the next one's columns
  CHECK(overlaps(Extent(m, 4, 4, 10), Extent(m + 4, 7, 1, 5)));   // of another stride: what lies between counts
  CHECK_FALSE(overlaps(whole, Extent(m + 5, 0, 10, 10)));
  CHECK_FALSE(overlaps(whole, Extent(m + 5, 3, 0, 10)));
}

TEST_CASE("extent: elements may have other sizes") {
  std::array<double, 10> memory{};
  CHECK(overlaps(Extent(memory.data(), 1, 5, 5), Extent(reinterpret_cast<const float*>(memory.data()) + 9, 1, 1, 1)));
  CHECK_FALSE(overlaps(Extent(memory.data(), 1, 5, 5), Extent(reinterpret_cast<const float*>(memory.data()) + 10, 1, 1, 1)));
}

}  // namespace

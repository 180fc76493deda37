// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <moxie/core/extent.hpp>
#include <moxie/core/random.hpp>
#include <set>
#include <vector>

namespace {

using moxie::Extent;
using moxie::Index;
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
  CHECK(overlaps(Extent(m + 8, 3, 5, 10), Extent(m, 4, 4, 10)));       // rows that go round into the next one's columns
  CHECK_FALSE(overlaps(Extent(m, 4, 4, 10), Extent(m + 4, 7, 1, 5)));  // of another stride, in between
  CHECK(overlaps(Extent(m, 4, 4, 10), Extent(m + 4, 7, 1, 4)));
  CHECK_FALSE(overlaps(whole, Extent(m + 5, 0, 10, 10)));
  CHECK_FALSE(overlaps(whole, Extent(m + 5, 3, 0, 10)));
}

TEST_CASE("extent: elements may have other sizes") {
  std::array<double, 10> memory{};
  CHECK(overlaps(Extent(memory.data(), 1, 5, 5), Extent(reinterpret_cast<const float*>(memory.data()) + 9, 1, 1, 1)));
  CHECK_FALSE(overlaps(Extent(memory.data(), 1, 5, 5), Extent(reinterpret_cast<const float*>(memory.data()) + 10, 1, 1, 1)));
}

// The addresses of a matrix of bytes, one by one.
std::set<const char*> bytes_of(const char* data, Index rows, Index cols, Index stride) {
  std::set<const char*> out;
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) {
      out.insert(data + i * stride + j);
    }
  }
  return out;
}

TEST_CASE("extent: says exactly whether two matrices share a byte, for all signs and sizes of strides") {
  constexpr Index half = 200;
  std::array<char, 2 * half> memory{};
  int shared = 0;
  int apart = 0;
  for (std::uint64_t seed = 0; seed < 20000; ++seed) {
    const moxie::Rng rng(seed);
    struct View {
      const char* data;
      Index rows, cols, stride;
    };
    const auto draw = [&](std::uint64_t i) {
      return View{memory.data() + half - 20 + rng.below(40, 4 * i), rng.below(6, 4 * i + 1), rng.below(7, 4 * i + 2),
                  rng.below(25, 4 * i + 3) - 12};
    };
    const View a = draw(0);
    View b = draw(1);
    if (seed % 2 == 0) {
      b.stride = seed % 4 == 0 ? a.stride : -a.stride;
    }
    const std::set<const char*> of_a = bytes_of(a.data, a.rows, a.cols, a.stride);
    const std::set<const char*> of_b = bytes_of(b.data, b.rows, b.cols, b.stride);
    const bool expected = std::any_of(of_a.begin(), of_a.end(), [&](const char* byte) { return of_b.count(byte) != 0; });
    const Extent first(a.data, a.rows, a.cols, a.stride);
    const Extent second(b.data, b.rows, b.cols, b.stride);
    CAPTURE(seed);
    REQUIRE(overlaps(first, second) == expected);
    REQUIRE(overlaps(second, first) == expected);
    REQUIRE(first.empty() == of_a.empty());
    if (!of_a.empty()) {
      REQUIRE(first.begin == reinterpret_cast<std::uintptr_t>(*of_a.begin()));
      REQUIRE(first.end() == reinterpret_cast<std::uintptr_t>(*of_a.rbegin()) + 1);
    }
    ++(expected ? shared : apart);
  }
  CHECK(shared > 2000);
  CHECK(apart > 2000);
}

TEST_CASE("extent list: agrees with comparing all pairs") {
  std::vector<char> memory(2000);
  int shared = 0;
  int apart = 0;
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    const moxie::Rng rng(seed);
    const auto draw = [&](std::uint64_t which, Index n) {
      std::vector<moxie::Extent> extents;
      for (Index i = 0; i < n; ++i) {
        const moxie::Rng one = rng.split(which).split(std::uint64_t(i));
        extents.emplace_back(memory.data() + 500 + one.below(1000, 0), one.below(4, 1), one.below(12, 2),
                             one.below(81, 3) - 40);
      }
      return extents;
    };
    const auto a = draw(0, rng.below(20, 0));
    const auto b = draw(1, rng.below(8, 1));
    const auto any = [](const auto& list, const moxie::Extent& e) {
      return std::any_of(list.begin(), list.end(), [&](const moxie::Extent& other) { return overlaps(e, other); });
    };
    const moxie::ExtentList list_a(a);
    const moxie::ExtentList list_b(b);
    bool between = false;
    for (const moxie::Extent& e : b) {
      REQUIRE(list_a.overlaps(e) == any(a, e));
      between = between || any(a, e);
    }
    REQUIRE(list_a.overlaps(list_b) == between);
    REQUIRE(list_b.overlaps(list_a) == between);
    bool inside = false;
    for (std::size_t i = 0; i < a.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        inside = inside || overlaps(a[i], a[j]);
      }
    }
    REQUIRE(list_a.overlap_each_other() == inside);
    ++(between ? shared : apart);
  }
  CHECK(shared > 50);
  CHECK(apart > 50);
}

}  // namespace

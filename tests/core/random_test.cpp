// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <moxie/core/random.hpp>
#include <set>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Rng;
using Words = Rng::Words;

TEST_CASE("random: Philox4x32-10 gives the known answers of Random123") {
  // Counter (index low, index high, stream low, stream high), key (seed low, seed high).
  CHECK(Rng(0, 0).words(0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const std::uint64_t ones = ~std::uint64_t{0};
  CHECK(Rng(ones, ones).words(ones) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  // The digits of pi: counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0.
  CHECK(Rng(0x299f31d0a4093822, 0x0370734413198a2e).words(0x85a308d3243f6a88) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("random: a number is a function of seed, stream and index") {
  const Rng rng(7, 3);
  CHECK(rng.bits(5) == Rng(7, 3).bits(5));
  CHECK(rng.bits(5) != rng.bits(6));
  CHECK(rng.bits(5) != Rng(8, 3).bits(5));
  CHECK(rng.bits(5) != Rng(7, 4).bits(5));
  const Words w = rng.words(5);
  CHECK(rng.bits(5) == ((std::uint64_t{w[1]} << 32U) | w[0]));
}

TEST_CASE("random: children of different keys, and of different parents, differ") {
  std::set<std::uint64_t> first;
  for (std::uint64_t a = 0; a < 30; ++a) {
    first.insert(Rng(1).split(a).bits(0));
    for (std::uint64_t b = 0; b < 30; ++b) {
      first.insert(Rng(1).split(a).split(b).bits(0));
    }
  }
  CHECK(first.size() == 30 + 30 * 30);
  CHECK(first.count(Rng(1).bits(0)) == 0);
}

TEST_CASE("random: uniform numbers lie in [0, 1) and have the moments of the distribution") {
  const Rng rng(11);
  const Index n = 200000;
  double sum = 0, squares = 0, products = 0, last = 0.5;
  bool inside = true;
  for (Index i = 0; i < n; ++i) {
    const double u = rng.uniform(std::uint64_t(i));
    inside = inside && u >= 0 && u < 1;
    sum += u;
    squares += u * u;
    products += (u - 0.5) * (last - 0.5);
    last = u;
  }
  CHECK(inside);
  // Five deviations of each estimate.
  CHECK(std::abs(sum / double(n) - 0.5) < 5 * std::sqrt(1.0 / 12 / double(n)));
  CHECK(std::abs(squares / double(n) - 1.0 / 3) < 5 * std::sqrt(4.0 / 45 / double(n)));
  CHECK(std::abs(products / double(n)) < 5 * (1.0 / 12) / std::sqrt(double(n)));
}

TEST_CASE("random: normal numbers have the moments of the distribution") {
  const Rng rng(12);
  const Index n = 200000;
  double sum = 0, squares = 0, cubes = 0, fourths = 0;
  for (Index i = 0; i < n; ++i) {
    const double z = rng.normal(std::uint64_t(i));
    sum += z;
    squares += z * z;
    cubes += z * z * z;
    fourths += z * z * z * z;
  }
  const double root = std::sqrt(double(n));
  CHECK(std::abs(sum) / double(n) < 5 / root);
  CHECK(std::abs(squares / double(n) - 1) < 5 * std::sqrt(2.0) / root);
  CHECK(std::abs(cubes) / double(n) < 5 * std::sqrt(15.0) / root);
  CHECK(std::abs(fourths / double(n) - 3) < 5 * std::sqrt(96.0) / root);
}

TEST_CASE("random: below(n) is spread over 0, ..., n-1") {
  const Rng rng(13);
  std::vector<int> counts(7, 0);
  for (std::uint64_t i = 0; i < 70000; ++i) {
    const Index k = rng.below(7, i);
    REQUIRE(k >= 0);
    REQUIRE(k < 7);
    ++counts[std::size_t(k)];
  }
  for (const int count : counts) {
    CHECK(std::abs(count - 10000) < 5 * std::sqrt(70000.0 * 6 / 49));
  }
  CHECK(rng.below(1, 5) == 0);
}

TEST_CASE_TEMPLATE("random: element (i, j) of a matrix comes from index i cols + j, whatever the stride", S, float, double) {
  const Rng rng(14, 2);
  moxie::Matrix<S> wide = moxie::test::untouched<S>(4, 9);
  rng.fill_uniform(moxie::RowView<S>(wide.leftCols(5)), -2, 3);
  for (Index i = 0; i < 4; ++i) {
    for (Index j = 0; j < 5; ++j) {
      CHECK(wide(i, j) == S(-2 + 5 * rng.uniform(std::uint64_t(i * 5 + j))));
    }
  }
  CHECK((wide.rightCols(4).array() == S(-77)).all());
  const moxie::Matrix<S> normal = moxie::random_normal<S>(3, 2, rng, 0.5);
  CHECK(normal(2, 1) == S(0.5 * rng.normal(5)));
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <moxie/core/philox.hpp>

namespace {

namespace philox = moxie::philox;

bool are(const philox::Bits& b, std::uint64_t low, std::uint64_t high) { return b.low == low && b.high == high; }

TEST_CASE("philox: the bits are the known answers of Random123") {
  CHECK(are(philox::bits(0, 0, 0), 0xe169c58d6627e8d5, 0x9b00dbd8bc57ac4c));
  const std::uint64_t ones = ~std::uint64_t{0};
  CHECK(are(philox::bits(ones, ones, ones), 0x41c83b0e408f276d, 0x6d5451fda20bc7c6));
  // The digits of pi.
  CHECK(are(philox::bits(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88), 0x94fdccebd16cfe09, 0x24126ea15001e420));
}

TEST_CASE("philox: the least and the largest bits give uniform numbers of [0, 1), and normal ones that are finite") {
  const std::uint64_t ones = ~std::uint64_t{0};
  CHECK(philox::uniform({0, ones}) == 0);
  CHECK(philox::uniform({ones, 0}) == 1 - 0x1p-53);
  CHECK(philox::normal({0, 0}) == doctest::Approx(std::sqrt(2 * 54 * std::log(2.0))).epsilon(1e-14));
  CHECK(std::abs(philox::normal({ones, ones})) < 1e-7);
}

TEST_CASE("philox: a child's stream depends on its parent's and on the key") {
  CHECK(philox::child(1, 2) == philox::child(1, 2));
  CHECK(philox::child(1, 2) != philox::child(1, 3));
  CHECK(philox::child(1, 2) != philox::child(2, 2));
  CHECK(philox::child(0, 0) != 0);
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <moxie/kernel/element.hpp>
#include <support.hpp>
#include <vector>

namespace {

using moxie::BFloat16;
using moxie::Index;
namespace kernel = moxie::kernel;
using V = kernel::Batch<float>;
constexpr Index width = Index{V::size};

float from_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }
std::uint16_t bits_of(BFloat16 x) { return std::bit_cast<std::uint16_t>(x); }

TEST_CASE("BFloat16: vectors are rounded to the nearest, ties to even, as Eigen rounds one number") {
  std::vector<float> numbers = {0.0F,
                                -0.0F,
                                1.0F,
                                from_bits(0x3f808000),  // between 1 and the next one: to even, down
                                from_bits(0x3f818000),  // and up
                                from_bits(0x3f807fff),
                                from_bits(0x3f808001),
                                from_bits(0x7f7fffff),  // the largest float becomes infinity
                                std::numeric_limits<float>::infinity(),
                                -std::numeric_limits<float>::infinity()};
  for (std::uint32_t i = 0; i < 4000; ++i) {
    const float x = from_bits(i * 1'073'741u);
    if (std::isfinite(x) && std::abs(x) > 1e-37F) {
      numbers.push_back(x);
    }
  }
  Index wrong = 0;
  for (std::size_t i = 0; i + std::size_t(width) <= numbers.size(); i += std::size_t(width)) {
    std::vector<BFloat16> stored(static_cast<std::size_t>(width));
    kernel::store(V::load_unaligned(numbers.data() + i), stored.data(), width);
    for (std::size_t j = 0; j < stored.size(); ++j) {
      wrong += bits_of(stored[j]) == bits_of(BFloat16(numbers[i + j])) ? 0 : 1;
    }
  }
  CHECK(wrong == 0);
  BFloat16 nan[width];
  kernel::store(V(std::numeric_limits<float>::quiet_NaN()), nan, width);
  CHECK(std::isnan(float(nan[0])));
  kernel::store(V(from_bits(0x7f800001)), nan, width);  // whose upper half alone would be infinity
  CHECK(std::isnan(float(nan[0])));
}

TEST_CASE("BFloat16: parts of vectors are loaded with zeros after them, and stored alone") {
  std::vector<BFloat16> memory(static_cast<std::size_t>(width) + 2, BFloat16(7.0F));
  for (Index n = 0; n <= width + 1; ++n) {
    alignas(moxie::alignment) float out[width];
    kernel::load<V>(memory.data(), n).store_aligned(out);
    for (Index j = 0; j < width; ++j) {
      CHECK(out[j] == (j < n ? 7.0F : 0.0F));
    }
    if (n == 0) {
      continue;  // not for storing
    }
    std::vector<BFloat16> to(memory.size(), BFloat16(-1.0F));
    kernel::store(V(3.0F), to.data(), n);
    for (Index j = 0; j < Index(to.size()); ++j) {
      CHECK(float(to[std::size_t(j)]) == (j < std::min(n, width) ? 3.0F : -1.0F));
    }
  }
}

TEST_CASE_TEMPLATE("BFloat16: units hold two numbers of a row, or of two rows, the first one below", Source, float, BFloat16) {
  std::vector<Source> row(static_cast<std::size_t>(3 * width) + 12), other(row.size());
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = Source(float(i) + 1);
    other[i] = Source(-float(i) - 1);
  }
  const auto pair = [](float low, float high) {
    return std::uint32_t{bits_of(BFloat16(low))} | std::uint32_t{bits_of(BFloat16(high))} << 16U;
  };
  kernel::detail::Words<width> along;
  kernel::detail::units_along<BFloat16>(row.data() + 1, along);
  for (Index j = 0; j < width; ++j) {
    std::uint32_t unit = 0;
    std::memcpy(&unit, reinterpret_cast<const char*>(&along) + j * 4, 4);
    CHECK(unit == pair(float(2 * j + 2), float(2 * j + 3)));
  }
  CHECK(kernel::detail::unit<BFloat16>(row.data() + 3, 2) == pair(4, 5));
  CHECK(kernel::detail::unit<BFloat16>(row.data() + 3, 1) == pair(4, 0));
  for (const bool second : {true, false}) {
    for (const Index n : {width, width - 1, Index{0}}) {
      std::uint32_t across[width];
      kernel::detail::units_across<BFloat16, width>(std::array<const Source*, 2>{row.data(), second ? other.data() : nullptr},
                                                    n, across);
      for (Index j = 0; j < width; ++j) {
        CHECK(across[j] == (j < n ? pair(float(j + 1), second ? float(-j - 1) : 0.0F) : 0));
      }
    }
  }
  std::uint32_t rows[12];
  kernel::detail::units_across<BFloat16, 12>(std::array<const Source*, 2>{row.data(), other.data()}, 5, rows);
  CHECK(rows[4] == pair(5, -5));
  CHECK(rows[5] == 0);
}

TEST_CASE("BFloat16: a step adds the products of both numbers of a pair") {
  using Step = kernel::detail::Step<float, BFloat16, kernel::DefaultArch>;
  alignas(moxie::alignment) BFloat16 numbers[2 * width];
  for (Index j = 0; j < 2 * width; ++j) {
    numbers[j] = BFloat16(float(j) - 3);
  }
  const auto panel = Step::load(reinterpret_cast<const std::uint32_t*>(numbers));
  const BFloat16 pair[] = {BFloat16(0.5F), BFloat16(-4.0F)};
  const V sum = Step::add(Step::broadcast(kernel::detail::unit<BFloat16>(pair, 2)), panel, V(100.0F));
  alignas(moxie::alignment) float out[width];
  sum.store_aligned(out);
  for (Index j = 0; j < width; ++j) {
    CHECK(out[j] == 100 + 0.5F * float(2 * j - 3) - 4 * float(2 * j - 2));
  }
}

}  // namespace

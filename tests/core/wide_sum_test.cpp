// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/wide_sum.hpp>
#include <support.hpp>

namespace {

TEST_CASE("wide sum: keeps what a double would lose") {
  moxie::WideSum sum;
  sum += 1e17;
  for (int i = 0; i < 1000; ++i) {
    sum += 1.0;
  }
  sum += -1e17;
  CHECK(sum.value() == 1000);
}

TEST_CASE("wide sum: does not depend on how terms are grouped") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    moxie::WideSum whole, parts, part;
    for (std::uint64_t i = 0; i < 3000; ++i) {
      const double x = moxie::Rng(seed).normal(i) * std::exp(5 * moxie::Rng(seed + 99).normal(i));
      whole += x;
      part += x;
      if (moxie::Rng(seed).uniform(100000 + i) < 0.01) {
        parts += part;
        part = {};
      }
    }
    parts += part;
    CHECK(parts.value() == whole.value());
  }
}

}  // namespace

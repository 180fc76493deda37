// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/cache.hpp>

namespace {

TEST_CASE("cache: the second level is asked for once, and within what processors have") {
  const moxie::Index bytes = moxie::kernel::second_level_cache();
  CHECK(bytes >= moxie::Index{128} << 10);
  CHECK(bytes <= moxie::Index{2} << 20);
  CHECK(moxie::kernel::second_level_cache() == bytes);
}

}  // namespace

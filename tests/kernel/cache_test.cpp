// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <moxie/kernel/cache.hpp>

namespace {

TEST_CASE("cache: the second level is what the system says, within 128 KiB and 2 MiB") {
  const moxie::Index bytes = moxie::kernel::second_level_cache();
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const moxie::Index said = sysconf(_SC_LEVEL2_CACHE_SIZE); said > 0) {
    CHECK(bytes == std::clamp(said, moxie::Index{128} << 10, moxie::Index{2} << 20));
    return;
  }
#endif
  CHECK(bytes == moxie::Index{512} << 10);
}

}  // namespace

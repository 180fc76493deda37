// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/matrix.hpp>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace moxie::kernel {

/// Bytes of the second-level cache of a core, asked once, 128 KiB to 2 MiB; 512 KiB where the system does not say.
inline Index second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const Index bytes = [] {
    const long said = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return std::clamp(said > 0 ? Index{said} : Index{512} << 10, Index{128} << 10, Index{2} << 20);
  }();
  return bytes;
#else
  return Index{512} << 10;
#endif
}

}  // namespace moxie::kernel

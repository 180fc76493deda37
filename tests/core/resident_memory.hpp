// SPDX-License-Identifier: MIT
#pragma once

#include <allocations.hpp>
#include <cstddef>
#include <fstream>
#include <string>

namespace moxie::test {

/// KiB of memory that the process holds; 0 where the system does not say, and where a sanitizer holds more than the program.
/// So "it has not grown by more than" holds there too.
inline std::ptrdiff_t resident_kib() {
#if defined(__linux__) && !defined(MOXIE_TEST_SANITIZED)
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word == "VmRSS:") {
      std::ptrdiff_t kib = 0;
      status >> kib;
      return kib;
    }
  }
#endif
  return 0;
}

}  // namespace moxie::test

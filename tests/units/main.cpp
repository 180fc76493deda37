// SPDX-License-Identifier: MIT
// Prints the hash of each unit that is linked in, and calls them in both orders.
#include <cinttypes>
#include <cstdint>
#include <cstdio>

extern "C" [[gnu::weak]] std::uint64_t unit_a();
extern "C" [[gnu::weak]] std::uint64_t unit_b();

int main() {
  for (int round = 0; round < 2; ++round) {
    if (unit_a != nullptr && round == 0) {
      std::printf("a %016" PRIx64 "\n", unit_a());
    }
    if (unit_b != nullptr) {
      std::printf("b %016" PRIx64 "\n", unit_b());
    }
    if (unit_a != nullptr && round == 1) {
      std::printf("a %016" PRIx64 "\n", unit_a());
    }
  }
}

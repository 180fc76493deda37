// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <moxie/config.hpp>

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") as functions
/// of plain numbers, for host and device. `Rng` and `cuda::DeviceRng` use them.
namespace moxie::inline MOXIE_NAMESPACE::philox {

/// 128 random bits, the first word in the low half of `low`.
struct Bits {
  std::uint64_t low;
  std::uint64_t high;
};

/// The bits of counter (index, stream) under the key `seed`.
MOXIE_HOST_DEVICE inline Bits bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32U); };
  std::uint32_t c0 = low(index);
  std::uint32_t c1 = high(index);
  std::uint32_t c2 = low(stream);
  std::uint32_t c3 = high(stream);
  std::uint32_t k0 = low(seed);
  std::uint32_t k1 = high(seed);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c2;
    c0 = high(p1) ^ c1 ^ k0;
    c1 = low(p1);
    c2 = high(p0) ^ c3 ^ k1;
    c3 = low(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {std::uint64_t{c1} << 32U | c0, std::uint64_t{c3} << 32U | c2};
}

/// Uniform on [0, 1), 53 bits.
MOXIE_HOST_DEVICE inline double uniform(const Bits& b) { return double(b.low >> 11U) * 0x1p-53; }

/// Standard normal, by Box and Muller from the two halves of the bits.
MOXIE_HOST_DEVICE inline double normal(const Bits& b) {
  constexpr double two_pi = 6.283185307179586477;
  const double u = (double(b.low >> 11U) + 0.5) * 0x1p-53;  // in (0, 1)
  const double v = double(b.high >> 11U) * 0x1p-53;
  return std::sqrt(-2.0 * std::log(u)) * std::cos(two_pi * v);
}

/// The stream of a child: it depends on the parent's stream and on `key`, through the finaliser of SplitMix64.
MOXIE_HOST_DEVICE inline std::uint64_t child(std::uint64_t stream, std::uint64_t key) {
  const auto mix = [](std::uint64_t x) {
    x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27U)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31U);
  };
  return mix(stream + mix(key + 1));
}

}  // namespace moxie::inline MOXIE_NAMESPACE::philox

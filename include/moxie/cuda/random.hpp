// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/cuda/exec.hpp>

namespace moxie::cuda {
inline namespace MOXIE_CUDA_BACKEND {

/// The numbers of `moxie::Rng` (Philox4x32-10) on both sides: `DeviceRng(rng.seed(), rng.stream())` draws the same, normal ones
/// but for how log and cos are rounded.
class DeviceRng {
 public:
  DeviceRng() = default;
  DeviceRng(std::uint64_t seed, std::uint64_t stream) : seed_(seed), stream_(stream) {}

  std::uint64_t seed() const { return seed_; }
  std::uint64_t stream() const { return stream_; }
  /// An independent stream.
  DeviceRng split(std::uint64_t key) const { return DeviceRng(seed_, mix(stream_ + mix(key + 1))); }

  /// Uniform on [0, 1), 53 bits.
  MOXIE_HOST_DEVICE double uniform(std::uint64_t index) const { return double(words(index).low >> 11U) * 0x1p-53; }
  /// Standard normal, by Box and Muller.
  MOXIE_HOST_DEVICE double normal(std::uint64_t index) const {
    constexpr double two_pi = 6.283185307179586477;
    const Words w = words(index);
    const double u = (double(w.low >> 11U) + 0.5) * 0x1p-53;  // in (0, 1)
    const double v = double(w.high >> 11U) * 0x1p-53;
    return std::sqrt(-2.0 * std::log(u)) * std::cos(two_pi * v);
  }

 private:
  struct Words {
    std::uint64_t low, high;
  };
  MOXIE_HOST_DEVICE static std::uint32_t low(std::uint64_t x) { return std::uint32_t(x); }
  MOXIE_HOST_DEVICE static std::uint32_t high(std::uint64_t x) { return std::uint32_t(x >> 32U); }
  MOXIE_HOST_DEVICE Words words(std::uint64_t index) const {
    std::uint32_t c[] = {low(index), high(index), low(stream_), high(stream_)};
    std::uint32_t k0 = low(seed_);
    std::uint32_t k1 = high(seed_);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
      const std::uint32_t next[] = {high(p1) ^ c[1] ^ k0, low(p1), high(p0) ^ c[3] ^ k1, low(p0)};
      for (int i = 0; i < 4; ++i) {
        c[i] = next[i];
      }
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    return {std::uint64_t{c[1]} << 32U | c[0], std::uint64_t{c[3]} << 32U | c[2]};
  }
  static std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27U)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31U);
  }

  std::uint64_t seed_ = 0;
  std::uint64_t stream_ = 0;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::cuda

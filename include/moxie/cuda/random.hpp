// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/philox.hpp>
#include <moxie/cuda/exec.hpp>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

/// The numbers of `moxie::Rng` on both sides: `DeviceRng(rng.seed(), rng.stream())` draws the same. Normal numbers may differ
/// in the last digit, where a device rounds log and cos otherwise.
class DeviceRng {
 public:
  DeviceRng() = default;
  DeviceRng(std::uint64_t seed, std::uint64_t stream) : seed_(seed), stream_(stream) {}

  std::uint64_t seed() const { return seed_; }
  std::uint64_t stream() const { return stream_; }
  /// An independent stream.
  DeviceRng split(std::uint64_t key) const { return DeviceRng(seed_, philox::child(stream_, key)); }

  /// Uniform on [0, 1), 53 bits.
  MOXIE_HOST_DEVICE double uniform(std::uint64_t index) const { return philox::uniform(philox::bits(seed_, stream_, index)); }
  /// Standard normal, by Box and Muller.
  MOXIE_HOST_DEVICE double normal(std::uint64_t index) const { return philox::normal(philox::bits(seed_, stream_, index)); }

 private:
  std::uint64_t seed_ = 0;
  std::uint64_t stream_ = 0;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

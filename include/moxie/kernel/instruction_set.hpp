// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/simd.hpp>
#include <string_view>

/// A program runs the vector instructions that it was compiled for. A compiler's default is the
/// oldest set. Link `moxie::native` or pass -march to change it; these functions tell the result.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

struct InstructionSet {
  std::string_view name;  ///< xsimd's name
  int vector_bits = 0;
  bool fused_multiply_add = false;

  bool operator==(const InstructionSet&) const = default;
};

/// The instruction set of this program's kernels.
constexpr InstructionSet built_for() {
  constexpr int bits = 8 * int(sizeof(float)) * int(Batch<float>::size);
#if defined(__FMA__) || defined(__aarch64__)
  return {DefaultArch::name(), bits, true};
#else
  return {DefaultArch::name(), bits, false};
#endif
}

/// The best instruction set that this machine has: that of the build, or a larger one.
inline InstructionSet machine_offers() {
#if defined(__x86_64__) || defined(__i386__)
  const bool fma = __builtin_cpu_supports("fma") != 0;
  if (built_for().vector_bits < 512 && fma && __builtin_cpu_supports("avx512f") != 0 &&
      __builtin_cpu_supports("avx512cd") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
      __builtin_cpu_supports("avx512bw") != 0) {
    return {"avx512bw", 512, true};
  }
  if ((built_for().vector_bits < 256 || !built_for().fused_multiply_add) && fma && __builtin_cpu_supports("avx2") != 0) {
    return {"fma3+avx2", 256, true};
  }
#endif
  return built_for();
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

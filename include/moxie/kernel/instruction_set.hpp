// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/simd.hpp>
#include <string_view>

/// A program runs the vector instructions that it was compiled for, and a compiler's default is the oldest set: link
/// `moxie::native`, or pass -march, and ask here.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

struct InstructionSet {
  std::string_view name;  ///< of a vector's instructions, as xsimd calls them
  int vector_bits = 0;
  bool fused_multiply_add = false;

  bool operator==(const InstructionSet&) const = default;
};

/// What the kernels of this program use.
constexpr InstructionSet built_for() {
  constexpr int bits = 8 * int(sizeof(float)) * int(Batch<float>::size);
#if defined(__FMA__) || defined(__aarch64__)
  return {DefaultArch::name(), bits, true};
#else
  return {DefaultArch::name(), bits, false};
#endif
}

/// The best that kernels could use on this machine: what it was built for, or more.
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

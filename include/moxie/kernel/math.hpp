// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/number.hpp>

#if !defined(__CUDACC__)  // nvcc has no vectors and must not see those of the CPU
#include <moxie/kernel/simd.hpp>
#endif

/// Functions over V, where V is a number on the host, a number on a CUDA device, or a vector of the
/// CPU.
///
/// A function that serves all three calls these, as `kernel::NAME`: `constant<V>(1.5)`, `exp`,
/// `tanh`, `erf`, `sigmoid`, `min`, `max`, `limited` and `select(condition, where it holds,
/// elsewhere)`; and + - * / and comparisons. It is marked MOXIE_INLINE.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

/// x within ±1000, for smooth functions that are at their limits there. NaN becomes -1000 or stays
/// NaN, depending on V.
template <class V>
MOXIE_INLINE V limited(const V& x) {
  return (kernel::min)(constant<V>(1000), (kernel::max)(constant<V>(-1000), x));
}

/// 1 / (1 + e^-x).
template <class V>
MOXIE_INLINE V sigmoid(const V& x) {
  return constant<V>(1) / (constant<V>(1) + kernel::exp(-x));
}

/// x where lower <= x <= upper, else the nearer limit. NaN stays NaN.
template <class V>
MOXIE_INLINE V clamp(const V& x, const V& lower, const V& upper) {
  return kernel::select(x < lower, lower, kernel::select(x > upper, upper, x));
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

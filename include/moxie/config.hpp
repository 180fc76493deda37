// SPDX-License-Identifier: MIT
#pragma once

#include <cassert>
#include <moxie/version.hpp>

// The sums and `kernel::exp` depend on the order of floating-point operations, and the checks of logits on NaN. -ffast-math
// gives up both: values become wrong without a message (docs/numerics.md). So do three of the flags that it is made of, where
// the compiler tells them (clang does not tell -fassociative-math and -freciprocal-math).
#if !defined(MOXIE_ALLOW_FAST_MATH) &&                                                          \
    (defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
     (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__))
#error \
    "moxie: -ffast-math and its parts -fassociative-math, -freciprocal-math and -ffinite-math-only make results wrong; compile without them, or define MOXIE_ALLOW_FAST_MATH to try it all the same"
#endif

/// Everything lives in an inline namespace, which a user never writes. `MOXIE_VERSION_NAMESPACE` names the version: error types
/// live there, so that a `catch` sees those of any translation unit. `MOXIE_NAMESPACE` names the version and the instruction
/// set: all code lives there, since the linker keeps one of several inline functions of the same name. So translation units
/// that were compiled for different instruction sets, or with different versions, each keep their own code in one program, and
/// a layer that is passed from one to the other does not link.
#define MOXIE_JOIN_NAMES(a, b) a##b
#define MOXIE_JOIN(a, b) MOXIE_JOIN_NAMES(a, b)
#define MOXIE_VERSION_NAMESPACE                                                                  \
  MOXIE_JOIN(MOXIE_JOIN(MOXIE_JOIN(v, MOXIE_VERSION_MAJOR), MOXIE_JOIN(_, MOXIE_VERSION_MINOR)), \
             MOXIE_JOIN(_, MOXIE_VERSION_PATCH))

#if defined(MOXIE_SCALAR_KERNELS)
#define MOXIE_VECTORS _scalar
#elif defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512CD__)
#define MOXIE_VECTORS _avx512bw
#elif defined(__AVX512F__)
#define MOXIE_VECTORS _avx512f
#elif defined(__AVX2__)
#define MOXIE_VECTORS _avx2
#elif defined(__AVX__)
#define MOXIE_VECTORS _avx
#elif defined(__SSE4_2__)
#define MOXIE_VECTORS _sse4_2
#elif defined(__SSE4_1__)
#define MOXIE_VECTORS _sse4_1
#elif defined(__SSSE3__)
#define MOXIE_VECTORS _ssse3
#elif defined(__SSE3__)
#define MOXIE_VECTORS _sse3
#elif defined(__SSE2__)
#define MOXIE_VECTORS _sse2
#elif defined(__ARM_FEATURE_SVE)
#define MOXIE_VECTORS _sve
#elif defined(__aarch64__)
#define MOXIE_VECTORS _neon64
#elif defined(__ARM_NEON)
#define MOXIE_VECTORS _neon
#elif defined(__riscv_vector)
#define MOXIE_VECTORS _rvv
#elif defined(__wasm_simd128__)
#define MOXIE_VECTORS _wasm
#else
#define MOXIE_VECTORS _generic
#endif
#if defined(__FMA__)
#define MOXIE_MULTIPLY_ADD _fma
#else
#define MOXIE_MULTIPLY_ADD
#endif
#if defined(__AVX512BF16__)
#define MOXIE_PAIRS _bf16
#else
#define MOXIE_PAIRS
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define MOXIE_QUADS _vnni
#else
#define MOXIE_QUADS
#endif
#define MOXIE_NAMESPACE                                          \
  MOXIE_JOIN(MOXIE_JOIN(MOXIE_VERSION_NAMESPACE, MOXIE_VECTORS), \
             MOXIE_JOIN(MOXIE_MULTIPLY_ADD, MOXIE_JOIN(MOXIE_PAIRS, MOXIE_QUADS)))

/// Internal consistency only: what a caller can get wrong throws `ShapeError` or `ValueError` instead.
#ifndef MOXIE_ASSERT
#define MOXIE_ASSERT(condition) assert(condition)
#endif

/// A function that runs on the host and on a CUDA device. Other compilers than nvcc ignore it.
#if defined(__CUDACC__)
#define MOXIE_HOST_DEVICE __host__ __device__
#else
#define MOXIE_HOST_DEVICE
#endif

/// For small functions of vectors: a call would pass them through memory, and hide from the compiler what two of them share.
/// Such functions run on the device too.
#if defined(__CUDACC__)
#define MOXIE_INLINE __host__ __device__ __forceinline__
#else
#define MOXIE_INLINE [[gnu::always_inline]] inline
#endif

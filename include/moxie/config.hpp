// SPDX-License-Identifier: MIT
#pragma once

#include <cassert>

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

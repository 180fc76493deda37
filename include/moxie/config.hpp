// SPDX-License-Identifier: MIT
#pragma once

#include <cassert>

/// Internal consistency only: what a caller can get wrong throws `ShapeError` or `ValueError` instead.
#ifndef MOXIE_ASSERT
#define MOXIE_ASSERT(condition) assert(condition)
#endif

/// For small functions of vectors: a call would pass them through memory, and hide from the compiler what two of them share.
#define MOXIE_INLINE [[gnu::always_inline]] inline

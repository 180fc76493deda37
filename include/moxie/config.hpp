// SPDX-License-Identifier: MIT
#pragma once

#include <cassert>

/// Internal consistency only: what a caller can get wrong throws `ShapeError` or `ValueError` instead.
#ifndef MOXIE_ASSERT
#define MOXIE_ASSERT(condition) assert(condition)
#endif

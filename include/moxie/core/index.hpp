// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

namespace moxie {

/// Sizes and positions: signed, and as wide as a pointer. Eigen uses the same type.
using Index = std::ptrdiff_t;

}  // namespace moxie

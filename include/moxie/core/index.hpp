// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <moxie/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Sizes and positions: signed, and as wide as a pointer. Eigen uses the same type.
using Index = std::ptrdiff_t;

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE::kernel {

/// The effect of a product on its destination.
enum class Write {
  replace,
  add,     ///< accumulates
  stream,  ///< replaces by non-temporal stores, which bypass the caches; all rows must start with a cache line
};

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/activation.hpp>

/// An activation of one's own: one struct for the banks of the CPU in float, double and BFloat16, frozen or not, and for those
/// of the CUDA backend.
namespace moxie::test {

/// x σ(1.702 x): the other approximation of Hendrycks and Gimpel 2016, section 2, which CLIP uses.
struct QuickGelu {
  template <class V>
  MOXIE_INLINE static V value(V x) {
    return x * kernel::sigmoid(kernel::constant<V>(1.702) * x);
  }
  /// With s = σ(1.702 x): s (1 + 1.702 x (1 - s)).
  template <class V>
  MOXIE_INLINE static V derivative(V x) {
    const V one = kernel::constant<V>(1);
    const V scaled = kernel::constant<V>(1.702) * x;
    const V s = kernel::sigmoid(scaled);
    return s * (one + scaled * (one - s));
  }
};

}  // namespace moxie::test

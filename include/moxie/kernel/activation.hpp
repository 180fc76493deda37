// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/math.hpp>

/// Element-wise functions with their derivatives. An activation is a struct with two static
/// functions, `value(x)` and `derivative(x)`. They use the functions of `kernel/math.hpp`, so one
/// source serves numbers and vectors of any width: the banks of the CPU in float, double and
/// BFloat16, frozen or not, and those of the CUDA backend.
namespace moxie::inline MOXIE_NAMESPACE {

/// x σ(x). Elfwing et al. 2018; the gate of SwiGLU (Shazeer 2020).
struct Silu {
  template <class V>
  MOXIE_INLINE static V value(V x) {
    return x * kernel::sigmoid(x);
  }
  /// σ(x) (1 + x (1 - σ(x))).
  template <class V>
  MOXIE_INLINE static V derivative(V x) {
    const V one = kernel::constant<V>(1);
    const V s = kernel::sigmoid(x);
    return s * (one + x * (one - s));
  }
};

/// max(x, 0), NaN of NaN. The derivative at 0 is defined to be 0.
struct Relu {
  template <class V>
  MOXIE_INLINE static V value(V x) {
    const V zero = kernel::constant<V>(0);
    return kernel::select(x <= zero, zero, x);
  }
  /// 1 where x > 0, 0 elsewhere.
  template <class V>
  MOXIE_INLINE static V derivative(V x) {
    const V zero = kernel::constant<V>(0);
    return kernel::select(x > zero, kernel::constant<V>(1), zero);
  }
};

/// max(x, 0)², NaN of NaN. Squared ReLU: So et al. 2021, "Primer". Differentiable everywhere, 0 at 0.
struct ReluSquared {
  template <class V>
  MOXIE_INLINE static V value(V x) {
    const V positive = Relu::value(x);
    return positive * positive;
  }
  /// 2 max(x, 0).
  template <class V>
  MOXIE_INLINE static V derivative(V x) {
    return kernel::constant<V>(2) * Relu::value(x);
  }
};

/// x Φ(x) with the normal distribution function Φ. Hendrycks and Gimpel 2016.
struct GeluErf {
  template <class V>
  MOXIE_INLINE static V value(V x) {
    return x * distribution(x);
  }
  /// Φ(x) + x φ(x).
  template <class V>
  MOXIE_INLINE static V derivative(V x) {
    const V inverse_root_two_pi = kernel::constant<V>(0.39894228040143267794);
    return distribution(x) + x * inverse_root_two_pi * kernel::exp(kernel::constant<V>(-0.5) * x * x);
  }

 private:
  template <class V>
  MOXIE_INLINE static V distribution(V x) {
    const V inverse_root_two = kernel::constant<V>(0.70710678118654752440);
    return kernel::constant<V>(0.5) * (kernel::constant<V>(1) + kernel::erf(x * inverse_root_two));
  }
};

/// 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))): the approximation of the same paper, which DiT and flax use.
struct GeluTanh {
  template <class V>
  MOXIE_INLINE static V value(V x) {
    return kernel::constant<V>(0.5) * x * (kernel::constant<V>(1) + kernel::tanh(inner(x)));
  }
  /// With u = √(2/π) (x + 0.044715 x³): 0.5 (1 + tanh u) + 0.5 x (1 - tanh² u) u'.
  template <class V>
  MOXIE_INLINE static V derivative(V x) {
    const V one = kernel::constant<V>(1);
    const V half = kernel::constant<V>(0.5);
    const V th = kernel::tanh(inner(x));
    const V clamped = kernel::limited(x);  // beyond, the second term is 0 and x² would overflow
    const V slope = root_two_over_pi<V>() * (one + kernel::constant<V>(3 * cubic) * clamped * clamped);
    return half * (one + th) + half * clamped * (one - th * th) * slope;
  }

 private:
  static constexpr double cubic = 0.044715;

  template <class V>
  MOXIE_INLINE static V root_two_over_pi() {
    return kernel::constant<V>(0.79788456080286535588);
  }
  template <class V>
  MOXIE_INLINE static V inner(V x) {
    return root_two_over_pi<V>() * (x + kernel::constant<V>(cubic) * x * x * x);
  }
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/cuda/exec.hpp>

namespace moxie::cuda {
inline namespace MOXIE_CUDA_BACKEND {

/// x σ(x): what `moxie::Silu` is on the CPU. Those below are the others of `moxie/expert/activation.hpp`, a number at a time.
struct Silu {
  template <class S>
  MOXIE_HOST_DEVICE static S value(S x) {
    return x * sigmoid(x);
  }
  /// σ(x) (1 + x (1 - σ(x))).
  template <class S>
  MOXIE_HOST_DEVICE static S derivative(S x) {
    const S s = sigmoid(x);
    return s * (S(1) + x * (S(1) - s));
  }
  template <class S>
  MOXIE_HOST_DEVICE static S sigmoid(S x) {
    return S(1) / (S(1) + std::exp(-x));
  }
};

/// max(x, 0).
struct Relu {
  template <class S>
  MOXIE_HOST_DEVICE static S value(S x) {
    return x > S(0) ? x : S(0);
  }
  template <class S>
  MOXIE_HOST_DEVICE static S derivative(S x) {
    return x > S(0) ? S(1) : S(0);
  }
};

/// max(x, 0)².
struct ReluSquared {
  template <class S>
  MOXIE_HOST_DEVICE static S value(S x) {
    return Relu::value(x) * Relu::value(x);
  }
  template <class S>
  MOXIE_HOST_DEVICE static S derivative(S x) {
    return S(2) * Relu::value(x);
  }
};

/// x Φ(x).
struct GeluErf {
  template <class S>
  MOXIE_HOST_DEVICE static S value(S x) {
    return x * distribution(x);
  }
  /// Φ(x) + x φ(x).
  template <class S>
  MOXIE_HOST_DEVICE static S derivative(S x) {
    return distribution(x) + x * S(0.39894228040143267794) * std::exp(S(-0.5) * x * x);
  }

 private:
  template <class S>
  MOXIE_HOST_DEVICE static S distribution(S x) {
    return S(0.5) * (S(1) + std::erf(x * S(0.70710678118654752440)));
  }
};

/// 0.5 x (1 + tanh u), u = √(2/π) (x + 0.044715 x³).
struct GeluTanh {
  template <class S>
  MOXIE_HOST_DEVICE static S value(S x) {
    return S(0.5) * x * (S(1) + std::tanh(inner(x)));
  }
  /// 0.5 (1 + tanh u) + 0.5 x (1 - tanh² u) u'.
  template <class S>
  MOXIE_HOST_DEVICE static S derivative(S x) {
    const S th = std::tanh(inner(x));
    // Far out the second term is 0, and x² would overflow.
    const S clamped = x > S(1e4) ? S(1e4) : x < S(-1e4) ? S(-1e4) : x;
    const S slope = S(root_two_over_pi) * (S(1) + S(3 * cubic) * clamped * clamped);
    return S(0.5) * (S(1) + th) + S(0.5) * clamped * (S(1) - th * th) * slope;
  }

 private:
  static constexpr double cubic = 0.044715;
  static constexpr double root_two_over_pi = 0.79788456080286535588;

  template <class S>
  MOXIE_HOST_DEVICE static S inner(S x) {
    return S(root_two_over_pi) * (x + S(cubic) * x * x * x);
  }
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::cuda

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// The multiply-adds of matrix products in a forward, and in a backward for all gradients. A multiply-add is two floating-point
/// operations.
///
/// Sums over rows (the combine of a sparse plan), activations, softmaxes, norms and biases are left out. With `Keep::inputs` a
/// backward also repeats products of the experts' forward; a gradient that is absent saves a product.
struct Cost {
  double forward = 0;
  double backward = 0;

  Cost& operator+=(const Cost& other) {
    forward += other.forward;
    backward += other.backward;
    return *this;
  }
  friend Cost operator+(Cost a, const Cost& b) { return a += b; }
  friend Cost operator*(double n, const Cost& cost) { return {n * cost.forward, n * cost.backward}; }
  bool operator==(const Cost&) const = default;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

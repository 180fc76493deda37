// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <concepts>
#include <limits>
#include <moxie/core/error.hpp>
#include <moxie/kernel/activation.hpp>
#include <type_traits>

/// Gated units: functions of two arguments, a gate g and an up-projection u, element by element,
/// with their derivatives. One source serves numbers and vectors, on the host and on a CUDA device,
/// as for activations. Options are data of the object.
///
/// A gated unit has `value(gate, up)` and `derivatives(gate, up)`, which returns both partial
/// derivatives. One with options also has `expect_valid<Scalar>(where)`, which refuses options that
/// make no function, and `==`.
namespace moxie::inline MOXIE_NAMESPACE {

/// ∂/∂g and ∂/∂u.
template <class V>
struct GateUp {
  V gate;
  V up;
};

template <class U>
concept GatedUnit = requires(const U& unit, float v) {
  { unit.value(v, v) } -> std::same_as<float>;
  { unit.derivatives(v, v) } -> std::same_as<GateUp<float>>;
};

/// act(g) u. Shazeer 2020, "GLU variants improve transformer", equation 6.
template <class Activation>
struct Gated {
  template <class V>
  MOXIE_INLINE static V value(V gate, V up) {
    return Activation::value(gate) * up;
  }
  /// act'(g) u and act(g).
  template <class V>
  MOXIE_INLINE static GateUp<V> derivatives(V gate, V up) {
    return {up * Activation::derivative(gate), Activation::value(gate)};
  }
};

/// The gated unit that a template argument names: itself, or act(g) u of an activation.
template <class T>
using GatedUnitOf = std::conditional_t<GatedUnit<T>, T, Gated<T>>;

/// With g' = min(g, limit) and u' = u clamped to ±limit:
///
///     (u' + beta) g' σ(alpha g')
///
/// g has no lower bound. Beyond a limit the derivative is 0; at the limit itself it is not, as in
/// PyTorch. NaN stays NaN.
///
///     gpt-oss, MiniMax-M3            {.limit = 7, .alpha = 1.702, .beta = 1}
///     DeepSeek-V4, GLM-5, HY V4      {.limit = λ}
///     SwiGLU                         {}
struct ClampedSwiGlu {
  double limit = std::numeric_limits<double>::infinity();
  double alpha = 1;
  double beta = 0;

  bool operator==(const ClampedSwiGlu&) const = default;

  /// Throws ValueError for a limit that is not positive in Scalar, and for alpha or beta that are not finite there.
  template <class Scalar>
  void expect_valid(std::string_view where) const {
    detail::expect_value(Scalar(limit) > 0, where, "the limit of a gated unit must be above 0");
    detail::expect_value(std::isfinite(Scalar(alpha)), where, "alpha of a gated unit is not finite");
    detail::expect_value(std::isfinite(Scalar(beta)), where, "beta of a gated unit is not finite");
  }

  template <class V>
  MOXIE_INLINE V value(V gate, V up) const {
    const V g = clamped_gate(gate);
    return (clamped_up(up) + kernel::constant<V>(beta)) * (g * kernel::sigmoid(kernel::constant<V>(alpha) * g));
  }
  /// With s = σ(alpha g'): (u' + beta) s (1 + alpha g' (1 - s)), 0 where g > limit; and g' s, 0 where |u| > limit.
  template <class V>
  MOXIE_INLINE GateUp<V> derivatives(V gate, V up) const {
    const V zero = kernel::constant<V>(0);
    const V one = kernel::constant<V>(1);
    const V most = kernel::constant<V>(limit);
    const V g = clamped_gate(gate);
    const V scaled = kernel::constant<V>(alpha) * g;
    const V s = kernel::sigmoid(scaled);
    const V dgate = (clamped_up(up) + kernel::constant<V>(beta)) * (s * (one + scaled * (one - s)));
    const V dup = g * s;
    return {kernel::select(gate > most, zero, dgate), kernel::select(up > most, zero, kernel::select(up < -most, zero, dup))};
  }

 private:
  template <class V>
  MOXIE_INLINE V clamped_gate(V gate) const {
    const V most = kernel::constant<V>(limit);
    return kernel::select(gate > most, most, gate);
  }
  template <class V>
  MOXIE_INLINE V clamped_up(V up) const {
    const V most = kernel::constant<V>(limit);
    return kernel::clamp(up, -most, most);
  }
};

/// min(silu(g), limit) · u', with u' = u clamped to ±limit: the limit comes after the activation,
/// as in Step-3.7. Beyond a limit the derivative is 0. NaN stays NaN.
struct SwiGluClampedAfter {
  double limit = std::numeric_limits<double>::infinity();

  bool operator==(const SwiGluClampedAfter&) const = default;

  /// Throws ValueError for a limit that is not positive in Scalar.
  template <class Scalar>
  void expect_valid(std::string_view where) const {
    detail::expect_value(Scalar(limit) > 0, where, "the limit of a gated unit must be above 0");
  }

  template <class V>
  MOXIE_INLINE V value(V gate, V up) const {
    const V most = kernel::constant<V>(limit);
    const V activated = Silu::value(gate);
    return kernel::select(activated > most, most, activated) * kernel::clamp(up, -most, most);
  }
  /// silu'(g) u', 0 where silu(g) > limit; and min(silu(g), limit), 0 where |u| > limit.
  template <class V>
  MOXIE_INLINE GateUp<V> derivatives(V gate, V up) const {
    const V zero = kernel::constant<V>(0);
    const V most = kernel::constant<V>(limit);
    const V activated = Silu::value(gate);
    const V dgate = Silu::derivative(gate) * kernel::clamp(up, -most, most);
    const V dup = kernel::select(activated > most, most, activated);
    return {kernel::select(activated > most, zero, dgate),
            kernel::select(up > most, zero, kernel::select(up < -most, zero, dup))};
  }
};

/// cap(g, gate_cap) σ(g) cap(u, up_cap) with cap(v, c) = c tanh(v / c): smooth limits, σ of the gate as it is (Inkling 2:
/// {.gate_cap = 4, .up_cap = 25}).
struct SoftCappedSwiGlu {
  double gate_cap = 0;
  double up_cap = 0;

  bool operator==(const SoftCappedSwiGlu&) const = default;

  /// Throws ValueError for caps that are not positive and finite in Scalar.
  template <class Scalar>
  void expect_valid(std::string_view where) const {
    for (const double cap : {gate_cap, up_cap}) {
      detail::expect_value(std::isfinite(Scalar(cap)) && Scalar(cap) > 0, where,
                           "the caps of a gated unit must be finite and above 0");
    }
  }

  template <class V>
  MOXIE_INLINE V value(V gate, V up) const {
    const V a = kernel::constant<V>(gate_cap);
    const V b = kernel::constant<V>(up_cap);
    return (a * kernel::tanh(gate / a)) * kernel::sigmoid(gate) * (b * kernel::tanh(up / b));
  }
  /// With t = tanh(g / a), s = σ(g), r = tanh(u / b): s ((1 - t²) + a t (1 - s)) b r, and a t s (1 - r²).
  template <class V>
  MOXIE_INLINE GateUp<V> derivatives(V gate, V up) const {
    const V one = kernel::constant<V>(1);
    const V a = kernel::constant<V>(gate_cap);
    const V b = kernel::constant<V>(up_cap);
    const V t = kernel::tanh(gate / a);
    const V r = kernel::tanh(up / b);
    const V s = kernel::sigmoid(gate);
    return {s * ((one - t * t) + a * t * (one - s)) * (b * r), a * t * s * (one - r * r)};
  }
};

}  // namespace moxie::inline MOXIE_NAMESPACE

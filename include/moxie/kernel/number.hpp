// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/config.hpp>
#include <type_traits>

/// The functions of vectors (`kernel/simd.hpp`) for one float or double, on the host and on a CUDA
/// device. A template over V that uses them works with numbers and with vectors.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

namespace detail {

template <class V>
struct ElementOf {
  using Type = typename V::value_type;
};
template <>
struct ElementOf<float> {
  using Type = float;
};
template <>
struct ElementOf<double> {
  using Type = double;
};

}  // namespace detail

/// A constant in the precision of V: of a number, or of a vector's elements.
template <class V>
MOXIE_INLINE V constant(double value) {
  return V(static_cast<typename detail::ElementOf<V>::Type>(value));
}

// These are no templates, so they never compete with xsimd's functions of the same names.
MOXIE_INLINE float exp(float x) { return std::exp(x); }
MOXIE_INLINE double exp(double x) { return std::exp(x); }
MOXIE_INLINE float tanh(float x) { return std::tanh(x); }
MOXIE_INLINE double tanh(double x) { return std::tanh(x); }
MOXIE_INLINE float erf(float x) { return std::erf(x); }
MOXIE_INLINE double erf(double x) { return std::erf(x); }

MOXIE_INLINE float select(bool condition, float holds, float elsewhere) { return condition ? holds : elsewhere; }
MOXIE_INLINE double select(bool condition, double holds, double elsewhere) { return condition ? holds : elsewhere; }

MOXIE_INLINE float(min)(float a, float b) { return b < a ? b : a; }
MOXIE_INLINE double(min)(double a, double b) { return b < a ? b : a; }
/// a if b is not a number.
MOXIE_INLINE float(max)(float a, float b) { return b > a ? b : a; }
MOXIE_INLINE double(max)(double a, double b) { return b > a ? b : a; }

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>
#include <moxie/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE::kernel {

/// The instruction set without vectors, for processors that xsimd does not know and for comparisons
/// (MOXIE_SCALAR_KERNELS).
struct ScalarArch {
  static constexpr const char* name() { return "scalar"; }
};

/// A vector of one number, with the part of `xsimd::batch` that kernels and activations use.
template <class T>
struct One {
  using value_type = T;  // NOLINT(readability-identifier-naming): xsimd's
  static constexpr std::size_t size = 1;

  One() = default;
  explicit One(T v) : value(v) {}

  static One load_aligned(const T* p) { return One(*p); }
  static One load_unaligned(const T* p) { return One(*p); }
  void store_aligned(T* p) const { *p = value; }
  void store_unaligned(T* p) const { *p = value; }

  friend One operator+(One a, One b) { return One(a.value + b.value); }
  friend One operator-(One a, One b) { return One(a.value - b.value); }
  friend One operator*(One a, One b) { return One(a.value * b.value); }
  friend One operator/(One a, One b) { return One(a.value / b.value); }
  friend One operator-(One a) { return One(-a.value); }
  One& operator+=(One b) { return *this = *this + b; }
  One& operator*=(One b) { return *this = *this * b; }

  friend bool operator==(One a, One b) { return a.value == b.value; }
  friend bool operator<(One a, One b) { return a.value < b.value; }
  friend bool operator<=(One a, One b) { return a.value <= b.value; }
  friend bool operator>(One a, One b) { return a.value > b.value; }
  friend bool operator>=(One a, One b) { return a.value >= b.value; }

  T value;
};

/// x y + z, fused if the processor has one instruction for it. A library call would be far slower.
template <class T>
MOXIE_INLINE One<T> fma(One<T> x, One<T> y, One<T> z) {
#if defined(__FMA__) || defined(__aarch64__)
  return One<T>(std::fma(x.value, y.value, z.value));
#else
  return x * y + z;
#endif
}
MOXIE_INLINE bool any(bool condition) { return condition; }
template <class T>
MOXIE_INLINE One<T> select(bool condition, One<T> holds, One<T> elsewhere) {
  return condition ? holds : elsewhere;
}
template <class T>
MOXIE_INLINE One<T>(min)(One<T> a, One<T> b) {
  return b < a ? b : a;
}
/// a if b is not a number.
template <class T>
MOXIE_INLINE One<T>(max)(One<T> a, One<T> b) {
  return b > a ? b : a;
}

namespace detail {

template <class T>
MOXIE_INLINE One<T> exp_within_limits(One<T> x) {
  return One<T>(std::exp(x.value));
}
template <class T>
MOXIE_INLINE One<T> tanh_within_limits(One<T> x) {
  return One<T>(std::tanh(x.value));
}
template <class T>
MOXIE_INLINE One<T> erf_within_limits(One<T> x) {
  return One<T>(std::erf(x.value));
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

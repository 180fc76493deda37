// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <moxie/config.hpp>
#include <type_traits>

namespace moxie::inline MOXIE_NAMESPACE {

/// A number of 16 bits: the upper half of a float. It has float's range and 8 bits of precision.
/// Expert banks can multiply such numbers and add in float; see `GluExperts`.
///
/// Conversion from a float is explicit, `BFloat16(x)`. It rounds to the nearest number, ties to
/// even. Wider numbers become floats first. A NaN stays NaN. Conversion to float is exact and
/// implicit. Arithmetic computes in float and rounds once. A default-initialized number is
/// undefined, as a float is; `BFloat16()` is 0. The type is the same on a CUDA device, where cuBLAS
/// reads it as CUDA_R_16BF.
///
/// `Matrix<BFloat16>` works as other matrices do (`core/matrix.hpp`).
struct BFloat16 {
  std::uint16_t bits;

  BFloat16() = default;
  MOXIE_HOST_DEVICE explicit BFloat16(float x) : bits(rounded(x)) {}
  /// From any other number that converts to float, such as another library's 16-bit types.
  template <class T>
  requires(!std::is_same_v<T, float> && !std::is_same_v<T, BFloat16> &&
           requires(const T& x) { static_cast<float>(x); }) MOXIE_HOST_DEVICE explicit BFloat16(const T& x)
      : BFloat16(static_cast<float>(x)) {}

  MOXIE_HOST_DEVICE operator float() const {  // NOLINT(google-explicit-constructor): every such number is a float
    const std::uint32_t word = std::uint32_t(bits) << 16U;
    float x = 0;
    std::memcpy(&x, &word, sizeof x);
    return x;
  }
  MOXIE_HOST_DEVICE static BFloat16 from_bits(std::uint16_t bits) {
    BFloat16 x;
    x.bits = bits;
    return x;
  }

  MOXIE_HOST_DEVICE friend BFloat16 operator-(BFloat16 a) { return from_bits(std::uint16_t(a.bits ^ 0x8000U)); }
  MOXIE_HOST_DEVICE friend BFloat16 operator+(BFloat16 a, BFloat16 b) { return BFloat16(float(a) + float(b)); }
  MOXIE_HOST_DEVICE friend BFloat16 operator-(BFloat16 a, BFloat16 b) { return BFloat16(float(a) - float(b)); }
  MOXIE_HOST_DEVICE friend BFloat16 operator*(BFloat16 a, BFloat16 b) { return BFloat16(float(a) * float(b)); }
  MOXIE_HOST_DEVICE friend BFloat16 operator/(BFloat16 a, BFloat16 b) { return BFloat16(float(a) / float(b)); }
  MOXIE_HOST_DEVICE BFloat16& operator+=(BFloat16 b) { return *this = *this + b; }
  MOXIE_HOST_DEVICE BFloat16& operator-=(BFloat16 b) { return *this = *this - b; }
  MOXIE_HOST_DEVICE BFloat16& operator*=(BFloat16 b) { return *this = *this * b; }
  MOXIE_HOST_DEVICE BFloat16& operator/=(BFloat16 b) { return *this = *this / b; }
  MOXIE_HOST_DEVICE friend BFloat16(abs)(BFloat16 a) { return from_bits(std::uint16_t(a.bits & 0x7fffU)); }
  friend BFloat16 sqrt(BFloat16 a) { return BFloat16(std::sqrt(float(a))); }

 private:
  MOXIE_HOST_DEVICE static std::uint16_t rounded(float x) {
    std::uint32_t word = 0;
    std::memcpy(&word, &x, sizeof word);
    if ((word & 0x7fffffffU) > 0x7f800000U) {
      return std::uint16_t(word >> 16U | 0x40U);  // a NaN whose upper half would be infinity
    }
    return std::uint16_t((word + 0x7fffU + (word >> 16U & 1U)) >> 16U);
  }
};
static_assert(sizeof(BFloat16) == 2 && std::is_trivial_v<BFloat16>, "moxie: BFloat16 is not 16 plain bits");

}  // namespace moxie::inline MOXIE_NAMESPACE

template <>
class std::numeric_limits<moxie::BFloat16> : public std::numeric_limits<float> {  // the rest is float's
 public:
  // Parentheses, since programs may have macros of these names.
  static constexpr int digits = 8;
  static constexpr int digits10 = 2;
  static constexpr int max_digits10 = 4;
  static moxie::BFloat16(min)() { return moxie::BFloat16::from_bits(0x0080); }
  static moxie::BFloat16(max)() { return moxie::BFloat16::from_bits(0x7f7f); }
  static moxie::BFloat16 lowest() { return moxie::BFloat16::from_bits(0xff7f); }
  static moxie::BFloat16 denorm_min() { return moxie::BFloat16::from_bits(0x0001); }
  static moxie::BFloat16 epsilon() { return moxie::BFloat16::from_bits(0x3c00); }
  static moxie::BFloat16 round_error() { return moxie::BFloat16::from_bits(0x3f00); }
  static moxie::BFloat16 infinity() { return moxie::BFloat16::from_bits(0x7f80); }
  static moxie::BFloat16 quiet_NaN() { return moxie::BFloat16::from_bits(0x7fc0); }
  static moxie::BFloat16 signaling_NaN() { return moxie::BFloat16::from_bits(0x7fa0); }
};

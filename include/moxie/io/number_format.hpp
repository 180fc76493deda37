// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <moxie/core/error.hpp>
#include <span>
#include <string_view>
#include <type_traits>

namespace moxie::inline MOXIE_NAMESPACE {

static_assert(std::endian::native == std::endian::little,
              "safetensors files are little-endian; they are read and written without swapping bytes");

/// The number formats that are read as numbers. `Other` stands for the rest (F8_E4M3, U16, BOOL, C64
/// and what later versions add): tensors of it are bytes with the name of their format.
enum class DType { F32, F64, F16, BF16, I32, I64, U8, Other };

/// Bytes of one element; 1 for `Other`.
constexpr Index dtype_size(DType dtype) {
  switch (dtype) {
    case DType::F64:
    case DType::I64:
      return 8;
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::F16:
    case DType::BF16:
      return 2;
    case DType::U8:
    case DType::Other:
      break;
  }
  return 1;
}

/// The format's name in a file; "other" for `Other`.
constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return "F32";
    case DType::F64:
      return "F64";
    case DType::F16:
      return "F16";
    case DType::BF16:
      return "BF16";
    case DType::I32:
      return "I32";
    case DType::I64:
      return "I64";
    case DType::U8:
      return "U8";
    case DType::Other:
      break;
  }
  return "other";
}

/// The format of that name; `Other` for a name that is not one of those above.
constexpr DType dtype_named(std::string_view name) {
  for (const DType dtype : {DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64, DType::U8}) {
    if (dtype_name(dtype) == name) {
      return dtype;
    }
  }
  return DType::Other;
}

/// The types of C++ that tensors are read as.
template <class T>
concept StoredScalar = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, std::int32_t> ||
    std::same_as<T, std::int64_t> || std::same_as<T, std::uint8_t>;

/// The format that stores a T as it is.
template <StoredScalar T>
inline constexpr DType dtype_of = std::same_as<T, float>          ? DType::F32
                                  : std::same_as<T, double>       ? DType::F64
                                  : std::same_as<T, std::int32_t> ? DType::I32
                                  : std::same_as<T, std::int64_t> ? DType::I64
                                                                  : DType::U8;

/// Whether tensors of a format can be read as T: floats as floats, integers as integers of at least
/// the same width.
template <StoredScalar T>
constexpr bool reads_as(DType dtype) {
  if (dtype == DType::Other) {
    return false;
  }
  const bool floating = dtype == DType::F32 || dtype == DType::F64 || dtype == DType::F16 || dtype == DType::BF16;
  return floating == std::is_floating_point_v<T> && (floating || dtype_size(dtype) <= Index{sizeof(T)});
}

namespace detail {

/// A format of safetensors, whether or not it is read as numbers.
struct StoredFormat {
  std::string_view name;
  Index bits;  ///< of one element
};

/// In the order of the reference implementation's enumeration, which a writer follows backwards: wider
/// formats come first in a file, so that every tensor is aligned.
inline constexpr std::array<StoredFormat, 22> stored_formats{{
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
}};

/// The position in `stored_formats`; -1 for a name that is not there.
constexpr Index format_position(std::string_view name) {
  for (std::size_t i = 0; i < stored_formats.size(); ++i) {
    if (stored_formats[i].name == name) {
      return static_cast<Index>(i);
    }
  }
  return -1;
}

/// The number of elements, or -1 where a size is negative or the bytes do not fit an Index. Sizes of
/// zero do not excuse the others: no part of the product overflows.
constexpr Index element_count(std::span<const Index> shape, Index element_size) {
  Index limit = (std::numeric_limits<Index>::max)() / element_size;
  Index count = 1;
  bool empty = false;
  for (const Index size : shape) {
    if (size < 0 || size > limit) {
      return -1;
    }
    if (size == 0) {
      empty = true;
    } else {
      count *= size;
      limit /= size;
    }
  }
  return empty ? 0 : count;
}

/// The bytes of `count` elements of that many bits, or -1 where they end inside a byte. Precondition:
/// the result fits an Index.
constexpr Index packed_bytes(Index count, Index bits) {
  const Index rest = count % 8 * bits;
  return rest % 8 == 0 ? count / 8 * bits + rest / 8 : -1;
}

/// The upper half of a float.
struct Bfloat16 {
  std::uint16_t bits;

  Bfloat16() = default;
  /// Rounds to nearest, ties to even; a NaN stays one.
  explicit Bfloat16(float x) {
    const auto word = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t upper = word >> 16U;
    const bool nan = (word & 0x7FFFFFFFU) > 0x7F800000U;
    bits = static_cast<std::uint16_t>(nan ? upper | 0x40U : (word + 0x7FFFU + (upper & 1U)) >> 16U);
  }
  operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16U); }
};

/// IEEE 754's binary16: a sign, 5 bits of exponent, 10 of fraction.
struct Float16 {
  std::uint16_t bits;

  operator float() const {
    const std::uint32_t sign = (bits & 0x8000U) << 16U;
    const std::uint32_t exponent = (bits >> 10U) & 0x1FU;
    const std::uint32_t fraction = bits & 0x3FFU;
    if (exponent == 0) {  // fraction · 2⁻²⁴
      return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(fraction) * 0x1p-24F));
    }
    const std::uint32_t wide = exponent == 0x1FU ? 0xFFU : exponent + 127U - 15U;
    return std::bit_cast<float>(sign | wide << 23U | fraction << 13U);
  }
};

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

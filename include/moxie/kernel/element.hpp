// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <moxie/core/buffer.hpp>
#include <moxie/kernel/simd.hpp>
#include <type_traits>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

/// Elements: the numbers that products multiply. They are floating-point numbers, or pairs of
/// numbers of half their size.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

/// One step of a product takes one unit of a row or a column. A unit has the size of a sum: it is a
/// number, or two BFloat16, the first in the low bits.
template <class Element>
struct UnitOf {
  using Type = Element;
  static constexpr Index elements = 1;
};
template <>
struct UnitOf<BFloat16> {
  using Type = std::uint32_t;
  static constexpr Index elements = 2;
};
template <class Element>
using Unit = typename UnitOf<Element>::Type;

namespace detail {

template <class V>
MOXIE_INLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

/// The bits of numbers, rounded to the nearest BFloat16, ties to even. The caller drops the lower
/// 16. NaN stays NaN.
template <Index Width>
MOXIE_INLINE Words<Width> rounded_bits(Floats<Width> v) {
  const auto bits = std::bit_cast<Words<Width>>(v);
  const Words<Width> rounded = bits + 0x7fffU + ((bits >> 16U) & 1U);
  const auto nan = std::bit_cast<Words<Width>>(v != v);
  return (rounded & ~nan) | ((bits | 0x400000U) & nan);
}

/// Width numbers of p as BFloat16s, in the low halves of words.
template <Index Width, class Source>
MOXIE_INLINE Words<Width> words(const Source* p) {
  if constexpr (std::is_same_v<Source, BFloat16>) {
    return __builtin_convertvector(read<Halves<Width>>(p), Words<Width>);
  } else {
    return rounded_bits<Width>(read<Floats<Width>>(p)) >> 16U;
  }
}

/// Units of 2 Width consecutive numbers.
template <Index Width, class Source, std::size_t... Lanes>
MOXIE_INLINE Words<Width> pairs_along(const Source* p, std::index_sequence<Lanes...> /*lanes*/) {
  if constexpr (std::is_same_v<Source, BFloat16>) {
    return read<Words<Width>>(p);
  } else {
#if defined(__AVX512BF16__)
    if constexpr (Width == 16) {
      return std::bit_cast<Words<Width>>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + Width), _mm512_loadu_ps(p)));
    }
#endif
    const Words<Width> a = words<Width>(p);
    const Words<Width> b = words<Width>(p + Width);
    return __builtin_shufflevector(a, b, int(2 * Lanes)...) | (__builtin_shufflevector(a, b, int(2 * Lanes + 1)...) << 16U);
  }
}

/// Width units of a row from p on, for `transpose_square`.
template <class Element, class V, class Source>
MOXIE_INLINE void units_along(const Source* p, V& units) {
  if constexpr (UnitOf<Element>::elements == 1) {
    std::memcpy(&units, p, sizeof(V));
  } else {
    constexpr std::size_t width = sizeof(V) / sizeof(Unit<Element>);
    units = pairs_along<Index{width}>(p, std::make_index_sequence<width>{});
  }
}

/// The unit at p, with n >= 1 numbers left and zeros after them.
template <class Element, class Source>
MOXIE_INLINE Unit<Element> unit(const Source* p, Index n) {
  if constexpr (UnitOf<Element>::elements == 1) {
    return p[0];
  } else if constexpr (std::is_same_v<Source, Element>) {
    return n > 1 ? read<std::uint32_t>(p) : std::uint32_t{std::bit_cast<std::uint16_t>(p[0])};
  } else {
    const std::array<Element, 2> pair = {Element(p[0]), Element(n > 1 ? p[1] : 0.0F)};
    return std::bit_cast<std::uint32_t>(pair);
  }
}

/// Width units, one for each column of a step's rows: columns [0, n), and zeros after them. A row
/// beyond the last is zeros.
template <class Element, Index Width, class Source>
MOXIE_INLINE void units_across(const std::array<const Source*, UnitOf<Element>::elements>& rows, Index n, Unit<Element>* to) {
  if constexpr (UnitOf<Element>::elements == 1) {
    if (n == Width) {
      std::memcpy(to, rows[0], Width * sizeof(Source));  // the size is known: a few vector instructions, no call
      return;
    }
    for (Index j = 0; j < Width; ++j) {
      to[j] = j < n ? rows[0][j] : Source(0);
    }
  } else {
    alignas(alignment) Source copies[2][std::size_t(Width)];
    const auto padded = [&](std::size_t r) -> const Source* {
      if (rows[r] != nullptr && n == Width) {
        return rows[r];
      }
      for (Index j = 0; j < Width; ++j) {
        copies[r][j] = rows[r] != nullptr && j < n ? rows[r][j] : Source(0);
      }
      return copies[r];
    };
    constexpr Index divisor = Width % 4 == 0 ? 4 : 2;  // of a tile's rows: 12 or 6
    constexpr Index part = (Width & (Width - 1)) == 0 ? Width : divisor;
    const Source* low = padded(0);
    const Source* high = padded(1);
    for (Index j = 0; j < Width; j += part) {
      const Words<part> units = words<part>(low + j) | (words<part>(high + j) << 16U);
      std::memcpy(to + j, &units, sizeof(units));
    }
  }
}

/// One step of a tile: sum += x · b, where x holds one unit in every lane.
template <class Scalar, class Element, class Arch>
struct Step {
  using V = Batch<Scalar, Arch>;

  MOXIE_INLINE static V load(const Element* panel) { return V::load_aligned(panel); }
  MOXIE_INLINE static V broadcast(Element x) { return in_register(V(x)); }
  MOXIE_INLINE static V add(const V& x, const V& b, const V& sum) { return fma(x, b, sum); }
};

/// A step of pairs adds both products, each with one rounding. AVX512-BF16 has one instruction for
/// it, in the processor's order and with subnormal numbers taken as zero. Otherwise two
/// multiply-adds compute it.
template <class Arch>
struct Step<float, BFloat16, Arch> {
  using V = Batch<float, Arch>;
  static constexpr Index width = Index{V::size};
  using Pairs = Words<width>;

  MOXIE_INLINE static Pairs load(const std::uint32_t* panel) { return read<Pairs>(panel); }
  MOXIE_INLINE static Pairs broadcast(std::uint32_t x) { return Pairs{} + x; }
  MOXIE_INLINE static V add(Pairs x, Pairs b, const V& sum) {
#if defined(__AVX512BF16__)
    if constexpr (width == 16) {
      return V(_mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(x), std::bit_cast<__m512bh>(b)));
    } else
#endif
    {
      const V first = fma(std::bit_cast<V>(x << 16U), std::bit_cast<V>(b << 16U), sum);
      return fma(std::bit_cast<V>(x & 0xffff0000U), std::bit_cast<V>(b & 0xffff0000U), first);
    }
  }
};

}  // namespace detail

/// The first n numbers at p, zeros after them; n may be more than a vector holds.
template <class V>
MOXIE_INLINE V load(const BFloat16* p, Index n) {
  constexpr Index width = Index{V::size};
  std::array<BFloat16, V::size> copy{};
  if (n < width) {
    detail::copy_few(p, n, copy.data());
    p = copy.data();
  }
  return std::bit_cast<V>(detail::words<width>(p) << 16U);
}

/// The first n numbers, rounded, to p; n is at least one, and may be more than a vector holds.
template <class V>
MOXIE_INLINE void store(const V& v, BFloat16* p, Index n) {
  constexpr Index width = Index{V::size};
  const auto copy = [p, n](const auto& halves) {
    if (width == 1 || n >= width) {
      std::memcpy(static_cast<void*>(p), &halves, sizeof(halves));
    } else {
      detail::copy_few(reinterpret_cast<const BFloat16*>(&halves), n, p);
    }
  };
#if defined(__AVX512BF16__)
  if constexpr (width == 16) {
    copy(_mm512_cvtneps_pbh(v));
    return;
  }
#endif
  const auto bits = detail::rounded_bits<width>(std::bit_cast<detail::Floats<width>>(v));
  copy(__builtin_convertvector(bits >> 16U, detail::Halves<width>));
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

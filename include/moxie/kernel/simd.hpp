// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <moxie/core/matrix.hpp>
#include <moxie/kernel/number.hpp>
#include <moxie/kernel/scalar.hpp>
#include <xsimd/xsimd.hpp>

#if defined(__AVX__)
#include <immintrin.h>
#endif

/// Vectors. Only the module kernel/ names xsimd. `Arch`, the instruction set, is a template
/// parameter of everything here.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

#if defined(XSIMD_NO_SUPPORTED_ARCHITECTURE)

using DefaultArch = ScalarArch;
template <class Scalar, class Arch = DefaultArch>
using Batch = One<Scalar>;
template <class Arch>
inline constexpr bool has_32_registers = false;

#else

namespace detail {

template <class Scalar, class Arch>
struct BatchOf {
  using Type = xsimd::batch<Scalar, Arch>;
};
template <class Scalar>
struct BatchOf<Scalar, ScalarArch> {
  using Type = One<Scalar>;
};

}  // namespace detail

#if defined(MOXIE_SCALAR_KERNELS)
using DefaultArch = ScalarArch;
#else
using DefaultArch = xsimd::default_arch;
#endif

/// A vector of an instruction set.
template <class Scalar, class Arch = DefaultArch>
using Batch = typename detail::BatchOf<Scalar, Arch>::Type;

/// Whether an instruction set with vectors below 64 bytes has 32 vector registers, not 16.
template <class Arch>
inline constexpr bool has_32_registers = std::is_base_of_v<xsimd::neon64, Arch>;

using xsimd::fma;
using xsimd::max;
using xsimd::min;
using xsimd::select;  // select(condition, where it holds, elsewhere); conditions are comparisons of batches

namespace detail {

template <class Scalar, class Arch>
MOXIE_INLINE xsimd::batch<Scalar, Arch> exp_within_limits(const xsimd::batch<Scalar, Arch>& x) {
  return xsimd::exp(x);
}
template <class Scalar, class Arch>
MOXIE_INLINE xsimd::batch<Scalar, Arch> tanh_within_limits(const xsimd::batch<Scalar, Arch>& x) {
  return xsimd::tanh(x);
}
template <class Scalar, class Arch>
MOXIE_INLINE xsimd::batch<Scalar, Arch> erf_within_limits(const xsimd::batch<Scalar, Arch>& x) {
  return xsimd::erf(x);
}

}  // namespace detail

#endif

namespace detail {

/// The compiler's own vectors, for operations that xsimd does not have.
template <class T, Index Width>
struct VectorOf {
  using Type [[gnu::vector_size(Width * sizeof(T))]] = T;
};
template <Index Width>
using Floats = typename VectorOf<float, Width>::Type;
template <Index Width>
using Words = typename VectorOf<std::uint32_t, Width>::Type;
template <Index Width>
using Halves = typename VectorOf<std::uint16_t, Width>::Type;

}  // namespace detail

/// The same vector, with its origin hidden from the compiler. clang++ would otherwise read a number
/// that two products share from memory twice; the second read costs more than a register.
template <class V>
MOXIE_INLINE V in_register(V v) {
#if defined(__clang__) && defined(__x86_64__)
  if constexpr (requires { v.data; }) {
    asm("" : "+v"(v.data));
  }
#endif
  return v;
}

/// Prefetches n elements at p, to be read.
template <class Scalar>
MOXIE_INLINE void prefetch(const Scalar* p, Index n) {
  for (Index j = 0; j < n; j += Index{64 / sizeof(Scalar)}) {
    __builtin_prefetch(p + j, 0, 2);
  }
}

namespace detail {

/// Copies n elements one by one. The compiler would make a call of memcpy from a plain loop, and a
/// call costs the surrounding loops their vector registers.
template <class T>
MOXIE_INLINE void copy_few(const T* from, Index n, T* to) {
  for (Index i = 0; i < n; ++i) {
    to[i] = from[i];
    asm volatile("" : : : "memory");
  }
}

}  // namespace detail

/// The first n elements at p, zeros after them; n may be more than a vector holds.
template <class V>
MOXIE_INLINE V load(const typename V::value_type* p, Index n) {
  constexpr Index width = Index{V::size};
  if (n >= width) {
    return V::load_unaligned(p);
  }
  std::array<typename V::value_type, V::size> copy{};
  detail::copy_few(p, n, copy.data());
  return V::load_unaligned(copy.data());
}

/// The first n elements to p; n may be more than a vector holds.
template <class V>
MOXIE_INLINE void store(const V& v, typename V::value_type* p, Index n) {
  constexpr Index width = Index{V::size};
  if (n >= width) {
    v.store_unaligned(p);
    return;
  }
  std::array<typename V::value_type, V::size> copy;
  v.store_unaligned(copy.data());
  detail::copy_few(copy.data(), n, p);
}

/// Whether `Vectors` vectors side by side fill cache lines, and the processor has non-temporal
/// stores of them.
template <class V, Index Vectors = 1>
inline constexpr bool fill_lines =
#if defined(__AVX__)
    sizeof(V) >= 32 && Vectors * sizeof(V) % 64 == 0;
#else
    false;
#endif

/// Stores a vector to p, which is aligned, by a non-temporal store if there is one. Such a store
/// reads no line first and takes none from other cores. All vectors of a line should follow each
/// other. Other threads see them after `end_streams`, which the scheduler calls at the end of every
/// task.
template <class V>
MOXIE_INLINE void stream(const V& v, typename V::value_type* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), std::bit_cast<__m512i>(v));
    return;
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), std::bit_cast<__m256i>(v));
    return;
  }
#endif
  v.store_aligned(p);
}
/// Must come before the signal that tells other threads of streamed data.
MOXIE_INLINE void end_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

namespace detail {

/// f(x) of x clamped to ±1000, where exp, tanh and erf are at their limits; NaN of NaN. These
/// functions convert multiples of x to integers, which has no defined result for the largest
/// floating-point numbers and NaN.
template <class V, class F>
MOXIE_INLINE V within_limits(const V& x, F&& f) {
  const auto is_number = x == x;
  const V clamped = (min)(constant<V>(1000), (max)(constant<V>(-1000), x));
  return select(is_number, f(select(is_number, clamped, constant<V>(0))), x);
}

/// 2^n (1 + r + r²(...)) with n the integer nearest to x / ln 2, r = x - n ln 2, and the polynomial
/// of Cephes' expf (Moshier): within one unit in the last place. For x in [-86.6, 88.72].
template <class V>
MOXIE_INLINE V exp_of_floats(const V& x) {
  constexpr Index width = Index{V::size};
  const V shift = constant<V>(12582912);  // 1.5 · 2^23: adding it rounds, and leaves n in the low bits
  const V shifted = fma(x, constant<V>(1.44269504088896341), shift);
  const V n = shifted - shift;
  const V r = fma(n, constant<V>(2.12194440e-4), fma(n, constant<V>(-0.693359375), x));
  const V r2 = r * r;
  const V high = fma(constant<V>(1.9875691500e-4), r, constant<V>(1.3981999507e-3));
  const V middle = fma(constant<V>(8.3334519073e-3), r, constant<V>(4.1665795894e-2));
  const V low = fma(constant<V>(1.6666665459e-1), r, constant<V>(5.0000001201e-1));
  const V p = fma(fma(high, r2, middle), r2, low);
  const V y = fma(p, r2, r) + constant<V>(1);
  // Half of 2^n, so that n = 128 has one too.
  const Words<width> half = (std::bit_cast<Words<width>>(shifted) << 23U) + (126U << 23U);
  const V scaled = y * std::bit_cast<V>(half);
  return scaled + scaled;
}

}  // namespace detail

/// e^x. For floats, 0 below -86.6.
template <class V>
MOXIE_INLINE V exp(const V& x) {
  if constexpr (std::is_same_v<typename V::value_type, float>) {
    const V y = select(x < constant<V>(-86.6), constant<V>(0), detail::exp_of_floats(x));
    return select(x > constant<V>(88.722839), constant<V>(std::numeric_limits<double>::infinity()), y);
  } else {
    return detail::within_limits(x, [](const V& v) { return detail::exp_within_limits(v); });
  }
}
template <class V>
MOXIE_INLINE V tanh(const V& x) {
  return detail::within_limits(x, [](const V& v) { return detail::tanh_within_limits(v); });
}
template <class V>
MOXIE_INLINE V erf(const V& x) {
  return detail::within_limits(x, [](const V& v) { return detail::erf_within_limits(v); });
}

/// Element-wise `out[i]... = f(in[i]...)` over rows of n contiguous elements, one vector at a time.
///
/// `f(a, b, ...)` takes one batch for every input and returns a batch, or `std::array` of as many
/// batches as there are outputs. The last, partial vector runs the same instructions in a padded
/// copy, so an element's bits do not depend on its place in the row. An output may be the same
/// memory as an input.
template <class Arch = DefaultArch, std::size_t Outputs, class Scalar, class F, class... In>
void map(Index n, std::array<Scalar*, Outputs> out, F&& f, const In*... in) {
  using B = Batch<Scalar, Arch>;
  constexpr Index width = Index{B::size};
  const auto results = [&](auto... batches) {
    if constexpr (Outputs == 1) {
      return std::array<B, 1>{f(batches...)};
    } else {
      return f(batches...);
    }
  };
  Index i = 0;
  for (; i + width <= n; i += width) {
    const std::array<B, Outputs> r = results(B::load_unaligned(in + i)...);
    for (std::size_t o = 0; o < Outputs; ++o) {
      r[o].store_unaligned(out[o] + i);
    }
  }
  if (i < n) {
    const auto padded = [&](const Scalar* p) {
      std::array<Scalar, B::size> copy{};
      std::copy(p + i, p + n, copy.begin());
      return B::load_unaligned(copy.data());
    };
    const std::array<B, Outputs> r = results(padded(in)...);
    for (std::size_t o = 0; o < Outputs; ++o) {
      std::array<Scalar, B::size> copy{};
      r[o].store_unaligned(copy.data());
      std::copy_n(copy.begin(), n - i, out[o] + i);
    }
  }
}

template <class Arch = DefaultArch, class Scalar, class F, class... In>
void map(Index n, Scalar* out, F&& f, const In*... in) {
  map<Arch>(n, std::array<Scalar*, 1>{out}, std::forward<F>(f), in...);
}

namespace detail {

/// A sum over n elements: one partial sum for each lane, then these in order. `add_vector(i, sums)`
/// adds a vector of elements from i on, `add(i, sum)` adds one element. The order depends only on
/// n, not on the place of the elements in memory.
template <class B, class AddVector, class Add>
auto sum_of_lanes(Index n, AddVector add_vector, Add add) {
  using Scalar = typename B::value_type;
  constexpr Index width = Index{B::size};
  B sums(Scalar(0));
  Index i = 0;
  for (; i + width <= n; i += width) {
    sums = add_vector(i, sums);
  }
  std::array<Scalar, B::size> parts{};
  sums.store_unaligned(parts.data());
  for (Index j = 0; i + j < n; ++j) {
    parts[std::size_t(j)] = add(i + j, parts[std::size_t(j)]);
  }
  Scalar sum = 0;
  for (const Scalar part : parts) {
    sum += part;
  }
  return sum;
}

}  // namespace detail

/// The first n numbers of a vector, zeros after them; n may be more than a vector holds.
template <class V>
MOXIE_INLINE V first_of(const V& v, Index n) {
  if (n >= Index{V::size}) {
    return v;
  }
  std::array<typename V::value_type, V::size> parts;
  v.store_unaligned(parts.data());
  return load<V>(parts.data(), n);
}

/// The sum of a vector's numbers: halves, then halves of these.
template <class V>
MOXIE_INLINE typename V::value_type sum_of(const V& v) {
  std::array<typename V::value_type, V::size> parts;
  v.store_unaligned(parts.data());
  for (std::size_t half = V::size / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) {
      parts[j] += parts[j + half];
    }
  }
  return parts[0];
}

/// Σ a_i b_i of n contiguous elements, one fused multiply-add an element.
template <class Arch = DefaultArch, class Scalar>
Scalar dot(Index n, const Scalar* a, const Scalar* b) {
  using B = Batch<Scalar, Arch>;
  return detail::sum_of_lanes<B>(
      n, [&](Index i, const B& sums) { return fma(B::load_unaligned(a + i), B::load_unaligned(b + i), sums); },
      [&](Index i, Scalar sum) { return sum + a[i] * b[i]; });
}

/// Σ a_i of n contiguous elements.
template <class Arch = DefaultArch, class Scalar>
Scalar sum(Index n, const Scalar* a) {
  using B = Batch<Scalar, Arch>;
  return detail::sum_of_lanes<B>(
      n, [&](Index i, const B& sums) { return sums + B::load_unaligned(a + i); },
      [&](Index i, Scalar sum) { return sum + a[i]; });
}

/// Whether all of n contiguous elements are finite: 0·x is 0 for a finite x, and NaN otherwise.
template <class Arch = DefaultArch, class Scalar>
bool all_finite(Index n, const Scalar* a) {
  using B = Batch<Scalar, Arch>;
  return detail::sum_of_lanes<B>(
             n, [&](Index i, const B& sums) { return fma(B(Scalar(0)), B::load_unaligned(a + i), sums); },
             [&](Index i, Scalar sum) { return sum + Scalar(0) * a[i]; }) == Scalar(0);
}

/// The largest of n >= 1 contiguous elements, none of them NaN.
template <class Arch = DefaultArch, class Scalar>
Scalar largest(Index n, const Scalar* a) {
  using B = Batch<Scalar, Arch>;
  constexpr Index width = Index{B::size};
  if (n < width) {
    return *std::max_element(a, a + n);
  }
  B best = B::load_unaligned(a);
  for (Index i = width; i + width <= n; i += width) {
    best = (max)(best, B::load_unaligned(a + i));
  }
  best = (max)(best, B::load_unaligned(a + n - width));
  std::array<Scalar, B::size> parts;
  best.store_unaligned(parts.data());
  return *std::max_element(parts.begin(), parts.end());
}

/// The index of the first of the elements [i, n) above a limit, or n.
template <class Arch = DefaultArch, class Scalar>
Index find_above(Index i, Index n, const Scalar* a, Scalar limit) {
  using B = Batch<Scalar, Arch>;
  constexpr Index width = Index{B::size};
  while (i + width <= n && !any(B::load_unaligned(a + i) > B(limit))) {
    i += width;
  }
  while (i < n && !(a[i] > limit)) {
    ++i;
  }
  return i;
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

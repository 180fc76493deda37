// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <moxie/kernel/simd.hpp>
#include <utility>

namespace moxie::kernel::detail {

/// The register block: at most `rows` x 2 vectors of accumulators, chosen so that they and the operands of a step fill the
/// vector registers: 32 of AVX-512 and 64-bit NEON, 16 elsewhere.
template <class Scalar, class Arch>
struct Tile {
  static constexpr Index width = Index{Batch<Scalar, Arch>::size};
  static constexpr Index rows = sizeof(Scalar) * std::size_t{width} >= 64 || has_32_registers<Arch> ? 12 : 6;
  static constexpr Index cols = 2 * width;
  static constexpr Index size = rows * cols;
};

/// Addresses of memory that is needed soon, one for each of the next steps; after them, something that is near.
class Ahead {
 public:
  Ahead() { addresses_.fill(this); }

  void clear() { next_ = 0; }
  /// The lines of n elements at p, as many as there is room for.
  template <class Scalar>
  void add(const Scalar* p, Index n) {
    for (Index j = 0; j < n && next_ < last; j += Index{64 / sizeof(Scalar)}) {
      addresses_[next_++] = p + j;
    }
  }
  /// Before a tile: what older tiles asked for is not asked for again.
  void settle() {
    std::fill(addresses_.begin() + std::ptrdiff_t(next_), addresses_.begin() + std::ptrdiff_t(std::max(next_, used_)), this);
    used_ = next_;
  }
  const void* operator[](Index step) const { return addresses_[std::min(std::size_t(step), last)]; }

 private:
  static constexpr std::size_t last = 255;
  std::array<const void*, last + 1> addresses_;
  std::size_t next_ = 0;
  std::size_t used_ = 0;
};

/// sums (Rows x cols, dense) = A B over `depth` steps, or += where `add`. B is read from a packed panel (depth x cols). Row i
/// of A is read at a[i][p], or, where A is packed as (depth x Tile::rows), at a[0][p · Tile::rows + i]. One fused multiply-add
/// an element and step, in the order of p, from zero: the bits of an element depend on nothing but its row of A and its column
/// of B. On the way it asks for what is `ahead`.
template <bool Packed, Index Rows, class Scalar, class Arch>
void multiply_tile(Index depth, const Scalar* const* a, const Scalar* panel, Scalar* sums, bool add, const Ahead& ahead) {
  using T = Tile<Scalar, Arch>;
  using B = Batch<Scalar, Arch>;
  B sum[Rows][2];
  const Scalar* row[Rows];
#pragma GCC unroll 16
  for (Index i = 0; i < Rows; ++i) {
    sum[i][0] = B(Scalar(0));
    sum[i][1] = B(Scalar(0));
    row[i] = Packed ? a[0] + i : a[i];
  }
  constexpr Index step = Packed ? T::rows : 1;
  Index p = 0;
  // Two steps at once: twelve pointers are more than the registers hold, and are then reloaded half as often.
  constexpr Index together = 2;
  for (; p + together <= depth; p += together) {
#pragma GCC unroll 2
    for (Index u = 0; u < together; ++u) {
      __builtin_prefetch(ahead[p + u], 0, 2);
      const B b0 = B::load_aligned(panel + u * T::cols);
      const B b1 = B::load_aligned(panel + u * T::cols + T::width);
#pragma GCC unroll 16
      for (Index i = 0; i < Rows; ++i) {
        const B x = in_register(B(Packed ? row[0][(p + u) * step + i] : row[i][p + u]));
        sum[i][0] = fma(x, b0, sum[i][0]);
        sum[i][1] = fma(x, b1, sum[i][1]);
      }
    }
    panel += together * T::cols;
  }
  for (; p < depth; ++p, panel += T::cols) {
    const B b0 = B::load_aligned(panel);
    const B b1 = B::load_aligned(panel + T::width);
#pragma GCC unroll 16
    for (Index i = 0; i < Rows; ++i) {
      const B x(row[i][p * step]);
      sum[i][0] = fma(x, b0, sum[i][0]);
      sum[i][1] = fma(x, b1, sum[i][1]);
    }
  }
  if (add) {
#pragma GCC unroll 16
    for (Index i = 0; i < Rows; ++i) {
      sum[i][0] += B::load_aligned(sums + i * T::cols);
      sum[i][1] += B::load_aligned(sums + i * T::cols + T::width);
    }
  }
#pragma GCC unroll 16
  for (Index i = 0; i < Rows; ++i) {
    sum[i][0].store_aligned(sums + i * T::cols);
    sum[i][1].store_aligned(sums + i * T::cols + T::width);
  }
}

template <class Scalar>
using MultiplyTile = void (*)(Index, const Scalar* const*, const Scalar*, Scalar*, bool, const Ahead&);

/// A tile that computes `rows` rows or a few more, which are then rows of something that can be read, and not used. Each height
/// is code of its own, so there are not all of them: 1, 2, 4, 6, ..., and of packed rows, whose padding is there anyway, half a
/// tile and a whole one.
template <bool Packed, class Scalar, class Arch>
std::pair<MultiplyTile<Scalar>, Index> tile_of(Index rows) {
  constexpr Index full = Tile<Scalar, Arch>::rows;
  if constexpr (Packed) {
    if (rows <= full / 2) {
      return {multiply_tile<Packed, full / 2, Scalar, Arch>, full / 2};
    }
    return {multiply_tile<Packed, full, Scalar, Arch>, full};
  } else {
    if (rows == 1) {
      return {multiply_tile<Packed, 1, Scalar, Arch>, 1};
    }
    constexpr auto even = []<Index... I>(std::integer_sequence<Index, I...>) {
      return std::array<MultiplyTile<Scalar>, sizeof...(I)>{multiply_tile<Packed, 2 * I + 2, Scalar, Arch>...};
    }
    (std::make_integer_sequence<Index, full / 2>{});
    return {even[std::size_t((rows - 1) / 2)], (rows + 1) / 2 * 2};
  }
}

}  // namespace moxie::kernel::detail

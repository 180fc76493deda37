// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <moxie/kernel/element.hpp>
#include <type_traits>
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

/// Lines of memory at equal distances, one for each step of a tile, in bytes.
struct Run {
  const std::byte* from = nullptr;
  std::ptrdiff_t pitch = 0;
  Index lines = 0;
};

/// Memory that is needed soon: in each of a tile's steps, an address from a list, then one of a run.
class Ahead {
 public:
  Ahead() {
    addresses_.fill(this);
    follow({});
  }

  void clear() { next_ = 0; }
  /// The lines of n elements at p, as many as there is room for.
  template <class Scalar>
  void add(const Scalar* p, Index n) {
    for (Index j = 0; j < n && next_ < last; j += Index{64 / sizeof(Scalar)}) {
      addresses_[next_++] = p + j;
    }
  }
  /// An empty run is replaced by something that is near.
  void follow(const Run& run) { run_ = run.lines > 0 ? run : Run{reinterpret_cast<const std::byte*>(this), 0, 1}; }
  /// Before a tile: what older tiles asked for is not asked for again.
  void settle() {
    std::fill(addresses_.begin() + std::ptrdiff_t(next_), addresses_.begin() + std::ptrdiff_t(std::max(next_, used_)), this);
    used_ = next_;
  }
  const void* address(Index step) const { return addresses_[std::min(std::size_t(step), last)]; }
  const Run& run() const { return run_; }

 private:
  static constexpr std::size_t last = 255;
  std::array<const void*, last + 1> addresses_;
  std::size_t next_ = 0;
  std::size_t used_ = 0;
  Run run_;
};

/// Where a tile reads A: the starts of its rows, or one address of (steps x Tile::rows) packed units.
template <bool Packed, class Element>
using TileRows = const std::conditional_t<Packed, Unit<Element>, Element>* const*;

/// The unit of row i in a step, where so many numbers of the row are left; `rows` are those of a tile from row 0 on, which lie
/// side by side where they are packed, Distance units a step.
template <bool Packed, Index Distance, class Element, class P>
MOXIE_INLINE Unit<Element> unit_at(const P& rows, Index i, Index step, Index left) {
  if constexpr (Packed) {
    return rows[0][step * Distance + i];
  } else {
    return unit<Element>(rows[i] + step * UnitOf<Element>::elements, left);
  }
}

/// Where a tile reads B: a packed panel (steps x cols).
template <class Scalar, class Element, class Arch>
struct Panel {
  const Unit<Element>* units;

  MOXIE_INLINE auto load(Index step) const {
    using T = Tile<Scalar, Arch>;
    using S = Step<Scalar, Element, Arch>;
    return std::array{S::load(units + step * T::cols), S::load(units + step * T::cols + T::width)};
  }
};

/// sums (Rows x cols, dense) = A B over `depth` numbers of a row, or += where `add`. Row i of A is read from a[i] on, or, where
/// A is packed, at a[0][p · Tile::rows + i] for step p; step p of B is `b.load(p)`. One fused multiply-add a number, in order,
/// from zero: the bits of a sum depend on nothing but its row of A and its column of B. On the way it asks for what is `ahead`.
template <bool Packed, Index Rows, class Scalar, class Element, class Arch, class PanelOf>
void multiply_tile(Index depth, TileRows<Packed, Element> a, const PanelOf& b, Scalar* sums, bool add, const Ahead& ahead) {
  using T = Tile<Scalar, Arch>;
  using B = Batch<Scalar, Arch>;
  using S = Step<Scalar, Element, Arch>;
  constexpr Index elements = UnitOf<Element>::elements;
  B sum[Rows][2];
  std::remove_const_t<std::remove_pointer_t<TileRows<Packed, Element>>> row[Rows];
#pragma GCC unroll 16
  for (Index i = 0; i < Rows; ++i) {
    sum[i][0] = B(Scalar(0));
    sum[i][1] = B(Scalar(0));
    row[i] = Packed ? a[0] + i : a[i];
  }
  const Index steps = (depth + elements - 1) / elements;
  const Index whole = Packed ? steps : depth / elements;
  const Run run = ahead.run();
  const auto multiply = [&](Index p, Index left) {
    const auto panel = b.load(p);
#pragma GCC unroll 16
    for (Index i = 0; i < Rows; ++i) {
      const auto x = S::broadcast(unit_at<Packed, T::rows, Element>(row, i, p, left));
      sum[i][0] = S::add(x, panel[0], sum[i][0]);
      sum[i][1] = S::add(x, panel[1], sum[i][1]);
    }
  };
  Index p = 0;
  // Two steps at once: twelve pointers are more than the registers hold, and are then reloaded half as often.
  constexpr Index together = 2;
  for (; p + together <= whole; p += together) {
#pragma GCC unroll 2
    for (Index u = 0; u < together; ++u) {
      __builtin_prefetch(ahead.address(p + u), 1, 3);
      __builtin_prefetch(run.from + std::min(p + u, run.lines - 1) * run.pitch, 0, 2);
      multiply(p + u, elements);
    }
  }
  for (; p < steps; ++p) {
    multiply(p, depth - p * elements);
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

/// So many rows computes the tile for `rows` of them; those that are more are rows of something that can be read, and not used.
/// Each height is code of its own, so there are not all of them: 1, 2, 4, 6, ..., and of packed rows, whose padding is there
/// anyway, half a tile and a whole one.
template <bool Packed, class Scalar, class Arch>
Index height_of(Index rows) {
  constexpr Index full = Tile<Scalar, Arch>::rows;
  if constexpr (Packed) {
    return rows <= full / 2 ? full / 2 : full;
  } else {
    return rows == 1 ? 1 : (rows + 1) / 2 * 2;
  }
}

/// `multiply_tile` of `height_of` rows.
template <bool Packed, class Scalar, class Element, class Arch, class PanelOf>
auto tile_of(Index rows) {
  constexpr Index full = Tile<Scalar, Arch>::rows;
  using Multiply = void (*)(Index, TileRows<Packed, Element>, const PanelOf&, Scalar*, bool, const Ahead&);
  const Index height = height_of<Packed, Scalar, Arch>(rows);
  if constexpr (Packed) {
    return height < full ? Multiply(multiply_tile<Packed, full / 2, Scalar, Element, Arch, PanelOf>)
                         : Multiply(multiply_tile<Packed, full, Scalar, Element, Arch, PanelOf>);
  } else {
    constexpr auto even = []<Index... I>(std::integer_sequence<Index, I...>) {
      return std::array<Multiply, sizeof...(I)>{multiply_tile<Packed, 2 * I + 2, Scalar, Element, Arch, PanelOf>...};
    }
    (std::make_integer_sequence<Index, full / 2>{});
    return height == 1 ? Multiply(multiply_tile<Packed, 1, Scalar, Element, Arch, PanelOf>) : even[std::size_t(height / 2 - 1)];
  }
}

}  // namespace moxie::kernel::detail

// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <moxie/kernel/element.hpp>
#include <moxie/kernel/prefetch.hpp>
#include <type_traits>
#include <utility>

/// The micro-kernel: the inner loop. It computes one register tile of sums over the whole depth of
/// a pass.
namespace moxie::inline MOXIE_NAMESPACE::kernel::detail {

/// The register tile: at most `rows` (mr) x 2 vectors (nr) of sums. The sums and the operands of a
/// step fill the vector registers. AVX-512 and 64-bit NEON have 32, other sets 16.
template <class Scalar, class Arch>
struct RegisterTile {
  static constexpr Index width = Index{Batch<Scalar, Arch>::size};
  static constexpr Index rows = sizeof(Scalar) * std::size_t{width} >= 64 || has_32_registers<Arch> ? 12 : 6;
  static constexpr Index cols = 2 * width;
  static constexpr Index size = rows * cols;
};

/// A, as a tile reads it: the starts of its rows, or one address of packed units (steps x mr).
template <bool Packed, class Element>
using TileRows = const std::conditional_t<Packed, Unit<Element>, Element>* const*;

/// The unit of row i in a step, `left` numbers before the row's end. Packed units of a step are
/// neighbours; steps are Distance apart.
template <bool Packed, Index Distance, class Element, class P>
MOXIE_INLINE Unit<Element> unit_at(const P& rows, Index i, Index step, Index left) {
  if constexpr (Packed) {
    return rows[0][step * Distance + i];
  } else {
    return unit<Element>(rows[i] + step * UnitOf<Element>::elements, left);
  }
}

/// B, as a tile reads it: a packed panel (steps x nr).
template <class Scalar, class Element, class Arch>
struct PackedPanel {
  const Unit<Element>* units;

  MOXIE_INLINE auto load(Index step) const {
    using T = RegisterTile<Scalar, Arch>;
    using S = Step<Scalar, Element, Arch>;
    return std::array{S::load(units + step * T::cols), S::load(units + step * T::cols + T::width)};
  }
};

/// The destination of a tile. Its sums, plus `before` (a dense tile) if there is one, replace the
/// rows at `rows`, add to them, or stream to them.
template <class Scalar>
struct TileEnd {
  Scalar* rows;
  Index stride;
  bool add = false;
  bool stream = false;
  const Scalar* before = nullptr;
};

/// (Rows x nr) sums of A B over `depth` numbers. Row i of A starts at a[i]; packed rows start at
/// a[0], the unit of step p and row i at a[0][p · mr + i]. Step p of B is `b.load(p)`. A sum starts
/// at zero and takes one fused multiply-add a number, in order. Its bits depend only on its row of
/// A and its column of B. The loop prefetches `runs`, which must be at least as long.
template <bool Packed, Index Rows, class Scalar, class Element, class Arch, class PanelOf>
void multiply_tile(Index depth, TileRows<Packed, Element> a, const PanelOf& b, const TileEnd<Scalar>& end,
                   const PrefetchRun* runs) {
  using T = RegisterTile<Scalar, Arch>;
  using B = Batch<Scalar, Arch>;
  using S = Step<Scalar, Element, Arch>;
  constexpr Index elements = UnitOf<Element>::elements;
  B sum[std::size_t(Rows)][2];
  std::remove_const_t<std::remove_pointer_t<TileRows<Packed, Element>>> row[std::size_t(Rows)];
#pragma GCC unroll 16
  for (Index i = 0; i < Rows; ++i) {
    sum[i][0] = B(Scalar(0));
    sum[i][1] = B(Scalar(0));
    row[i] = Packed ? a[0] + i : a[i];
  }
  const auto multiply = [&](Index p, Index left) {
    const auto panel = b.load(p);
#pragma GCC unroll 16
    for (Index i = 0; i < Rows; ++i) {
      const auto x = S::broadcast(unit_at<Packed, T::rows, Element>(row, i, p, left));
      sum[i][0] = S::add(x, panel[0], sum[i][0]);
      sum[i][1] = S::add(x, panel[1], sum[i][1]);
    }
  };

  // All whole steps. Twelve pointers exceed the registers; two steps a turn halve the reloads.
  const Index steps = (depth + elements - 1) / elements;
  const Index whole = (Packed ? steps : depth / elements) / steps_at_once * steps_at_once;
  Index p = 0;
  for (const PrefetchRun* run = runs; p < whole; ++run) {
    const Index last = (std::min)(whole, p + run->lines);
    auto line = reinterpret_cast<std::uintptr_t>(run->from);
    for (; p < last; p += steps_at_once) {
#pragma GCC unroll 2
      for (Index u = 0; u < steps_at_once; ++u) {
        __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);  // NOLINT(performance-no-int-to-ptr): may be beyond
        __builtin_prefetch(reinterpret_cast<const void*>(line + std::uintptr_t(run->second)), 0, 2);  // NOLINT
        line += std::uintptr_t(run->pitch);
        multiply(p + u, elements);
      }
    }
  }
  for (; p < steps; ++p) {
    multiply(p, depth - p * elements);
  }

  // The sums of earlier passes, then the destination.
  if (end.before != nullptr) {
#pragma GCC unroll 16
    for (Index i = 0; i < Rows; ++i) {
      sum[i][0] += B::load_aligned(end.before + i * T::cols);
      sum[i][1] += B::load_aligned(end.before + i * T::cols + T::width);
    }
  }
#pragma GCC unroll 16
  for (Index i = 0; i < Rows; ++i) {
    Scalar* const to = end.rows + i * end.stride;
    if (end.add) {
      sum[i][0] += B::load_unaligned(to);
      sum[i][1] += B::load_unaligned(to + T::width);
    }
    if (fill_lines<B, 2> && end.stream) {
      stream(sum[i][0], to);
      stream(sum[i][1], to + T::width);
    } else {
      sum[i][0].store_unaligned(to);
      sum[i][1].store_unaligned(to + T::width);
    }
  }
}

/// The height of the tile that computes `rows` rows. The tile computes further rows from readable
/// memory; they must not be stored. Each height is compiled, so there are few: 1, 2, 4, 6, ..., mr.
/// If A is packed: half of mr, and mr. If the tile also packs its panel: mr and, for a plain A, two
/// thirds of mr.
template <bool Packed, bool Packs, class Scalar, class Arch>
Index tile_height(Index rows) {
  constexpr Index full = RegisterTile<Scalar, Arch>::rows;
  if constexpr (Packed) {
    return !Packs && rows <= full / 2 ? full / 2 : full;
  } else if constexpr (Packs) {
    return rows <= full * 2 / 3 ? full * 2 / 3 : full;
  } else {
    return rows == 1 ? 1 : (rows + 1) / 2 * 2;
  }
}

/// `multiply_tile` of `tile_height` rows.
template <bool Packed, bool Packs, class Scalar, class Element, class Arch, class PanelOf>
void multiply_rows(Index rows, Index depth, TileRows<Packed, Element> a, const PanelOf& b, const TileEnd<Scalar>& end,
                   const PrefetchRun* runs) {
  constexpr Index full = RegisterTile<Scalar, Arch>::rows;
  using Multiply = void (*)(Index, TileRows<Packed, Element>, const PanelOf&, const TileEnd<Scalar>&, const PrefetchRun*);
  const Index height = tile_height<Packed, Packs, Scalar, Arch>(rows);
  Multiply multiply = multiply_tile<Packed, full, Scalar, Element, Arch, PanelOf>;
  if constexpr (Packed && !Packs) {
    if (height < full) {
      multiply = multiply_tile<Packed, full / 2, Scalar, Element, Arch, PanelOf>;
    }
  } else if constexpr (!Packed && Packs) {
    if (height < full) {
      multiply = multiply_tile<Packed, full * 2 / 3, Scalar, Element, Arch, PanelOf>;
    }
  } else if constexpr (!Packed) {
    static constexpr auto even = []<Index... Half>(std::integer_sequence<Index, Half...>) {
      return std::array<Multiply, sizeof...(Half)>{multiply_tile<Packed, 2 * Half + 2, Scalar, Element, Arch, PanelOf>...};
    }
    (std::make_integer_sequence<Index, full / 2>{});
    multiply =
        height == 1 ? Multiply(multiply_tile<Packed, 1, Scalar, Element, Arch, PanelOf>) : even[std::size_t(height / 2 - 1)];
  }
  multiply(depth, a, b, end, runs);
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel::detail

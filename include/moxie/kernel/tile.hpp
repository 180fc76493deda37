// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
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

/// Lines of memory at equal distances, in bytes.
struct Run {
  const std::byte* from = nullptr;
  std::ptrdiff_t pitch = 0;
  Index lines = 0;
};

/// Memory that is needed soon, for which a tile asks on its way, a line a step: first lines that will be written, then a run.
class Ahead {
 public:
  void clear() {
    count_ = 0;
    run_ = {};
  }
  /// The lines of n elements at p, as many as there is room for.
  template <class Scalar>
  void add(const Scalar* p, Index n) {
    for (Index j = 0; j < n && count_ < most; j += Index{64 / sizeof(Scalar)}) {
      lines_[std::size_t(count_++)] = p + j;
    }
  }
  void follow(const Run& run) { run_ = run; }
  Index count() const { return count_; }
  const void* line(Index i) const { return lines_[std::size_t(i)]; }
  const Run& run() const { return run_; }

 private:
  static constexpr Index most = 256;
  std::array<const void*, std::size_t(most)> lines_;
  Index count_ = 0;
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

/// What becomes of a tile's sums: sums, or sums + before (dense), go to rows `stride` apart, or are added to what is there.
template <class Scalar>
struct TileEnd {
  Scalar* rows;
  Index stride;
  bool add = false;
  const Scalar* before = nullptr;
};

/// (Rows x cols) sums A B over `depth` numbers of a row. Row i of A is read from a[i] on, or, where A is packed, at
/// a[0][p · Tile::rows + i] for step p; step p of B is `b.load(p)`. One fused multiply-add a number, in order, from zero: the
/// bits of a sum depend on nothing but its row of A and its column of B. On the way it asks for what is `ahead`.
template <bool Packed, Index Rows, class Scalar, class Element, class Arch, class PanelOf>
void multiply_tile(Index depth, TileRows<Packed, Element> a, const PanelOf& b, const TileEnd<Scalar>& end, const Ahead& ahead) {
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
  const auto multiply = [&](Index p, Index left) {
    const auto panel = b.load(p);
#pragma GCC unroll 16
    for (Index i = 0; i < Rows; ++i) {
      const auto x = S::broadcast(unit_at<Packed, T::rows, Element>(row, i, p, left));
      sum[i][0] = S::add(x, panel[0], sum[i][0]);
      sum[i][1] = S::add(x, panel[1], sum[i][1]);
    }
  };
  // Two steps at once: twelve pointers are more than the registers hold, and are then reloaded half as often. Each kind of
  // asking has a loop of its own: what little it computes would take turns with the multiply-adds.
  Index p = 0;
  constexpr Index together = 2;
  const auto multiply_to = [&](Index last, auto&& ask) {
    for (; p + together <= last; p += together) {
#pragma GCC unroll 2
      for (Index u = 0; u < together; ++u) {
        ask(p + u);
        multiply(p + u, elements);
      }
    }
  };
  multiply_to(std::min(whole, ahead.count()), [&](Index step) { __builtin_prefetch(ahead.line(step), 1, 3); });
  const Run run = ahead.run();
  auto line = reinterpret_cast<std::uintptr_t>(run.from);
  multiply_to(std::min(whole, p + run.lines), [&](Index /*step*/) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);  // NOLINT(performance-no-int-to-ptr): may be beyond
    line += std::uintptr_t(run.pitch);
  });
  multiply_to(whole, [](Index /*step*/) {});
  for (; p < steps; ++p) {
    multiply(p, depth - p * elements);
  }
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
    sum[i][0].store_unaligned(to);
    sum[i][1].store_unaligned(to + T::width);
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
  using Multiply = void (*)(Index, TileRows<Packed, Element>, const PanelOf&, const TileEnd<Scalar>&, const Ahead&);
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

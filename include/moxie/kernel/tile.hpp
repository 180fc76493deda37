// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <moxie/kernel/element.hpp>
#include <span>
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

/// Steps that a tile takes at once: twelve pointers are more than the registers hold, and are then reloaded half as often.
inline constexpr Index steps_at_once = 2;

/// Lines of memory at equal distances, in bytes; where `second` is not 0, with each the line that is so many bytes after it.
struct Run {
  const std::byte* from = nullptr;
  std::ptrdiff_t pitch = 0;
  Index lines = 0;
  std::ptrdiff_t second = 0;

  /// In which a tile asks for them, a line or a pair a step.
  Index steps() const { return (lines + steps_at_once - 1) / steps_at_once * steps_at_once; }
};

/// Memory that is needed soon, for which a tile asks on its way as far as it has steps: first for what will be read, then, as
/// it ends, for what will be written, which is to be in the first-level cache when it is.
class Ahead {
 public:
  void clear() {
    reads_.count = 0;
    writes_.count = 0;
  }
  /// n elements at p: to be read where T is const, else to be written.
  template <class T>
  void add(T* p, Index n) {
    runs<T>().add({reinterpret_cast<const std::byte*>(p), 64, (n + line<T> - 1) / line<T>});
  }
  /// n elements of each of so many rows, `stride` apart.
  template <class T>
  void add(T* p, Index stride, Index rows, Index n) {
    for (Index j = 0; j < n; j += line<T>) {
      runs<T>().add({reinterpret_cast<const std::byte*>(p + j), stride * Index{sizeof(T)}, rows});
    }
  }
  void read(const Run& run) { reads_.add(run); }
  std::span<const Run> reads() const { return reads_.span(); }
  std::span<const Run> writes() const { return writes_.span(); }
  static Index steps(std::span<const Run> runs) {
    Index sum = 0;
    for (const Run& run : runs) {
      sum += run.steps();
    }
    return sum;
  }

 private:
  struct Runs {
    std::array<Run, 32> of;
    std::size_t count = 0;

    void add(const Run& run) {
      if (run.lines > 0 && count < of.size()) {
        of[count++] = run;
      }
    }
    std::span<const Run> span() const { return {of.data(), count}; }
  };

  template <class T>
  static constexpr Index line = Index{64 / sizeof(T)};
  template <class T>
  Runs& runs() {
    return std::is_const_v<T> ? reads_ : writes_;
  }

  Runs reads_;
  Runs writes_;
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

/// What becomes of a tile's sums: sums, or sums + before (dense), go to rows `stride` apart, past the caches or not, or are
/// added to what is there.
template <class Scalar>
struct TileEnd {
  Scalar* rows;
  Index stride;
  bool add = false;
  bool stream = false;
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
  // Each kind of asking has a loop of its own: what little it computes would take turns with the multiply-adds.
  Index p = 0;
  const auto multiply_to = [&](Index last, auto&& ask) {
    for (; p + steps_at_once <= last; p += steps_at_once) {
#pragma GCC unroll 2
      for (Index u = 0; u < steps_at_once; ++u) {
        ask();
        multiply(p + u, elements);
      }
    }
  };
  const auto multiply_and_ask = [&](Index last, std::span<const Run> runs, auto write) {
    for (const Run& run : runs) {
      auto line = reinterpret_cast<std::uintptr_t>(run.from);
      // One loop for lines and for pairs, the second line of which may be the first: another loop costs all of them registers.
      multiply_to(std::min(last, p + run.steps()), [&] {
        const auto* const first = reinterpret_cast<const void*>(line);  // NOLINT(performance-no-int-to-ptr): may be beyond
        __builtin_prefetch(first, write ? 1 : 0, write ? 3 : 2);
        if (!write) {
          const auto at = line + std::uintptr_t(run.second);
          __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);  // NOLINT(performance-no-int-to-ptr)
        }
        line += std::uintptr_t(run.pitch);
      });
    }
  };
  const Index end_of_reads = std::max(Index{0}, whole / steps_at_once * steps_at_once - Ahead::steps(ahead.writes()));
  multiply_and_ask(end_of_reads, ahead.reads(), std::false_type{});
  multiply_to(end_of_reads, [] {});
  multiply_and_ask(whole, ahead.writes(), std::true_type{});
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
    if (fill_lines<B, 2> && end.stream) {
      stream(sum[i][0], to);
      stream(sum[i][1], to + T::width);
    } else {
      sum[i][0].store_unaligned(to);
      sum[i][1].store_unaligned(to + T::width);
    }
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

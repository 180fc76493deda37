// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstring>
#include <moxie/kernel/microkernel.hpp>
#include <moxie/kernel/prefetch.hpp>
#include <moxie/kernel/product.hpp>
#include <utility>

/// Packing: copies of factors in the order in which tiles read them. B becomes packed panels, a
/// transposed A packed tiles.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

namespace detail {

/// In each 128 bits, elements of a and b alternate: a0 b0 a1 b1 ... `low` takes the lower halves,
/// `high` the upper ones.
template <Index Lane, class V, std::size_t... Lanes>
MOXIE_INLINE void interleave(V& low, V& high, const V& a, const V& b, std::index_sequence<Lanes...> /*lanes*/) {
  constexpr int width = sizeof...(Lanes);
  constexpr int lane = Lane;
  low = __builtin_shufflevector(a, b, (int(Lanes) / lane * lane + int(Lanes) % lane / 2 + (Lanes % 2 == 0 ? 0 : width))...);
  high = __builtin_shufflevector(
      a, b, (int(Lanes) / lane * lane + int(Lanes) % lane / 2 + lane / 2 + (Lanes % 2 == 0 ? 0 : width))...);
}

template <class To, class V, std::size_t... Lanes>
MOXIE_INLINE void join(To& to, const V& a, const V& b, std::index_sequence<Lanes...> /*lanes*/) {
  to = __builtin_shufflevector(a, b, int(Lanes)...);
}

/// `Count` units at p from each of the rows from[0], from[every], from[2 every], ..., in this
/// order.
template <Index Count, Index Rows, class T>
MOXIE_INLINE void load_pieces(typename VectorOf<T, Count * Rows>::Type& to, const T* const* from, Index every, Index p) {
  if constexpr (Rows == 1) {
    std::memcpy(&to, from[0] + p, sizeof(to));
  } else {
    typename VectorOf<T, Count * Rows / 2>::Type first;
    typename VectorOf<T, Count * Rows / 2>::Type second;
    load_pieces<Count, Rows / 2, T>(first, from, every, p);
    load_pieces<Count, Rows / 2, T>(second, from + Rows / 2 * every, every, p);
    join(to, first, second, std::make_index_sequence<std::size_t(Count * Rows)>{});
  }
}

/// Transposes units of Width steps, from column p on, of Width rows into rows of `to`. Loading
/// moves pieces of 128 bits to their places. Within them, interleaving the first half of the
/// vectors with the second log2(lane) times transposes.
template <class Element, Index Width, class Source>
MOXIE_INLINE void transpose_square(const Source* const* from, Index p, Unit<Element>* to, Index stride) {
  using U = Unit<Element>;
  if constexpr (Width == 1) {
    to[0] = unit<Element>(from[0] + p, UnitOf<Element>::elements);
  } else {
    using V = typename VectorOf<U, Width>::Type;
    constexpr Index lane = (std::min)(Width, Index{16 / sizeof(U)});
    constexpr bool as_they_are = std::is_same_v<U, Source>;
    constexpr auto width = std::size_t(Width);
    alignas(alignment) U converted[as_they_are ? 1 : width][as_they_are ? 1 : width];
    const U* rows[width];
    for (Index j = 0; j < Width; ++j) {
      if constexpr (as_they_are) {
        rows[j] = from[j] + p;
      } else {
        V units;
        units_along<Element>(from[j] + p, units);
        std::memcpy(converted[j], &units, sizeof(units));
        rows[j] = converted[j];
      }
    }
    for (Index c = 0; c < Width; c += lane) {
      V v[std::size_t(lane)];
      V next[std::size_t(lane)];
#pragma GCC unroll 4
      for (Index i = 0; i < lane; ++i) {
        load_pieces<lane, Width / lane, U>(v[i], rows + i, lane, c);
      }
#pragma GCC unroll 2
      for (Index step = 1; step < lane; step *= 2) {
#pragma GCC unroll 4
        for (Index i = 0; i < lane / 2; ++i) {
          interleave<lane>(next[2 * i], next[2 * i + 1], v[i], v[i + lane / 2], std::make_index_sequence<std::size_t(Width)>{});
        }
#pragma GCC unroll 4
        for (Index i = 0; i < lane; ++i) {
          v[i] = next[i];
        }
      }
#pragma GCC unroll 4
      for (Index i = 0; i < lane; ++i) {
        std::memcpy(to + (c + i) * stride, &v[i], sizeof(V));
      }
    }
  }
}

/// The rows k, k + 1, ... of one step; null from row `end` on.
template <class Element, class Source>
auto rows_of_step(const Operand<Source>& b, Index k, Index end) {
  std::array<const Source*, UnitOf<Element>::elements> rows;
  for (Index i = 0; i < UnitOf<Element>::elements; ++i) {
    rows[std::size_t(i)] = k + i < end ? b.row(k + i) : nullptr;
  }
  return rows;
}
template <class Rows>
Rows from_column(Rows rows, Index column) {
  for (auto& row : rows) {
    row = row != nullptr ? row + column : row;
  }
  return rows;
}

}  // namespace detail

/// The columns of a factor B (k,n) in panels of two vectors. The vectors of a plain B follow each
/// other. In a gated B, a vector of gate columns stands beside the up columns of the same outputs.
template <class Scalar, class Arch, class Element = Scalar>
struct Panels {
  using T = detail::RegisterTile<Scalar, Arch>;
  static constexpr Index elements = UnitOf<Element>::elements;

  Index n = 0;  ///< outputs: columns, or gate columns
  bool gated = false;

  Index outputs() const { return gated ? T::width : T::cols; }  ///< of a panel
  Index count() const { return (n + outputs() - 1) / outputs(); }
  Index outputs_of(Index panel) const { return (std::min)(outputs(), n - panel * outputs()); }
  /// The first column of vector v of a panel in B, and the number of its columns that exist.
  std::pair<Index, Index> vector(Index panel, Index v) const {
    const Index first = gated ? panel * T::width : panel * T::cols + v * T::width;
    return {first + (gated ? v * n : 0), std::clamp(n - first, Index{0}, T::width)};
  }

  /// The column of B in one lane of vector v. Padding repeats the last column of the vector, and is never stored.
  Index column(Index panel, Index v, Index lane) const {
    return (std::min)(vector(panel, v).first + lane, (gated ? v * n : 0) + n - 1);
  }

  /// The memory of vector v of a panel in steps [s0, s0 + steps) of B, up to where lines stop being
  /// at equal distances.
  template <class Source>
  detail::PrefetchRun source(const Operand<Source>& b, Index panel, Index v, Index s0, Index steps) const {
    constexpr Index size = sizeof(Source);
    const auto& rows = b.rows;
    const auto [column, columns] = vector(panel, v);
    const Index row = b.transposed() ? column : s0 * elements;
    const Index from = b.transposed() ? s0 * elements : column;
    const bool dense = !b.transposed() || rows.stride == steps * elements;
    if (steps <= 0 || columns == 0 || rows.index != nullptr || !dense) {
      return {};
    }
    const auto* const first = reinterpret_cast<const std::byte*>(b.row(row) + from);
    if (b.transposed()) {  // one step's bytes, at most a line
      constexpr Index pitch = (std::min)(Index{64}, T::width * elements * size);
      return {first, pitch, (columns * steps * elements * size + pitch - 1) / pitch};
    }
    const Index lines = steps * elements;
    return {first, rows.stride * size, row >= rows.gap_at ? lines : (std::min)(lines, rows.gap_at - row)};
  }

  /// A part of B: rows [k0, k0 + depth) of panels [q0, q0 + panels).
  struct Part {
    Index q0;
    Index panels;
    Index k0;
    Index depth;
  };

  /// Packs a part of B to `out`, (steps x nr) a panel, `stride` apart. The sums of columns beyond
  /// the last are never stored. A last step with one number gets a zero as its second. If B is
  /// transposed, prefetches the lines of `next` meanwhile.
  template <class Source>
  void pack(const Operand<Source>& b, const Part& part, Unit<Element>* out, Index stride,
            const detail::PrefetchRun& next = {}) const {
    if (b.transposed()) {
      pack_transposed(b, part, out, stride, next);
      return;
    }
    const auto [q0, panels, k0, depth] = part;
    constexpr Index distance = 32;  // rows between prefetching and reading
    for (Index p = 0; p < depth; p += elements) {
      const auto rows = detail::rows_of_step<Element>(b, k0 + p, k0 + depth);
      if (!gated) {
        const Index first = q0 * T::cols;
        for (Index i = 0; i < elements; ++i) {
          prefetch(b.row(k0 + (std::min)(p + i + distance, depth - 1)) + first, (std::min)(panels * T::cols, n - first));
        }
      }
      for (Index i = 0; i < 2 * panels; ++i) {
        const auto [first, columns] = vector(q0 + i / 2, i % 2);
        detail::units_across<Element, T::width>(detail::from_column(rows, first), columns,
                                                out + i / 2 * stride + p / elements * T::cols + i % 2 * T::width);
      }
    }
  }

 private:
  static constexpr Index square = T::width * elements;  // numbers of a column that are transposed at once

  template <class Source>
  void pack_transposed(const Operand<Source>& b, const Part& part, Unit<Element>* out, Index stride,
                       const detail::PrefetchRun& next) const {
    const auto [q0, panels, k0, depth] = part;
    const Index squares = (std::max)(Index{1}, depth / square * 2 * panels);
    const Index lines = (next.lines + squares - 1) / squares;  // that each square prefetches
    auto line = reinterpret_cast<std::uintptr_t>(next.from);
    const auto end = line + std::uintptr_t(next.pitch * next.lines);
    for (Index i = 0; i < 2 * panels; ++i) {
      const Source* from[std::size_t(T::width)];
      for (Index j = 0; j < T::width; ++j) {
        from[j] = b.row(column(q0 + i / 2, i % 2, j)) + k0;
      }
      Unit<Element>* to = out + i / 2 * stride + i % 2 * T::width;
      Index p = 0;
      for (; p + square <= depth; p += square) {
        for (Index l = 0; l < lines && line < end; ++l, line += std::uintptr_t(next.pitch)) {
          __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);  // NOLINT(performance-no-int-to-ptr): as in a tile
        }
        detail::transpose_square<Element, T::width>(from, p, to + p / elements * T::cols, T::cols);
      }
      for (; p < depth; p += elements) {
        for (Index j = 0; j < T::width; ++j) {
          to[p / elements * T::cols + j] = detail::unit<Element>(from[j] + p, depth - p);
        }
      }
    }
  }
};

namespace detail {

/// Packs rows [k0, k0 + depth), columns [m0, m0 + rows) of a transposed A to tiles (steps x mr), `stride` apart, padded with
/// zeros.
template <class Scalar, class Arch, class Element>
void pack_transposed_rows(const Operand<Element>& a, Index k0, Index depth, Index m0, Index rows, Unit<Element>* out,
                          Index stride) {
  using T = RegisterTile<Scalar, Arch>;
  constexpr Index elements = UnitOf<Element>::elements;
  constexpr Index distance = 32;
  for (Index p = 0; p < depth; p += elements) {
    const auto from = rows_of_step<Element>(a, k0 + p, k0 + depth);
    for (Index i = 0; i < elements; ++i) {
      prefetch(a.row(k0 + (std::min)(p + i + distance, depth - 1)) + m0, rows);
    }
    Unit<Element>* to = out + p / elements * T::rows;
    for (Index i = 0; i < rows; i += T::rows, to += stride) {
      units_across<Element, T::rows>(from_column(from, m0 + i), (std::min)(T::rows, rows - i), to);
    }
  }
}

/// B, as the first tile reads it: whole vectors of B's rows [k0, end) from one column on. The tile
/// also packs them for later tiles; its arithmetic hides that cost.
template <class Scalar, class Element, class Arch, class Source>
struct PackingPanel {
  const Operand<Source>& b;
  Index k0;
  Index end;
  Index column;
  Unit<Element>* units;

  MOXIE_INLINE auto load(Index step) const {
    using T = RegisterTile<Scalar, Arch>;
    constexpr Index elements = UnitOf<Element>::elements;
    constexpr Index distance = 32;
    const Index k = k0 + step * elements;
    for (Index i = 0; i < elements; ++i) {
      prefetch(b.row((std::min)(k + i + distance, end - 1)) + column, T::cols);
    }
    Unit<Element>* const to = units + step * T::cols;
    if constexpr (std::is_same_v<Unit<Element>, Source>) {
      using V = Batch<Scalar, Arch>;
      const Source* from = b.row(k) + column;
      const std::array panel{V::load_unaligned(from), V::load_unaligned(from + T::width)};
      panel[0].store_aligned(to);
      panel[1].store_aligned(to + T::width);
      return panel;
    } else {
      const auto rows = from_column(rows_of_step<Element>(b, k, end), column);
      units_across<Element, T::width>(rows, T::width, to);
      units_across<Element, T::width>(from_column(rows, T::width), T::width, to + T::width);
      return PackedPanel<Scalar, Element, Arch>{units}.load(step);
    }
  }
};

}  // namespace detail

/// The number of units in the packed panels of B.
template <class Arch = DefaultArch, class Scalar, class Element>
Index panels_size(const Product<Scalar, Element>& p) {
  return Panels<Scalar, Arch, Element>{p.n, p.gated}.count() * p.steps() * detail::RegisterTile<Scalar, Arch>::cols;
}
/// Packs all of B once, for any number of products with this B. Set their `Product::panels` to
/// `out`, which is aligned and holds `panels_size` units.
template <class Arch = DefaultArch, class Scalar, class Element>
void prepack(const Product<Scalar, Element>& p, Unit<Element>* out) {
  const Panels<Scalar, Arch, Element> panels{p.n, p.gated};
  p.b.visit([&](const auto& b) {
    panels.pack(b, {0, panels.count(), 0, p.k}, out, p.steps() * detail::RegisterTile<Scalar, Arch>::cols);
  });
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <moxie/core/matrix.hpp>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

/// Blocking: the cut of a product into tasks whose memory fits the L2 cache. kc, mc and nc are
/// those of Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
namespace moxie::inline MOXIE_NAMESPACE::kernel {

/// Bytes of the L2 cache of a core, between 128 KiB and 2 MiB; 512 KiB if the system does not say.
/// Read once.
inline Index l2_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const Index bytes = [] {
    const long said = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return std::clamp(said > 0 ? Index{said} : Index{512} << 10, Index{128} << 10, Index{2} << 20);
  }();
  return bytes;
#else
  return Index{512} << 10;
#endif
}

/// Whether all rows start with a cache line.
template <class T>
bool on_lines(RowView<T> m) {
  constexpr std::size_t line = 64;
  return reinterpret_cast<std::uintptr_t>(m.data()) % line == 0 && std::size_t(m.stride()) * sizeof(T) % line == 0;
}
/// Whether non-temporal stores to m pay: all rows start with a line, and m is larger than a
/// sixteenth of the L2 cache. Such a matrix leaves the cache before another stage reads it, or
/// another thread reads it.
template <class T>
bool is_streamed(RowView<T> m) {
  return on_lines(m) && m.size() * Index{sizeof(T)} > l2_cache() / 16;
}

namespace detail {

/// The register tile as numbers: mr rows, nr columns, bytes of a sum.
struct TileShape {
  Index rows = 0;
  Index cols = 0;
  Index scalar = 0;
};

/// A product as blocking sees it.
struct ProductShape {
  Index m = 0;
  Index panels = 0;  ///< panels of nr columns
  Index steps = 0;   ///< k, in steps of the micro-kernel
  bool a_transposed = false;
  bool prepacked = false;
};

/// The blocks of a product. Only `kc` touches the bits of a result. It depends only on k and on
/// whether A is transposed.
struct Blocking {
  Index passes = 1;  ///< over k
  Index kc = 0;      ///< steps of a pass; the last pass may be shorter
  Index mc = 0;      ///< rows of a task
  Index nc = 0;      ///< panels of a task

  /// Rows of a transposed A that are packed at once, so that whole cache lines of it are read.
  static constexpr Index packed_rows(const TileShape& tile) { return 8 * tile.rows; }

  Index row_blocks(const ProductShape& p) const { return (p.m + mc - 1) / mc; }
  Index panel_blocks(const ProductShape& p) const { return (p.panels + nc - 1) / nc; }
  Index tasks(const ProductShape& p) const { return row_blocks(p) * panel_blocks(p); }
};

/// The size of a part, a multiple of `unit`, if n is cut into few and about equal parts of at most
/// `most`.
inline Index even_part(Index n, Index most, Index unit) {
  const Index parts = (std::max)(Index{1}, (n + most - 1) / most);
  return (std::max)(unit, ((n + parts - 1) / parts + unit - 1) / unit * unit);
}

/// The blocks of a product whose tasks have been halved `halvings` times.
inline Blocking block(const ProductShape& p, const TileShape& tile, Index halvings) {
  // A pass holds the whole k of most layers. It is short if both factors are packed: many columns
  // then share one copy of A.
  const Index longest = p.a_transposed ? 256 : 1536;
  const Index most_rows = 1020 / tile.rows * tile.rows;
  Blocking out;
  out.passes = (std::max)(Index{1}, (p.steps + longest - 1) / longest);
  out.kc = (p.steps + out.passes - 1) / out.passes;
  // Two fifths of the L2 cache hold the packed panels of a pass. Another two fifths hold the sums
  // between passes.
  const Index budget = l2_cache() * 2 / 5 / tile.scalar;
  out.nc = std::clamp(budget / (std::max)(Index{1}, out.kc * tile.cols), Index{1}, (std::max)(Index{1}, p.panels));
  out.mc = most_rows;
  if (out.passes > 1) {
    out.mc = std::clamp(budget / (out.nc * tile.cols) / tile.rows * tile.rows, tile.rows, most_rows);
  }
  const Index copied = Blocking::packed_rows(tile);
  for (; halvings > 0; --halvings) {
    if (p.a_transposed && out.mc >= 2 * copied) {  // each part of the panels would pack all rows again
      out.mc = out.mc / 2 / copied * copied;
    } else if (out.nc > 1) {
      out.nc = (out.nc + 1) / 2;
    } else {
      out.mc = (std::max)(tile.rows, out.mc / 2 / tile.rows * tile.rows);
    }
  }
  out.nc = even_part(p.panels, out.nc, 1);
  out.mc = even_part(p.m, out.mc, tile.rows);
  return out;
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

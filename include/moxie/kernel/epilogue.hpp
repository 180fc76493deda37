// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/blocking.hpp>
#include <moxie/kernel/microkernel.hpp>
#include <moxie/kernel/product.hpp>

/// The epilogue: a function that ends a tile while its sums are in the L1 cache. It adds a bias,
/// applies an activation, stores.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

/// The sums of one tile: `rows` x `cols` of C from (row, col) on, of product `product` of its
/// stage. The sums of a row are aligned and fill two vectors; sums beyond `cols` are padding. In a
/// gated product the first vector has the sums of the gate columns, the second those of the up
/// columns.
template <class Scalar>
struct TileSums {
  Index product;
  Index row;
  Index rows;
  Index col;
  Index cols;
  const Scalar* sums;
  Index stride;

  const Scalar* of_row(Index r) const { return sums + r * stride; }
};

/// A function and its context. Threads call it once a tile, several at once. Without a function,
/// sums plus the product's bias go to C.
template <class Scalar>
struct Epilogue {
  void (*apply)(const void* context, const TileSums<Scalar>& tile) = nullptr;
  /// Adds the memory that `apply` reads and writes to `list`. Optional.
  void (*prefetch)(const void* context, detail::PrefetchList& list, const TileSums<Scalar>& tile) = nullptr;
  const void* context = nullptr;

  /// Calls `apply(tile)` and `prefetch(list, tile)` of an object, which must outlive the run.
  template <class Object>
  static Epilogue of(const Object& object) {
    return {[](const void* self, const TileSums<Scalar>& tile) { static_cast<const Object*>(self)->apply(tile); },
            [](const void* self, detail::PrefetchList& list, const TileSums<Scalar>& tile) {
              static_cast<const Object*>(self)->prefetch(list, tile);
            },
            &object};
  }
};

/// As `replace`, to rows [first, ...) of m, with non-temporal stores if `is_streamed`.
template <class Scalar, class Arch = DefaultArch>
Destination<Scalar> stream_to(RowView<std::type_identity_t<Scalar>> m, Index first = 0) {
  return {{m.data() + first * m.stride(), m.stride(), nullptr},
          fill_lines<Batch<Scalar, Arch>, 2> && is_streamed(m) ? Write::stream : Write::replace};
}

namespace detail {

/// The first of `rows` rows of C if they lie at equal distances, else null.
template <class P>
typename P::Scalar* evenly_spaced_rows(const P& p, Index row, Index rows, Index col) {
  const auto& c = p.c.rows;
  return c.index == nullptr && (row >= c.gap_at || row + rows <= c.gap_at) ? c.row(row) + col : nullptr;
}

/// Prefetches the memory that the default epilogue writes.
template <class P>
void prefetch_destination(const P& p, PrefetchList& list, Index row, Index rows, Index col, Index cols) {
  if (p.c.write == Write::stream && col + cols <= p.n) {
    return;
  }
  if (auto* const first = evenly_spaced_rows(p, row, rows, col); first != nullptr) {
    list.add(first, p.c.rows.stride, rows, cols);
    return;
  }
  for (Index r = row; r < row + rows; ++r) {
    list.add(p.c.row(r) + col, cols);
  }
}

/// The default epilogue: C = sums + bias, or C += sums + bias.
template <class Arch, class P>
void store_tile(const P& p, const TileSums<typename P::Scalar>& tile) {
  using Scalar = typename P::Scalar;
  using T = RegisterTile<Scalar, Arch>;
  using V = Batch<Scalar, Arch>;
  const bool stream_all = p.c.write == Write::stream && tile.cols == T::cols;
  for (Index r = 0; r < tile.rows; ++r) {
    Scalar* const to = p.c.row(tile.row + r) + tile.col;
    for (Index j = 0; j < tile.cols; j += T::width) {
      V y = V::load_aligned(tile.of_row(r) + j);
      if (p.bias != nullptr) {
        y = y + load<V>(p.bias + tile.col + j, tile.cols - j);
      }
      if (p.c.write == Write::add) {
        y = y + load<V>(to + j, tile.cols - j);
      }
      if (stream_all) {
        stream(y, to + j);
      } else {
        store(y, to + j, tile.cols - j);
      }
    }
  }
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE::kernel

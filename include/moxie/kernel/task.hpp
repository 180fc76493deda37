// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/buffer.hpp>
#include <moxie/kernel/blocking.hpp>
#include <moxie/kernel/epilogue.hpp>
#include <moxie/kernel/packing.hpp>
#include <moxie/kernel/prefetch.hpp>

/// A task: one block of one product. One thread computes it without a break.
namespace moxie::inline MOXIE_NAMESPACE::kernel::detail {

template <class Scalar, class Arch>
constexpr TileShape tile_shape() {
  using T = RegisterTile<Scalar, Arch>;
  return {T::rows, T::cols, Index{sizeof(Scalar)}};
}

template <class Arch, class P>
ProductShape shape_of(const P& p) {
  return {p.m, Panels<typename P::Scalar, Arch, typename P::Element>{p.n, p.gated}.count(), p.steps(), p.a.transposed(),
          p.panels != nullptr};
}

/// Appends steps [s0, s0 + steps) of panels [q, q + count) of a product: two runs a panel.
template <class Arch, class P>
void queue_panels(PrefetchQueue& queue, const P& p, Index q, Index count, Index s0, Index steps) {
  using T = RegisterTile<typename P::Scalar, Arch>;
  for (Index v = 2 * q; v < 2 * (q + count) && !queue.full(); ++v) {
    if (p.panels != nullptr) {  // every other line
      const auto* panel = p.panels + (v / 2 * p.steps() + s0) * T::cols;
      const Index lines = (steps * T::cols * Index{sizeof(*panel)} + cache_line - 1) / cache_line;
      queue.add({reinterpret_cast<const std::byte*>(panel) + v % 2 * cache_line, 2 * cache_line, (lines + 1 - v % 2) / 2});
    } else {
      const Panels<typename P::Scalar, Arch, typename P::Element> all{p.n, p.gated};
      p.b.visit([&](const auto& b) { queue.add(all.source(b, v / 2, v % 2, s0, steps)); });
    }
  }
}

/// Appends the panels that a task of a product needs first.
template <class Arch, class P>
void queue_first_panels(PrefetchQueue& queue, const P& p, const Blocking& blocking, Index task) {
  const ProductShape shape = shape_of<Arch>(p);
  const Index q = task % blocking.panel_blocks(shape) * blocking.nc;
  queue_panels<Arch>(queue, p, q, (std::min)(blocking.nc, shape.panels - q), 0, (std::min)(blocking.kc, shape.steps));
}

/// The task `task` of a product: rows [m0, m1) of C, panels [q0, q0 + count).
///
///     for each pass over k:                         (jc, pc of Goto and van de Geijn)
///       for each group of panels:    pack them      (in L2)
///         for each tile of rows:     pack A's rows where they are transposed
///           for each panel of the group:  micro-kernel, epilogue
template <class P, class Arch>
class Task {
  using Scalar = typename P::Scalar;
  using Element = typename P::Element;
  using T = RegisterTile<Scalar, Arch>;
  static constexpr Index elements = UnitOf<Element>::elements;

 public:
  /// `memory` belongs to the thread.
  Task(const P& product, Index index, const Epilogue<Scalar>& epilogue, const Blocking& blocking, Index task,
       Buffer<std::byte>& memory)
      : product_(product), epilogue_(epilogue), blocking_(blocking), index_(index), panels_{product.n, product.gated} {
    const ProductShape shape = shape_of<Arch>(product);
    m0_ = task / blocking.panel_blocks(shape) * blocking.mc;
    m1_ = (std::min)(product.m, m0_ + blocking.mc);
    q0_ = task % blocking.panel_blocks(shape) * blocking.nc;
    count_ = (std::min)(blocking.nc, shape.panels - q0_);
    tiles_ = (m1_ - m0_ + T::rows - 1) / T::rows;
    // Rows that lie a multiple of 4 KiB apart share the sets of the L1 cache: a tile of them is copied.
    copy_rows_ = product.a.transposed() || product.a.rows.stride * Index{sizeof(Element)} % 4096 == 0;
    // Rows that fit the L2 cache meet one panel after the other, while the next panel arrives.
    const bool rows_fit = (m1_ - m0_) * product.k * Index{sizeof(Element)} <= l2_cache() / 2;
    group_ = blocking.passes == 1 && !copy_rows_ && rows_fit ? Index{1} : count_;
    // Few rows make short steps. The processor's own prefetcher is faster over prepacked panels
    // then.
    prefetches_ = product.panels == nullptr || m1_ - m0_ > 4;
    take_memory(memory);
  }

  /// `queue_next(queue)` appends the panels of the thread's next task.
  template <class QueueNext>
  void run(const QueueNext& queue_next) {
    for (Index part = 0; part < count_ * blocking_.passes; part += group_) {
      begin(part);
      queue_.clear();
      if (prefetches_ && part + group_ < count_ * blocking_.passes) {
        const Index s0 = (pass_ + (part % count_ + group_ == count_ ? 1 : 0)) * blocking_.kc;
        queue_panels<Arch>(queue_, product_, q0_ + (part + group_) % count_, group_, s0,
                           (std::min)(blocking_.kc, product_.steps() - s0));
      } else if (prefetches_) {
        queue_next(queue_);
      }
      pack_panels();
      for (Index tile = 0, row = m0_; tile < tiles_; ++tile) {
        row += multiply_tile_row(part, tile, row);
      }
    }
  }

 private:
  /// Places packed panels, packed rows of A and sums, each in different sets of the cache.
  void take_memory(Buffer<std::byte>& memory) {
    const bool prepacked = product_.panels != nullptr;
    copy_stride_ = moxie::detail::spread_stride<Scalar>(blocking_.kc);
    packed_tile_stride_ = moxie::detail::spread_stride<Scalar>(blocking_.kc * T::rows);
    packed_panel_stride_ = moxie::detail::spread_stride<Scalar>(blocking_.kc * T::cols);
    const Index panels = prepacked ? 0 : group_ * packed_panel_stride_;
    const Index copies = copy_rows_ ? T::rows * copy_stride_ : 0;
    const Index rows = product_.a.transposed() ? packed_tiles * packed_tile_stride_ : copies;
    const Index first_row = moxie::detail::spread_stride<Scalar>(panels);
    const Index first_sum = first_row + moxie::detail::spread_stride<Scalar>(rows);
    const Index sums = (blocking_.passes > 1 ? tiles_ * group_ : 1) * T::size;
    // Few sizes, so that a thread takes its memory once: small tasks touch little of half a MiB, and a large page holds most
    // others.
    const Index bytes = (first_sum + sums) * Index{sizeof(Scalar)};
    const auto large = Index{moxie::detail::large_page};
    memory.resize(bytes <= large / 4 ? large / 4 : (bytes + large - 1) / large * large);
    auto* const start = reinterpret_cast<Scalar*>(memory.data());
    packed_panels_ = reinterpret_cast<Unit<Element>*>(start);
    packed_rows_ = reinterpret_cast<Unit<Element>*>(start + first_row);
    sums_ = start + first_sum;
  }

  /// Panels [first_, first_ + group_) of a pass.
  void begin(Index part) {
    pass_ = part / count_;
    first_ = q0_ + part % count_;
    const Index s0 = pass_ * blocking_.kc;
    k0_ = s0 * elements;
    depth_ = (std::max)(Index{0}, (std::min)(blocking_.kc * elements, product_.k - k0_));
    last_pass_ = pass_ + 1 == blocking_.passes;
    // A brief tile ends before its prefetches arrive, so it prefetches the lines of the next one.
    brief_ = depth_ < 2 * T::cols * elements;
    const bool prepacked = product_.panels != nullptr;
    panel_ = prepacked ? product_.panels + (first_ * product_.steps() + s0) * T::cols : packed_panels_;
    panel_stride_ = prepacked ? product_.steps() * T::cols : packed_panel_stride_;
    // The first tile packs whole panels whose columns lie side by side in B.
    const bool side_by_side = !product_.b.transposed() && !product_.gated;
    packing_ = prepacked || !side_by_side ? 0 : std::clamp(product_.n / T::cols - first_, Index{0}, group_);
  }

  /// Packs the panels that the first tile does not pack.
  void pack_panels() {
    if (product_.panels != nullptr || packing_ == group_) {
      return;
    }
    // A single tile ends long before all lines of the next panel arrive, so packing prefetches half
    // of them.
    const bool share = product_.b.transposed() && group_ == 1 && tiles_ == 1;
    const PrefetchRun next = share ? queue_.take() : PrefetchRun{};
    product_.b.visit([&](const auto& b) {
      panels_.pack(b, {first_ + packing_, group_ - packing_, k0_, depth_}, packed_panels_ + packing_ * packed_panel_stride_,
                   packed_panel_stride_, next);
    });
  }

  /// One tile of rows, from `row` on, over the group's panels. Returns its rows.
  Index multiply_tile_row(Index part, Index tile, Index row) {
    if (product_.a.transposed()) {
      const Index rows = (std::min)(T::rows, m1_ - row);
      const Index local = tile % packed_tiles;
      if (local == 0) {
        const Index packed = (std::min)(packed_tiles * T::rows, m1_ - row);
        pack_transposed_rows<Scalar, Arch>(product_.a, k0_, depth_, row, packed, packed_rows_, packed_tile_stride_);
      }
      const Unit<Element>* a = packed_rows_ + local * packed_tile_stride_;
      multiply_group<true>(part, tile, row, rows, &a);
      return rows;
    }
    // Heights that differ by two at most.
    const Index left = tiles_ - tile;
    const Index rows = (std::min)((m1_ - row + 2 * left - 1) / (2 * left) * 2, m1_ - row);
    const Element* a[std::size_t(T::rows)];
    for (Index r = 0; r < rows; ++r) {
      a[r] = product_.a.row(row + r) + k0_;
      if (copy_rows_) {
        Element* copy = reinterpret_cast<Element*>(packed_rows_ + r * copy_stride_);
        std::copy_n(a[r], depth_, copy);
        a[r] = copy;
      }
    }
    std::fill(a + rows, a + T::rows, a[0]);
    multiply_group<false>(part, tile, row, rows, a);
    return rows;
  }

  template <bool Packed>
  void multiply_group(Index part, Index tile, Index row, Index rows, TileRows<Packed, Element> a) {
    for (Index q = 0; q < group_; ++q) {
      Scalar* const sums = sums_ + (blocking_.passes > 1 ? tile * group_ + q : 0) * T::size;
      const Index col = (first_ + q) * panels_.outputs();
      const TileSums<Scalar> result{index_, row, rows, col, panels_.outputs_of(first_ + q), sums, T::cols};
      list_prefetches(part, tile, q, result);
      const PrefetchRun* const runs = list_.ordered(depth_ / elements, sums_);
      const bool packs = tile == 0 && q < packing_;
      const Index height =
          packs ? tile_height<Packed, true, Scalar, Arch>(rows) : tile_height<Packed, false, Scalar, Arch>(rows);
      const TileEnd<Scalar> end = end_of(result, height);
      if (packs) {
        product_.b.visit([&]<class Source>(const Operand<Source>& b) {
          const PackingPanel<Scalar, Element, Arch, Source> panel{b, k0_, k0_ + depth_, col,
                                                                  packed_panels_ + q * packed_panel_stride_};
          multiply_rows<Packed, true, Scalar, Element, Arch>(rows, depth_, a, panel, end, runs);
        });
      } else {
        const PackedPanel<Scalar, Element, Arch> panel{panel_ + q * panel_stride_};
        multiply_rows<Packed, false, Scalar, Element, Arch>(rows, depth_, a, panel, end, runs);
      }
      if (last_pass_ && end.rows == sums) {
        epilogue_.apply != nullptr ? epilogue_.apply(epilogue_.context, result) : store_tile<Arch>(product_, result);
      }
    }
  }

  /// The destination of a tile's sums: C if nothing else is to be done to them, else `sums`.
  TileEnd<Scalar> end_of(const TileSums<Scalar>& tile, Index height) const {
    auto* const sums = const_cast<Scalar*>(tile.sums);
    TileEnd<Scalar> end{.rows = sums, .stride = T::cols, .before = pass_ > 0 ? sums : nullptr};
    const bool plain = epilogue_.apply == nullptr && product_.bias == nullptr;
    if (last_pass_ && plain && tile.cols == T::cols && height == tile.rows) {
      if (Scalar* const to = evenly_spaced_rows(product_, tile.row, tile.rows, tile.col); to != nullptr) {
        end.rows = to;
        end.stride = product_.c.rows.stride;
        end.add = product_.c.write == Write::add;
        end.stream = product_.c.write == Write::stream;
        MOXIE_ASSERT(!end.stream || on_lines(RowView<Scalar>(to, tile.rows, tile.cols, end.stride)));
      }
    }
    return end;
  }

  /// Lists the memory that a tile prefetches: the memory of its epilogue, the next tile's rows of
  /// A, and its part of the next panels.
  void list_prefetches(Index part, Index tile, Index q, const TileSums<Scalar>& now) {
    list_.clear();
    const bool last_panel = q + 1 == group_;
    const Index next_row = now.row + now.rows;
    const Index next_rows = (std::min)(now.rows, m1_ - next_row);
    if (last_pass_) {
      TileSums<Scalar> touched = now;
      touched.cols = panels_.outputs();
      if (brief_ && last_panel) {
        touched.row = next_row;
        touched.rows = next_rows;
        touched.col = first_ * panels_.outputs();
      } else if (brief_) {
        touched.col += panels_.outputs();
      }
      if (touched.rows > 0 && epilogue_.apply == nullptr) {
        prefetch_destination(product_, list_, touched.row, touched.rows, touched.col, touched.cols);
      } else if (touched.rows > 0 && epilogue_.prefetch != nullptr) {
        epilogue_.prefetch(epilogue_.context, list_, touched);
      }
    }
    if (!product_.a.transposed() && last_panel && (group_ > 1 || part == 0)) {  // else they are in the L2 cache
      for (Index r = next_row; r < next_row + next_rows; ++r) {
        list_.add(product_.a.row(r) + k0_, depth_);
      }
    }
    list_.read(queue_.take((tiles_ - tile) * group_ - q, depth_ / elements - list_.steps()));
  }

  static constexpr Index packed_tiles = Blocking::packed_rows({T::rows, T::cols, 0}) / T::rows;

  const P& product_;
  const Epilogue<Scalar>& epilogue_;
  const Blocking& blocking_;
  Index index_;
  Panels<Scalar, Arch, Element> panels_;
  Index m0_, m1_, q0_, count_, tiles_;
  bool copy_rows_;
  bool prefetches_;
  Index group_;  // panels that meet a tile one after the other
  Index copy_stride_, packed_tile_stride_, packed_panel_stride_;
  Unit<Element>* packed_panels_;
  Unit<Element>* packed_rows_;
  Scalar* sums_;
  // State of the present pass and group:
  Index pass_, first_, k0_, depth_, packing_, panel_stride_;
  bool last_pass_, brief_;
  const Unit<Element>* panel_;
  PrefetchQueue queue_;
  PrefetchList list_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel::detail

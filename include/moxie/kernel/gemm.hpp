// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <moxie/core/buffer.hpp>
#include <moxie/core/exec.hpp>
#include <moxie/kernel/cache.hpp>
#include <moxie/kernel/pack.hpp>
#include <thread>
#include <type_traits>
#include <vector>

namespace moxie::kernel {

/// Where a product goes, and whether it replaces or is added to what is there, or goes past the caches.
template <class Scalar>
struct Destination {
  Rows<Scalar> rows;
  bool add = false;
  bool stream = false;  ///< only where all rows start with cache lines, and nothing is added: see `stream_to`

  Scalar* row(Index r) const { return rows.row(r); }
};

/// C (m,n) = A (m,k) B (k,n), or C += A B. The sums are Scalars. What is multiplied are Elements: A holds them, and B is
/// rounded to them.
template <class Scalar_, class Element_ = Scalar_, class Source_ = Element_>
struct Product {
  using Scalar = Scalar_;
  using Element = Element_;
  using Source = Source_;

  Index m = 0;
  Index n = 0;
  Index k = 0;
  Operand<Element> a = {};
  Operand<Source> b = {};
  Destination<Scalar> c = {};
  /// B has 2n columns, column n + j beside column j: whoever finishes the tiles makes one number of the two.
  bool halves = false;
  /// B's panels, as `pack_panels` made them, instead of B.
  const Unit<Element>* panels = nullptr;

  Index steps() const { return (k + UnitOf<Element>::elements - 1) / UnitOf<Element>::elements; }
};

template <class T>
Rows<T> rows_of(RowView<T> m, const Index* index = nullptr) {
  return {m.data(), m.stride(), index};
}
/// The rows of `top`, then those of `bottom`, which has the same stride.
template <class T>
Rows<T> stacked(RowView<T> top, RowView<T> bottom) {
  MOXIE_ASSERT(top.stride() == bottom.stride());
  return {top.data(), top.stride(), nullptr, top.rows(), bottom.data() - top.row(top.rows())};
}
template <class Scalar>
Operand<Scalar> plain(RowView<const std::type_identity_t<Scalar>> m, const Index* index = nullptr) {
  return {rows_of(m, index), false};
}
template <class Scalar>
Operand<Scalar> transposed(RowView<const std::type_identity_t<Scalar>> m, const Index* index = nullptr) {
  return {rows_of(m, index), true};
}
template <class Scalar>
Destination<Scalar> replace(RowView<std::type_identity_t<Scalar>> m, const Index* index = nullptr) {
  return {rows_of(m, index), false};
}
/// Whether all rows start with a cache line.
template <class T>
bool on_lines(RowView<T> m) {
  constexpr std::size_t line = 64;
  return reinterpret_cast<std::uintptr_t>(m.data()) % line == 0 && std::size_t(m.stride()) * sizeof(T) % line == 0;
}
/// Whether what another pass reads later is better written to m past the caches: all rows start with lines, and m is more than
/// a sixteenth of the second-level cache. What is computed meanwhile has displaced so much, and another thread may read it.
template <class T>
bool is_streamed(RowView<T> m) {
  return on_lines(m) && m.size() * Index{sizeof(T)} > second_level_cache() / 16;
}
/// As `replace`, to rows [first, ...) of m, but where it `is_streamed`, the whole panels of tiles go past the caches.
/// `run_stages` sees to it that other threads see them.
template <class Scalar, class Arch = DefaultArch>
Destination<Scalar> stream_to(RowView<std::type_identity_t<Scalar>> m, Index first = 0) {
  return {{m.data() + first * m.stride(), m.stride(), nullptr}, false, fill_lines<Batch<Scalar, Arch>, 2> && is_streamed(m)};
}
template <class Scalar>
Destination<Scalar> add_to(RowView<std::type_identity_t<Scalar>> m, const Index* index = nullptr) {
  return {rows_of(m, index), true};
}

/// How many units the panels of all of B take.
template <class Arch = DefaultArch, class Scalar, class Element, class Source>
Index panels_size(const Product<Scalar, Element, Source>& p) {
  return Panels<Scalar, Arch, Element>{p.n, p.halves}.count() * p.steps() * detail::Tile<Scalar, Arch>::cols;
}
/// Packs all of B, so that products with the same B need not pack it each time: set `Product::panels` to `out`, which is
/// aligned and holds `panels_size` units.
template <class Arch = DefaultArch, class Scalar, class Element, class Source>
void pack_panels(const Product<Scalar, Element, Source>& p, Unit<Element>* out) {
  const Panels<Scalar, Arch, Element> panels{p.n, p.halves};
  panels.pack(p.b, 0, panels.count(), 0, p.k, out, p.steps() * detail::Tile<Scalar, Arch>::cols);
}

/// The usual end of a product: a row of a tile goes to C, or all of them at once.
///
/// What finishes a product is called once for every row of every tile: `finish(product, i, row, col, n, values)` with the
/// number i of the product and n sums (pairs of sums, where B has halves: a vector of the first, a vector of the second) for
/// columns [col, col + n) of C. `values` is aligned and holds two vectors. Where it has `rows_of`, and that is not null, sums
/// of whole tiles go there instead. Where it has `prefetch(ahead, product, i, row, rows, col, n)`, it tells `ahead` what it
/// will touch at the end of such a tile.
struct Store {
  void prefetch(auto& ahead, const auto& p, Index /*i*/, Index row, Index rows, Index col, Index n) const {
    if (p.c.stream && col + n <= p.n) {
      return;
    }
    if (auto* const first = rows_of(p, row, rows, col); first != nullptr) {
      ahead.add(first, p.c.rows.stride, rows, n);
      return;
    }
    for (Index r = row; r < row + rows; ++r) {
      ahead.add(p.c.row(r) + col, n);
    }
  }

  /// Where the first of so many rows goes, if they lie at equal distances; else null.
  template <class P>
  typename P::Scalar* rows_of(const P& p, Index row, Index rows, Index col) const {
    const auto& c = p.c.rows;
    return c.index == nullptr && (row >= c.gap_at || row + rows <= c.gap_at) ? c.row(row) + col : nullptr;
  }

  template <class Arch, class P>
  void operator()(Arch /*arch*/, const P& p, Index /*i*/, Index row, Index col, Index n,
                  const typename P::Scalar* values) const {
    using Scalar = typename P::Scalar;
    using T = detail::Tile<Scalar, Arch>;
    using B = Batch<Scalar, Arch>;
    Scalar* to = p.c.row(row) + col;
    if (n < T::cols) {
      for (Index j = 0; j < n; ++j) {
        to[j] = p.c.add ? to[j] + values[j] : values[j];
      }
      return;
    }
    B v0 = B::load_aligned(values);
    B v1 = B::load_aligned(values + T::width);
    if (p.c.add) {
      v0 += B::load_unaligned(to);
      v1 += B::load_unaligned(to + T::width);
    }
    if (p.c.stream) {
      stream(v0, to);
      stream(v1, to + T::width);
    } else {
      v0.store_unaligned(to);
      v1.store_unaligned(to + T::width);
    }
  }
};

/// Ends a product with a bias: C (m,n) = A B + b, b a row of numbers that `bias(i)` points to.
template <class Scalar, class BiasOf>
struct StoreWithBias {
  BiasOf bias;

  template <class Arch>
  void operator()(Arch /*arch*/, const auto& p, Index e, Index row, Index col, Index n, const Scalar* values) const {
    using V = Batch<Scalar, Arch>;
    const Scalar* b = bias(e) + col;
    Scalar* to = p.c.row(row) + col;
    const bool stream_all = p.c.stream && n == detail::Tile<Scalar, Arch>::cols;
    for (Index j = 0; j < n; j += Index{V::size}) {
      const V y = V::load_aligned(values + j) + load<V>(b + j, n - j);
      if (stream_all) {
        stream(y, to + j);
      } else {
        store(y, to + j, n - j);
      }
    }
  }
};

template <class Scalar, class BiasOf>
StoreWithBias<Scalar, BiasOf> store_with_bias(BiasOf bias) {
  return {bias};
}

/// A `finish` of two functions.
template <class Call, class Prefetch>
struct Finish {
  Finish(Call of_tile, Prefetch before) : call(std::move(of_tile)), prefetch(std::move(before)) {}

  Call call;
  Prefetch prefetch;

  template <class... Arguments>
  void operator()(Arguments&&... arguments) const {
    call(std::forward<Arguments>(arguments)...);
  }
};

namespace detail {

/// How a product is cut. Only `depth` touches the bits of a result, and it depends on k and on whether A is
/// transposed alone.
template <class P, class Arch>
struct Cut {
  using Scalar = typename P::Scalar;
  using T = Tile<Scalar, Arch>;
  static constexpr Index most_rows = 1020 / T::rows * T::rows;
  /// Steps of a pass: all of most layers' widths; few where both factors have to be packed, so that many columns share one A.
  static constexpr Index longest = 1536;
  static constexpr Index longest_transposed = 256;
  /// Of a transposed A so many are copied at once, so that whole cache lines of its rows are read.
  static constexpr Index copied_rows = 8 * T::rows;

  Index passes = 1;  // over k
  Index depth = 0;   // of a pass, in steps; the last may be shorter
  Index rows = 0;    // of a task
  Index panels = 0;  // of a task

  /// `shrink` halves the tasks as often.
  Cut(const P& p, Index shrink) {
    const Index most = p.a.transposed ? longest_transposed : longest;
    passes = std::max(Index{1}, (p.steps() + most - 1) / most);
    depth = (p.steps() + passes - 1) / passes;
    const Index all_panels = panels_of(p).count();
    // Two fifths of the second-level cache for the panels of a pass, and as much for sums between passes.
    const Index budget = second_level_cache() * 2 / 5 / Index{sizeof(Scalar)};
    panels = std::clamp(budget / std::max(Index{1}, depth * T::cols), Index{1}, std::max(Index{1}, all_panels));
    rows = most_rows;
    if (passes > 1) {
      rows = std::clamp(budget / (panels * T::cols) / T::rows * T::rows, T::rows, most_rows);
    }
    for (; shrink > 0; --shrink) {
      if (p.a.transposed && rows >= 2 * copied_rows) {  // each part of the panels would copy all rows again
        rows = rows / 2 / copied_rows * copied_rows;
      } else if (panels > 1) {
        panels = (panels + 1) / 2;
      } else {
        rows = std::max(T::rows, rows / 2 / T::rows * T::rows);
      }
    }
    // Tasks of about the same size.
    panels = even(all_panels, panels, 1);
    rows = even(p.m, rows, T::rows);
  }

  static Panels<Scalar, Arch, typename P::Element> panels_of(const P& p) { return {p.n, p.halves}; }
  Index row_tasks(const P& p) const { return (p.m + rows - 1) / rows; }
  Index panel_tasks(const P& p) const { return (panels_of(p).count() + panels - 1) / panels; }
  Index tasks(const P& p) const { return row_tasks(p) * panel_tasks(p); }

 private:
  /// The size of parts, a multiple of `unit`, when n is cut into as few parts of at most `most`, all about equal.
  static Index even(Index n, Index most, Index unit) {
    const Index parts = std::max(Index{1}, (n + most - 1) / most);
    return std::max(unit, ((n + parts - 1) / parts + unit - 1) / unit * unit);
  }
};

/// Memory that is needed next, in runs, for which the tiles until then ask.
template <class Scalar, class Arch>
class Lookahead {
 public:
  void clear() {
    count_ = 0;
    next_ = 0;
    asked_ = 0;
  }
  /// Panels [q, q + panels) of a product, steps [s0, s0 + steps): two runs a panel.
  template <class P>
  void add_panels(const P& product, Index q, Index panels, Index s0, Index steps) {
    using T = Tile<Scalar, Arch>;
    for (Index v = 2 * q; v < 2 * (q + panels) && count_ < most; ++v) {
      if (product.panels != nullptr) {  // every other line
        const auto* panel = product.panels + (v / 2 * product.steps() + s0) * T::cols;
        const Index lines = (steps * T::cols * Index{sizeof(*panel)} + 63) / 64;
        runs_[std::size_t(count_++)] = {reinterpret_cast<const std::byte*>(panel) + v % 2 * 64, 128, (lines + 1 - v % 2) / 2};
      } else {
        const Panels<Scalar, Arch, typename P::Element> all{product.n, product.halves};
        runs_[std::size_t(count_++)] = all.source(product.b, v / 2, v % 2, s0, steps);
      }
    }
  }
  /// The next run, all of it.
  Run take() { return next_ < count_ ? runs_[std::size_t(next_++)] : Run{}; }
  /// What the first of so many tiles, at least one, asks for, in up to so many steps. Tiles that are not needed for it ask for
  /// nothing, so that what the last ones ask for is still there; where there are fewer tiles than runs, one asks for two runs,
  /// and the ends of runs are left out.
  Run take(Index tiles, Index steps) {
    MOXIE_ASSERT(tiles > 0);
    if (asked_ > 0 && tiles < count_ - next_) {
      ++next_;
      asked_ = 0;
    }
    if (next_ == count_ || steps < 1) {
      return {};
    }
    const Run& run = runs_[std::size_t(next_)];
    const bool begun = next_ > 0 || asked_ > 0;
    if (!begun && tiles > count_ * std::max(Index{1}, (run.lines + steps - 1) / steps)) {  // runs are about equal
      return {};
    }
    if (asked_ == 0 && tiles < count_ - next_) {
      const Run& second = runs_[std::size_t(next_ + 1)];
      next_ += 2;
      return {run.from, run.pitch, std::min(steps, run.lines), second.lines > 0 ? second.from - run.from : 0};
    }
    const Run part{run.from + asked_ * run.pitch, run.pitch, std::min(steps, run.lines - asked_)};
    asked_ += part.lines;
    if (asked_ >= run.lines) {
      ++next_;
      asked_ = 0;
    }
    return part;
  }

 private:
  static constexpr Index most = 32;
  std::array<Run, std::size_t(most)> runs_;
  Index count_ = 0;
  Index next_ = 0;   // of the runs
  Index asked_ = 0;  // lines of it
};

/// Memory of a thread that lasts from task to task: one large page, which the largest task fits, so that it is taken once.
template <class Scalar, class Element>
class TaskMemory {
 public:
  /// So many units of panels and of rows, and so many sums.
  void resize(Index panels, Index rows, Index sums) {
    rows_ = moxie::detail::spread_stride<Scalar>(panels);
    sums_ = rows_ + moxie::detail::spread_stride<Scalar>(rows);
    block_.resize(std::max(sums_ + sums, Index{moxie::detail::large_page / sizeof(Scalar)}));
  }
  Unit<Element>* panels() { return at<Unit<Element>>(0); }
  template <class T>
  T* rows() {
    return at<T>(rows_);
  }
  Scalar* sums() { return block_.data() + sums_; }

 private:
  static_assert(sizeof(Unit<Element>) == sizeof(Scalar));

  template <class T>
  T* at(Index offset) {
    return reinterpret_cast<T*>(block_.data() + offset);
  }

  Buffer<Scalar> block_;
  Index rows_ = 0;
  Index sums_ = 0;
};

/// The `task`-th part of product i, while the memory of a later task is fetched: `prepare(later)` says which.
template <class Arch, class P, class Finish, class Prepare>
void multiply_part(const P& product, Index i, const Cut<P, Arch>& cut, Index task, const Finish& finish,
                   const Prepare& prepare) {
  using Scalar = typename P::Scalar;
  using Element = typename P::Element;
  using T = Tile<Scalar, Arch>;
  constexpr Index elements = UnitOf<Element>::elements;
  thread_local TaskMemory<Scalar, Element> memory;
  Lookahead<Scalar, Arch> later;
  Ahead ahead;
  const auto panels = cut.panels_of(product);
  const Index m0 = task / cut.panel_tasks(product) * cut.rows;
  const Index m1 = std::min(product.m, m0 + cut.rows);
  const Index q0 = task % cut.panel_tasks(product) * cut.panels;
  const Index count = std::min(cut.panels, panels.count() - q0);
  const Index tiles = (m1 - m0 + T::rows - 1) / T::rows;
  // Rows that lie a multiple of 4 KiB apart share the sets of the first-level cache: a tile of them is copied.
  const bool copy_rows = product.a.transposed || product.a.rows.stride * Index{sizeof(Element)} % 4096 == 0;
  constexpr Index copied_tiles = Cut<P, Arch>::copied_rows / T::rows;
  // What is packed side by side starts in different sets of the cache. In units.
  const Index copied_stride = moxie::detail::spread_stride<Scalar>(cut.depth);
  const Index copied_tile_stride = moxie::detail::spread_stride<Scalar>(cut.depth * T::rows);
  const Index packed_stride = moxie::detail::spread_stride<Scalar>(cut.depth * T::cols);

  // Where the rows fit the second-level cache, panel by panel: all rows meet a panel while the next one is fetched.
  const Index group =
      cut.passes == 1 && !copy_rows && (m1 - m0) * product.k * Index{sizeof(Element)} <= second_level_cache() / 2 ? Index{1}
                                                                                                                  : count;
  const bool packed = product.panels != nullptr;
  const bool side_by_side = !product.b.transposed && !product.halves;  // a panel's columns, in B
  const Index panel_stride = packed ? product.steps() * T::cols : packed_stride;
  // Steps of few rows are short: the processor reads packed panels far ahead of them by itself, and asking would be in its way.
  const bool asks = !packed || m1 - m0 > 4;

  memory.resize(packed ? 0 : group * packed_stride,
                product.a.transposed ? copied_tiles * copied_tile_stride
                : copy_rows          ? T::rows * copied_stride
                                     : 0,
                (cut.passes > 1 ? tiles * group : 1) * T::size);
  for (Index part = 0; part < count * cut.passes; part += group) {
    const Index pass = part / count;
    const Index first = q0 + part % count;
    const Index s0 = pass * cut.depth;
    const Index k0 = s0 * elements;
    const Index depth = std::max(Index{0}, std::min(cut.depth * elements, product.k - k0));
    const bool last = pass + 1 == cut.passes;
    // Such a tile is over before what it asks for is there: it asks for the lines of the next one.
    const bool brief = depth < 2 * T::cols * elements;
    const Unit<Element>* panel = packed ? product.panels + (first * product.steps() + s0) * T::cols : memory.panels();
    // So many panels the first tile packs.
    const Index fresh = packed || !side_by_side ? 0 : std::clamp(product.n / T::cols - first, Index{0}, group);
    later.clear();
    if (asks && part + group < count * cut.passes) {
      const Index next = (pass + (part % count + group == count ? 1 : 0)) * cut.depth;
      later.add_panels(product, q0 + (part + group) % count, group, next, std::min(cut.depth, product.steps() - next));
    } else if (asks) {
      prepare(later);
    }
    if (!packed && fresh < group) {  // a single tile is over long before all lines are there: half are asked for while packing
      panels.pack(product.b, first + fresh, group - fresh, k0, depth, memory.panels() + fresh * packed_stride, packed_stride,
                  product.b.transposed && group == 1 && tiles == 1 ? later.take() : Run{});
    }
    for (Index tile = 0, row = m0; tile < tiles; ++tile) {
      // Heights that differ by two at most, unless tiles are copied by whole vectors.
      const Index left = tiles - tile;
      const Index rows =
          product.a.transposed ? std::min(T::rows, m1 - row) : std::min((m1 - row + 2 * left - 1) / (2 * left) * 2, m1 - row);
      // Computes the tile's sums, and asks on the way for later memory: the last tiles do, so that it is still there then.
      const auto multiply = [&, row, rows, tile]<bool Packed>(std::bool_constant<Packed> /*packed*/,
                                                              TileRows<Packed, Element> a) {
        for (Index q = 0; q < group; ++q) {
          Scalar* sums = memory.sums() + (cut.passes > 1 ? tile * group + q : 0) * T::size;
          const Index col = (first + q) * panels.outputs();
          ahead.clear();
          const Index next_row = row + rows;
          const Index next_rows = std::min(rows, m1 - next_row);
          const bool last_panel = q + 1 == group;
          if constexpr (requires { finish.prefetch(ahead, product, i, row, rows, col, col); }) {
            const bool next = brief && last_panel;
            if (last && (!next || next_rows > 0)) {
              const Index at = next ? first * panels.outputs() : brief ? col + panels.outputs() : col;
              finish.prefetch(ahead, product, i, next ? next_row : row, next ? next_rows : rows, at, panels.outputs());
            }
          }
          if (!product.a.transposed && last_panel && (group > 1 || part == 0)) {  // else they are in the second-level cache
            for (Index r = next_row; r < next_row + next_rows; ++r) {
              ahead.add(product.a.row(r) + k0, depth);
            }
          }
          ahead.read(later.take((tiles - tile) * group - q,
                                depth / elements - Ahead::steps(ahead.reads()) - Ahead::steps(ahead.writes())));
          const Index n = panels.outputs_of(first + q);
          TileEnd<Scalar> end{.rows = sums, .stride = T::cols, .before = pass > 0 ? sums : nullptr};
          bool at_once = false;
          if constexpr (requires { finish.rows_of(product, row, rows, col); }) {
            if (last && n == T::cols && height_of<Packed, Scalar, Arch>(rows) == rows) {
              if (Scalar* const to = finish.rows_of(product, row, rows, col); to != nullptr) {
                MOXIE_ASSERT(!product.c.stream || on_lines(RowView<Scalar>(to, rows, n, product.c.rows.stride)));
                end = {.rows = to,
                       .stride = product.c.rows.stride,
                       .add = product.c.add,
                       .stream = product.c.stream,
                       .before = end.before};
                at_once = true;
              }
            }
          }
          const auto of = [&]<class PanelOf>(const PanelOf& b) {
            tile_of<Packed, Scalar, Element, Arch, PanelOf>(rows)(depth, a, b, end, ahead);
          };
          if (tile == 0 && q < fresh) {
            of(FreshPanel<Scalar, Element, Arch, typename P::Source>{product.b, k0, k0 + depth, col,
                                                                     memory.panels() + q * packed_stride});
          } else {
            of(Panel<Scalar, Element, Arch>{panel + q * panel_stride});
          }
          if (last && !at_once) {
            for (Index r = 0; r < rows; ++r) {
              finish(Arch{}, product, i, row + r, col, n, sums + r * T::cols);
            }
          }
        }
      };
      if (product.a.transposed) {
        const Index local = tile % copied_tiles;
        Unit<Element>* const copies = memory.template rows<Unit<Element>>();
        if (local == 0) {
          const Index copied = std::min(Cut<P, Arch>::copied_rows, m1 - row);
          pack_transposed_rows<Scalar, Arch>(product.a, k0, depth, row, copied, copies, copied_tile_stride);
        }
        const Unit<Element>* a = copies + local * copied_tile_stride;
        multiply(std::true_type{}, &a);
      } else {
        const Element* a[T::rows];
        for (Index r = 0; r < rows; ++r) {
          a[r] = product.a.row(row + r) + k0;
          if (copy_rows) {
            Element* copy = memory.template rows<Element>() + r * copied_stride * elements;
            std::copy_n(a[r], depth, copy);
            a[r] = copy;
          }
        }
        std::fill(a + rows, a + height_of<false, Scalar, Arch>(rows), a[0]);
        multiply(std::false_type{}, a);
      }
      row += rows;
    }
  }
}

template <class F>
struct AtExit {
  F f;
  ~AtExit() { f(); }
};
template <class F>
AtExit(F) -> AtExit<F>;

}  // namespace detail

/// `count` products that may run side by side. `product(i)` is called several times for an index, by several threads at once.
/// `finish` takes the sums: see `Store`.
template <class ProductOf, class End = Store>
struct Stage {
  explicit Stage(Index products, ProductOf of, End end = {})
      : count(products), product(std::move(of)), finish(std::move(end)) {}

  Index count;
  ProductOf product;
  End finish;
};

/// Computes stages of equally many products, as one list of tasks shared by all threads. Product i of a stage starts when
/// product i of every stage before it has ended; all else runs side by side, without a barrier.
///
/// Products may differ in size; an empty one costs nothing. Accumulation in `Scalar`, one fused multiply-add a step (a multiply
/// and an add where the instruction set has none), over the depth in order, in passes whose depth follows from k and from
/// whether A is transposed: the bits of an element do not depend on the number of threads, on how the product is cut, nor on
/// the other rows and columns. Products that may run side by side must not write the same elements.
template <class Scalar, class Arch = DefaultArch, class... Stages>
void run_stages(const Exec& exec, const Stages&... stages) {
  constexpr Index stage_count = sizeof...(Stages);
  const auto cut_of = []<class P>(const P& product, Index shrink) { return detail::Cut<P, Arch>(product, shrink); };
  struct Part {
    Index stage = 0;
    Index product = 0;
    Index first = 0;   // its first task, of all
    Index needed = 0;  // tasks of earlier stages of this product
  };
  struct Plan {
    std::vector<Part> parts;
    std::vector<Index> tasks;     // of each product, in the stages so far
    std::vector<Index> finished;  // of each product
  };
  thread_local Plan plans;
  Plan& plan = plans;  // the caller's, also inside the parallel region
  const Index count = std::get<0>(std::tie(stages...)).count;

  // Tasks halved until every thread has enough of them to share evenly. Half the rows cost as much packing as all of them, so
  // where there is something to pack rows are halved for a few tasks only.
  std::array<Index, std::size_t(stage_count)> shrink{};
  const Index wanted = exec.thread_count() > 1 ? 16 * exec.thread_count() : 1;
  Index s = 0;
  const auto settle = [&](const auto& stage) {
    MOXIE_ASSERT(stage.count == count);
    for (;; ++shrink[std::size_t(s)]) {
      Index tasks = 0;
      bool smallest = true;
      bool only_rows = true;
      for (Index i = 0; i < count; ++i) {
        const auto p = stage.product(i);
        const auto cut = cut_of(p, shrink[std::size_t(s)]);
        tasks += cut.tasks(p);
        smallest = smallest && cut.panels == 1 && cut.rows <= 4 * detail::Tile<Scalar, Arch>::rows;
        only_rows = only_rows && cut.panels == 1 && p.panels == nullptr;
      }
      if (tasks >= (only_rows ? wanted / 4 : wanted) || smallest) {
        break;
      }
    }
    ++s;
  };
  (settle(stages), ...);

  // Each stage one product behind the one before, so that what it waits for has been claimed long ago.
  plan.parts.clear();
  plan.tasks.assign(std::size_t(count), 0);
  plan.finished.assign(std::size_t(count), 0);
  Index total = 0;
  for (Index i = 0; i < count + stage_count - 1; ++i) {
    s = 0;
    const auto add = [&](const auto& stage) {
      const Index product = i - s;
      if (product >= 0 && product < count) {
        const auto p = stage.product(product);
        const Index tasks = cut_of(p, shrink[std::size_t(s)]).tasks(p);
        plan.parts.push_back({s, product, total, plan.tasks[std::size_t(product)]});
        plan.tasks[std::size_t(product)] += tasks;
        total += tasks;
      }
      ++s;
    };
    (add(stages), ...);
  }
  const auto part_of = [&](Index task) -> const Part& {
    return *(
        std::upper_bound(plan.parts.begin(), plan.parts.end(), task, [](Index t, const Part& part) { return t < part.first; }) -
        1);
  };
  // Calls f(stage, product, cut) for a part.
  const auto with = [&](const Part& part, const auto& f) {
    Index at = 0;
    const auto call = [&](const auto& stage) {
      if (at++ == part.stage) {
        const auto p = stage.product(part.product);
        f(stage, p, cut_of(p, shrink[std::size_t(part.stage)]));
      }
    };
    (call(stages), ...);
  };
  const Index threads = exec.thread_count();
  exec.parallel_for(total, [&](Index task) {
    const Part& part = part_of(task);
    const std::atomic_ref<Index> finished(plan.finished[std::size_t(part.product)]);
    for (Index spins = 0; finished.load(std::memory_order_acquire) < part.needed; ++spins) {
      if (spins > 1000) {
        std::this_thread::yield();
      }
    }
    const detail::AtExit count_as_finished{[&] {  // even if it throws
      end_streams();
      finished.fetch_add(1, std::memory_order_release);
    }};
    const auto prepare = [&](detail::Lookahead<Scalar, Arch>& ahead) {
      const Index next = task + threads;  // this thread's next one, most likely
      if (next < total) {
        const Part& later = part_of(next);
        with(later, [&](const auto& /*stage*/, const auto& p, const auto& cut) {
          const Index q = (next - later.first) % cut.panel_tasks(p) * cut.panels;
          ahead.add_panels(p, q, std::min(cut.panels, cut.panels_of(p).count() - q), 0, std::min(cut.depth, p.steps()));
        });
      }
    };
    with(part, [&](const auto& stage, const auto& p, const auto& cut) {
      detail::multiply_part<Arch>(p, part.product, cut, task - part.first, stage.finish, prepare);
    });
  });
}

/// Computes `product(i)` for i = 0, ..., count-1.
template <class Scalar, class Arch = DefaultArch, class F>
void grouped_gemm(Index count, F&& product, const Exec& exec) {
  run_stages<Scalar, Arch>(exec, Stage(count, std::forward<F>(product)));
}

/// One product: C = A B, or C += A B.
template <class Scalar, class Arch = DefaultArch>
void gemm(const Product<Scalar>& product, const Exec& exec) {
  grouped_gemm<Scalar, Arch>(
      1, [&](Index) { return product; }, exec);
}

}  // namespace moxie::kernel

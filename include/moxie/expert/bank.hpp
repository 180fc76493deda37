// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <memory_resource>
#include <moxie/core/context.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/exchange/grouped_rows.hpp>
#include <moxie/expert/config.hpp>
#include <moxie/kernel/gemm.hpp>
#include <moxie/kernel/rows.hpp>
#include <string>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// Where a bank's backward puts its results.
template <class Scalar>
struct BankGradient {
  RowView<Scalar> rows;              ///< (R,D), overwritten: the gradient of the bank's input
  ParameterView<Scalar> parameters;  ///< added to; tensors may be absent
};

/// E experts over one block of weights: what a layer calls, over all routed rows at once, so that products can be grouped and
/// fused.
///
/// * `Scalar`; `layout()`, `initialize(p, rng)`, `experts()`, `model_dim()`;
/// * `Tape`: what `forward` keeps for `backward`; copyable, made from a `std::pmr::memory_resource*`;
/// * `forward(p, rows, h, keep, context)`: h (R,D) = expert of each row, overwritten, and what is kept into `*keep`. Where keep
///   is null no backward follows. Where h is empty only the tape is wanted;
/// * `backward(p, rows, dout, into, tape, context)`: from the gradient `OutputGradient` of its output. into.rows (R,D) and
///   dout.dweight (R) are overwritten, parameter gradients added. The tape is the forward's, and may be written;
/// * where inference can be faster with weights in another form, `freeze(p, exec)` returns them, and `forward` takes them in
///   place of p.
///
/// Rows are independent, R = 0 is legal, and an expert without rows adds exactly zero. `ExpertBank` makes one of a user's
/// expert.
template <class B>
concept Bank = std::copyable<B> && std::constructible_from<typename B::Tape, std::pmr::memory_resource*> &&
    std::copyable<typename B::Tape> &&
    requires(const B& bank, ParameterView<const typename B::Scalar> p, ParameterView<typename B::Scalar> dp,
             const GroupedRows<typename B::Scalar>& rows, RowView<typename B::Scalar> h,
             const OutputGradient<typename B::Scalar>& dout, const BankGradient<typename B::Scalar>& into,
             typename B::Tape& tape, const Context& context) {
  { bank.layout() } -> std::convertible_to<const Layout&>;
  bank.initialize(dp, Rng(0));
  { bank.experts() } -> std::convertible_to<Index>;
  { bank.model_dim() } -> std::convertible_to<Index>;
  bank.forward(p, rows, h, &tape, context);
  bank.backward(p, rows, dout, into, tape, context);
};

/// What the library's banks keep: a matrix with a row for each row of the bank, spread over the cache.
template <class T>
class KeptRows {
 public:
  KeptRows() = default;
  explicit KeptRows(std::pmr::memory_resource* resource) : numbers_(0, resource) {}

  RowView<T> resize(Index rows, Index width) {
    rows_ = rows;
    width_ = width;
    return numbers_.spread(rows, width);
  }
  RowView<const T> view() const { return numbers_.spread_view(rows_, width_); }

 private:
  Buffer<T> numbers_;
  Index rows_ = 0;
  Index width_ = 0;
};

/// The weights of a bank, packed for its products once: what `freeze` makes of parameters and inference reads instead of them.
/// It does not refer to the parameters, which may change or go.
template <class Scalar, class Element = Scalar>
class FrozenWeights {
 public:
  using Product = kernel::Product<Scalar, Element>;

  /// Of the factors B of these products, numbered from 0, and of vectors (biases).
  FrozenWeights(std::vector<Product> products, const std::vector<RowView<const Scalar>>& vectors, const Exec& exec)
      : products_(std::move(products)) {
    panels_.resize(place(
        products_, [](const Product& product) { return kernel::panels_size(product); }, panel_offsets_));
    vectors_.resize(place(
        vectors, [](RowView<const Scalar> v) { return v.size(); }, vector_offsets_));
    exec.parallel_for(Index(products_.size()), [&](Index i) {
      auto& product = products_[std::size_t(i)];
      kernel::prepack(product, panels_.data() + panel_offsets_[std::size_t(i)]);
      product.b = {};
    });
    for (std::size_t i = 0; i < vectors.size(); ++i) {
      std::copy_n(vectors[i].data(), vectors[i].size(), vectors_.data() + vector_offsets_[i]);
    }
  }

  /// The product without its rows.
  Product product(Index i) const {
    Product out = products_[std::size_t(i)];
    out.panels = panels_.data() + panel_offsets_[std::size_t(i)];
    return out;
  }
  const Scalar* vector(Index i) const { return vectors_.data() + vector_offsets_[std::size_t(i)]; }

 private:
  /// Where each begins in a block, whose size is returned.
  template <class T, class Size>
  static Index place(const std::vector<T>& parts, const Size& size_of, std::vector<Index>& offsets) {
    Index size = 0;
    for (const T& part : parts) {
      offsets.push_back(size);
      size += (size_of(part) + Layout::granularity - 1) / Layout::granularity * Layout::granularity;
    }
    return size;
  }

  std::vector<Product> products_;
  std::vector<Index> panel_offsets_;
  std::vector<Index> vector_offsets_;
  Buffer<kernel::Unit<Element>> panels_;
  Buffer<Scalar> vectors_;
};

namespace detail {

/// One weight (or bias) tensor of each expert, at equal distances in the block.
struct BankTensor {
  Index first = 0;     // position in the layout
  Index distance = 0;  // positions from one expert's to the next one's

  template <class T>
  RowView<T> of(ParameterView<T> p, Index expert) const {
    return p[first + expert * distance];
  }
};

/// The tensor of each expert as a function of the expert.
template <class T>
auto of(ParameterView<T> p, BankTensor tensor) {
  return [p, tensor](Index expert) { return tensor.of(p, expert); };
}

/// The grouping of `rows` over other rows, which lie in order.
template <class Scalar, class Element>
GroupedRows<Element> regrouped(const GroupedRows<Scalar>& rows, RowView<const Element> contiguous) {
  return {rows.starts, contiguous, nullptr};
}

/// A matrix as what products multiply: itself, or rounded, in scratch.
template <class Element, class Scalar>
RowView<const Element> as_elements(RowView<const Scalar> m, const Context& context) {
  if constexpr (std::is_same_v<Element, Scalar>) {
    return m;
  } else {
    const RowView<Element> out = context.workspace.spread<Element>(m.rows(), m.cols());
    context.exec.parallel_ranges(m.rows(), 16, [&](Index begin, Index end) {
      using V = kernel::Batch<Scalar>;
      for (Index r = begin; r < end; ++r) {
        for (Index j = 0; j < m.cols(); j += Index{V::size}) {
          kernel::store(kernel::load<V>(m.row(r) + j, m.cols() - j), out.row(r) + j, m.cols() - j);
        }
      }
    });
    return out;
  }
}
template <class Element, class Scalar>
GroupedRows<Element> as_elements(const GroupedRows<Scalar>& rows, const Context& context) {
  return {rows.starts, as_elements<Element>(rows.rows, context), rows.index};
}

/// Uniform on ±√(6 / (in + out)) for a weight (out,in): Glorot and Bengio 2010, equation 16.
template <class Scalar>
void initialize_glorot(RowView<Scalar> weight, const Rng& rng) {
  const double bound = std::sqrt(6.0 / double(weight.rows() + weight.cols()));
  rng.fill_uniform(weight, -bound, bound);
}

/// A product of these rows with what it was given, to h.
template <class P>
P with_rows(P product, kernel::Operand<typename P::Element> rows, Index count, kernel::Destination<typename P::Scalar> h = {}) {
  product.m = count;
  product.a = rows;
  product.c = h;
  return product;
}

/// A product with Wᵀ, without rows: (.,in)(in,out) -> (.,out). Weights are (out,in).
template <class Element, class Scalar>
kernel::Product<Scalar, Element> through(RowView<const Scalar> weight) {
  return {.n = weight.rows(), .k = weight.cols(), .b = kernel::transposed<Scalar>(weight)};
}

/// The rows of dy that belong to the rows of a bank, as Elements: dh without its weights.
template <class Element, class Scalar>
GroupedRows<Element> output_rows(const GroupedRows<Scalar>& rows, const OutputGradient<Scalar>& dout, const Context& context) {
  return {rows.starts, as_elements<Element>(dout.dy, context), dout.index};
}

/// dy_e W_e: (R_e,out)(out,in) -> (R_e,in).
template <class Scalar, class Element>
kernel::Product<Scalar, Element> back_through(const GroupedRows<Element>& dy, kernel::Rows<const Scalar> weight, Index in,
                                              Index e, kernel::Destination<Scalar> drows = {}) {
  return {.m = dy.count(e), .n = in, .k = dy.rows.cols(), .a = dy.operand(e), .b = kernel::Operand<Scalar>{weight}, .c = drows};
}

/// dW_e += dy_eᵀ rows_e: (out,R_e)(R_e,in) -> (out,in). One task owns an element, rows in order. Nothing where dW_e is absent.
template <class Scalar, class Element>
kernel::Product<Scalar, Element> weight_gradient(const GroupedRows<Element>& rows, const GroupedRows<Element>& dy,
                                                 kernel::Rows<Scalar> dw, Index e) {
  if (rows.count(e) == 0 || dw.data == nullptr) {
    return {};
  }
  kernel::Operand<Element> a = dy.operand(e);
  a.transpose = kernel::Transpose::yes;
  return {.m = dy.rows.cols(),
          .n = rows.rows.cols(),
          .k = rows.count(e),
          .a = a,
          .b = rows.operand(e),
          .c = {dw, kernel::Write::add}};
}

/// db_e += Σ_r dh_r, in order of rows. Nothing where db_e is absent.
template <class Rows, class T, class BiasOf>
void add_bias_gradient(const Rows& rows, const OutputGradient<T>& dh, BiasOf&& dbias, const Exec& exec) {
  constexpr Index columns = 256;
  const Index parts = (dh.dy.cols() + columns - 1) / columns;
  exec.parallel_for(rows.experts() * parts, [&](Index i) {
    const auto db = dbias(i / parts);
    using Scalar = typename decltype(db)::Scalar;
    if (db.rows() == 0) {
      return;
    }
    const Index first = i % parts * columns;
    const Index count = (std::min)(columns, dh.dy.cols() - first);
    for (Index r = rows.begin(i / parts); r < rows.begin(i / parts + 1); ++r) {
      const T* const from = dh.row(r) + first;
      Scalar* const to = db.row(0) + first;
      if (dh.weight != nullptr) {
        const auto w = Scalar(dh.weight[r]);
        for (Index j = 0; j < count; ++j) {
          to[j] += w * Scalar(from[j]);
        }
      } else {
        for (Index j = 0; j < count; ++j) {
          to[j] += Scalar(from[j]);
        }
      }
    }
  });
}

/// ⟨h_r, dy_t⟩ in parts: each panel of an epilogue's product adds up its own columns of a row, and `finish` the panels, in
/// order. So the bits do not depend on who computes what, and h is never formed.
template <class Scalar>
class RowDots {
 public:
  using V = kernel::Batch<Scalar>;

  /// Of rows (R) whose product has so many columns. Nothing is wanted where `dweight` is null.
  RowDots(Index rows, Index columns, Scalar* dweight, Workspace& workspace) : dweight_(dweight) {
    if (dweight != nullptr) {
      parts_ = workspace.matrix<Scalar>(rows, (columns + panel - 1) / panel);
    }
  }

  /// Calls `f(row, col, n, sums, weight)` for every vector of a tile's sums: its row, its first column, how many of its numbers
  /// there are, and the row's weight in every lane. `f` returns the vector that is multiplied by the sums: their products add
  /// up to the row's ⟨h, dy⟩.
  template <class Rows, class F>
  MOXIE_INLINE void for_each_vector(const kernel::TileSums<Scalar>& tile, const Rows& rows, const OutputGradient<Scalar>& dout,
                                    const F& f) const {
    for (Index i = 0; i < tile.rows; ++i) {
      const Index row = rows.begin(tile.product) + tile.row + i;
      const V weight(dout.factor(row));
      V dot(Scalar(0));
      for (Index j = 0; j < tile.cols; j += Index{V::size}) {
        const V sums = V::load_aligned(tile.of_row(i) + j);
        const V factor = f(row, tile.col + j, tile.cols - j, sums, weight);
        if (dweight_ != nullptr) {
          dot = dot + kernel::first_of(factor * sums, tile.cols - j);
        }
      }
      if (dweight_ != nullptr) {
        parts_(row, tile.col / panel) = kernel::sum_of(dot);
      }
    }
  }

  /// dweight_r = Σ of the panels of row r, plus `rest(r)`.
  template <class Rest>
  void finish(const Rest& rest, const Exec& exec) const {
    if (dweight_ == nullptr) {
      return;
    }
    exec.parallel_ranges(parts_.rows(), 256, [&](Index begin, Index end) {
      for (Index r = begin; r < end; ++r) {
        Scalar sum = 0;
        for (Index q = 0; q < parts_.cols(); ++q) {
          sum += parts_(r, q);
        }
        dweight_[r] = sum + rest(r);
      }
    });
  }

 private:
  static constexpr Index panel = kernel::detail::RegisterTile<Scalar, kernel::DefaultArch>::cols;

  Scalar* dweight_;
  RowView<Scalar> parts_;
};

/// ⟨b, dy_t⟩ of each row, with the bias b of its expert. Rows are asked for in any order.
template <class Scalar, class BiasOf>
auto bias_dot(const GroupedRows<Scalar>& rows, const OutputGradient<Scalar>& dout, BiasOf bias_of) {
  return [&rows, &dout, bias_of](Index r) {
    const auto after = std::upper_bound(rows.starts.begin(), rows.starts.end(), r);
    return kernel::dot(dout.dy.cols(), bias_of(Index(after - rows.starts.begin()) - 1), dout.row(r));
  };
}

/// Prefetches the rows of a tile in a matrix that has a row for each of `rows`; an empty one is left out.
template <class Element, class Scalar, class T>
void prefetch_rows(kernel::detail::PrefetchList& list, const GroupedRows<Element>& rows, const kernel::TileSums<Scalar>& tile,
                   RowView<T> m) {
  if (m.size() != 0) {
    list.add(m.row(rows.begin(tile.product) + tile.row) + tile.col, m.stride(), tile.rows, tile.cols);
  }
}

/// A matrix that epilogues fill for later stages, a vector of Scalars at a time; by non-temporal stores where vectors fill
/// lines and it `is_streamed`.
template <class Scalar, class Element, class Arch = kernel::DefaultArch>
class Filled {
 public:
  using V = kernel::Batch<Scalar, Arch>;

  explicit Filled(RowView<Element> rows) : rows_(rows), streamed_(can_ && kernel::is_streamed(rows)) {}

  /// The first n numbers of v from this column on, which is one that a tile's vector starts with.
  MOXIE_INLINE void store(const V& v, Index row, Index col, Index n) const {
    Element* const to = rows_.row(row) + col;
    if constexpr (can_) {
      if (streamed_ && n >= Index{V::size}) {
        kernel::stream(v, to);
        return;
      }
    }
    kernel::store(v, to, n);
  }
  /// What an epilogue prefetches: nothing where stores are non-temporal.
  RowView<Element> touched() const { return streamed_ ? RowView<Element>() : rows_; }

 private:
  static constexpr bool can_ = std::is_same_v<Scalar, Element> && kernel::fill_lines<V>;
  RowView<Element> rows_;
  bool streamed_;
};

/// Half 0 or 1 of the columns.
template <class T>
RowView<T> half(RowView<T> m, Index which) {
  return {m.rows() == 0 ? nullptr : m.row(0) + which * (m.cols() / 2), m.rows(), m.cols() / 2, m.stride()};
}

/// Experts with one hidden layer: `to_hidden(e)` and `to_out(e)` are an expert's two products without rows. `activate` ends the
/// first, which fills `hidden` (R,H); the second fills h (R,D), unless h is empty.
template <class Scalar, class Element, class First, class Second>
void forward_hidden(const GroupedRows<Element>& rows, RowView<Element> hidden, RowView<Scalar> h, const First& to_hidden,
                    const Second& to_out, const kernel::Epilogue<Scalar>& activate, const Exec& exec) {
  kernel::TaskGraph<Scalar, Element> graph;
  graph.add(
      rows.experts(), [&](Index e) { return with_rows(to_hidden(e), rows.operand(e), rows.count(e)); }, activate);
  if (h.rows() != 0) {
    graph.add(rows.experts(), [&](Index e) {
      return with_rows(to_out(e), kernel::plain<Element>(rows.part(hidden, e)), rows.count(e),
                       kernel::stream_to<Scalar>(h, rows.begin(e)));
    });
  }
  graph.run(exec);
}

/// Their adjoint. W1 and W2 are the weights of the two products as rows, (out,in) each. `differentiate` ends dy W2, and fills
/// `hidden` (what was hidden, times the row's weight) and `before`, the gradient of what the first product gave; drows = before
/// W1, dW2 += dyᵀ hidden. `to_dw1(e)` is the product dW1 += beforeᵀ rows.
template <class Scalar, class Element, class Weight1, class Weight2, class ToGradient1, class Gradient2>
void backward_hidden(const GroupedRows<Element>& dy, RowView<const std::type_identity_t<Element>> hidden,
                     RowView<const std::type_identity_t<Element>> before, RowView<Scalar> drows, const Weight1& w1,
                     const Weight2& w2, const ToGradient1& to_dw1, const Gradient2& dw2,
                     const kernel::Epilogue<Scalar>& differentiate, const Exec& exec) {
  const GroupedRows<Element> hidden_rows = regrouped(dy, hidden);
  const GroupedRows<Element> before_rows = regrouped(dy, before);
  kernel::TaskGraph<Scalar, Element> graph;
  graph.add(
      dy.experts(), [&](Index e) { return back_through<Scalar>(dy, w2(e), hidden.cols(), e); }, differentiate);
  graph.add(dy.experts(), to_dw1);
  graph.add(dy.experts(), [&](Index e) {
    return back_through<Scalar>(before_rows, w1(e), drows.cols(), e, kernel::stream_to<Scalar>(drows, dy.begin(e)));
  });
  graph.add(dy.experts(), [&](Index e) { return weight_gradient<Scalar>(hidden_rows, dy, dw2(e), e); });
  graph.run(exec);
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

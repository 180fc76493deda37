// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/bank.hpp>
#include <moxie/kernel/activation.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A bank of gated linear units without biases.
///
///     f(x) = (act(x Wgᵀ) ⊙ (x Wuᵀ)) Wdᵀ
///
/// Shazeer 2020, "GLU variants improve transformer", equation 6; SwiGLU with act = SiLU, as in DiT-MoE and DeepSeekMoE. Tensors
/// of expert e: `experts.e.gate_proj.weight` (H,D), `experts.e.up_proj.weight` (H,D), `experts.e.down_proj.weight` (D,H). Keeps
/// 2RH Elements. Cost: 6RDH forward, 12RDH backward.
///
/// With Element = BFloat16 and Scalar = float, rows, weights, hidden values and the gradients with respect to them are rounded
/// to BFloat16 (to nearest, ties to even) where products read them, and products add in float. Parameters, their gradients, x
/// and y stay float: master weights, as Micikevicius et al. 2018, "Mixed precision training".
template <class Scalar_, class Activation, class Element_ = Scalar_>
class GluExperts {
 public:
  using Scalar = Scalar_;
  using Element = Element_;
  using Frozen = FrozenWeights<Scalar, Element>;
  using Config = HiddenConfig;

  GluExperts(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : experts_(experts),
        model_dim_(model_dim),
        hidden_dim_(config.hidden_dim),
        layout_(glu_layout(experts, model_dim, config, names)) {}

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return model_dim_; }
  Index hidden_dim() const { return hidden_dim_; }
  /// x Wgᵀ and x Wuᵀ, side by side, as Elements.
  Index kept_width() const { return detail::kept_columns<Element, Scalar>(2 * hidden_dim_); }

  /// Glorot uniform, each tensor from a stream of its own.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index i = 0; i < 3 * experts_; ++i) {
      detail::initialize_glorot(p[i], rng.split(std::uint64_t(i)));
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, RowView<Scalar> kept,
               Workspace& workspace, const Exec& exec) const {
    expect_equal_distances(p);
    run(p, rows, h, kept, workspace, exec);
  }
  void forward(const Frozen& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, RowView<Scalar> kept,
               Workspace& workspace, const Exec& exec) const {
    run(weights, rows, h, kept, workspace, exec);
  }
  Frozen freeze(ParameterView<const Scalar> p, const Exec& exec) const {
    expect_equal_distances(p);
    std::vector<Product> products;
    for (Index e = 0; e < experts_; ++e) {
      products.push_back(to_hidden(p, e));
      products.push_back(to_out(p, e));
    }
    return {products, {}, exec};
  }

  /// With a = act(g) and w the weight of a row: dhidden = w dy Wd, dg = dhidden ⊙ u ⊙ act'(g), du = dhidden ⊙ a;
  /// drows = dg Wg + du Wu; dWd += dyᵀ (w hidden), dWg += dgᵀ x, dWu += duᵀ x; dw = ⟨hidden, dy Wd⟩. What was hidden is
  /// computed again from g and u.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, const OutputGradient<Scalar>& dout,
                RowView<Scalar> drows, ParameterView<Scalar> dp, RowView<const Scalar> kept, Workspace& workspace,
                const Exec& exec) const {
    expect_equal_distances(p);
    expect_equal_distances(dp);
    const Workspace::Frame frame(workspace);
    const RowView<Element> hidden = workspace.spread<Element>(rows.count(), hidden_dim_);
    const RowView<Element> dgate_up = workspace.spread<Element>(rows.count(), 2 * hidden_dim_);
    const RowView<const Element> gate_up = detail::kept_elements<Element>(kept, 2 * hidden_dim_);
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, workspace, exec);
    const GroupedRows<Element> dy_rows = detail::output_rows<Element>(rows, dout, workspace, exec);
    const detail::RowDots<Scalar> dots(rows.count(), hidden_dim_, dout.dweight, workspace);
    const Differentiate differentiate{rows,
                                      dout,
                                      dots,
                                      detail::half(gate_up, 0),
                                      detail::half(gate_up, 1),
                                      detail::Filled<Scalar, Element>(hidden),
                                      detail::Filled<Scalar, Element>(detail::half(dgate_up, 0)),
                                      detail::Filled<Scalar, Element>(detail::half(dgate_up, 1))};
    detail::backward_hidden(
        dy_rows, hidden, dgate_up, drows, [&](Index e) { return gate_up_weight(p, e); },
        [&](Index e) { return kernel::rows_of(down_.of(p, e)); }, [&](Index e) { return gate_up_gradient(x, dgate_up, dp, e); },
        [&](Index e) { return kernel::rows_of(down_.of(dp, e)); }, kernel::Epilogue<Scalar>::of(differentiate), exec);
    dots.finish([](Index /*r*/) { return Scalar(0); }, exec);
  }

 private:
  using V = kernel::Batch<Scalar>;

  /// hidden = act(g) ⊙ u. A tile holds a vector of gates beside the same units' ups.
  struct Activate {
    const GroupedRows<Scalar>& rows;
    RowView<Element> gates;  // kept, or empty
    RowView<Element> ups;
    detail::Filled<Scalar, Element> hidden;

    void apply(const kernel::TileSums<Scalar>& tile) const {
      for (Index i = 0; i < tile.rows; ++i) {
        const Index r = rows.begin(tile.product) + tile.row + i;
        const V gate = V::load_aligned(tile.of_row(i));
        const V up = V::load_aligned(tile.of_row(i) + V::size);
        if (gates.size() != 0) {
          kernel::store(gate, gates.row(r) + tile.col, tile.cols);
          kernel::store(up, ups.row(r) + tile.col, tile.cols);
        }
        hidden.store(Activation::value(gate) * up, r, tile.col, tile.cols);
      }
    }
    void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<Scalar>& tile) const {
      detail::prefetch_rows(list, rows, tile, hidden.touched());
      detail::prefetch_rows(list, rows, tile, gates);
      detail::prefetch_rows(list, rows, tile, ups);
    }
  };

  /// From the sums s = dy Wd: hidden = w act(g) ⊙ u, dg = w s ⊙ u ⊙ act'(g), du = w s ⊙ act(g), and ⟨act(g) ⊙ u, s⟩.
  struct Differentiate {
    const GroupedRows<Scalar>& rows;
    const OutputGradient<Scalar>& dout;
    const detail::RowDots<Scalar>& dots;
    RowView<const Element> gates;
    RowView<const Element> ups;
    detail::Filled<Scalar, Element> hidden;
    detail::Filled<Scalar, Element> dgates;
    detail::Filled<Scalar, Element> dups;

    void apply(const kernel::TileSums<Scalar>& tile) const {
      for (Index i = 0; i < tile.rows; ++i) {
        const Index r = rows.begin(tile.product) + tile.row + i;
        const V weight(dout.factor(r));
        Scalar dot = 0;
        for (Index j = 0; j < tile.cols; j += Index{V::size}) {
          const Index col = tile.col + j;
          const Index n = tile.cols - j;
          const V sums = V::load_aligned(tile.of_row(i) + j);
          const V gate = kernel::load<V>(gates.row(r) + col, n);
          const V up = kernel::load<V>(ups.row(r) + col, n);
          const V value = Activation::value(gate);
          const V derivative = Activation::derivative(gate);  // before anything is stored: they share what they compute
          const V dhidden = sums * weight;
          if (dots.wanted()) {
            dot += kernel::sum_of_first(value * up * sums, n);
          }
          hidden.store(value * up * weight, r, col, n);
          dgates.store(dhidden * up * derivative, r, col, n);
          dups.store(dhidden * value, r, col, n);
        }
        if (dots.wanted()) {
          dots.set(r, tile.col, dot);
        }
      }
    }
    void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<Scalar>& tile) const {
      detail::prefetch_rows(list, rows, tile, gates);
      detail::prefetch_rows(list, rows, tile, ups);
      detail::prefetch_rows(list, rows, tile, hidden.touched());
      detail::prefetch_rows(list, rows, tile, dgates.touched());
      detail::prefetch_rows(list, rows, tile, dups.touched());
    }
  };

  // The two products of an expert, without rows.
  using Product = typename Frozen::Product;
  Product to_hidden(ParameterView<const Scalar> p, Index e) const {
    return {.n = hidden_dim_,
            .k = model_dim_,
            .b = kernel::Operand<Scalar>{gate_up_weight(p, e), kernel::Transpose::yes},
            .gated = true};
  }
  static Product to_out(ParameterView<const Scalar> p, Index e) { return detail::through<Element>(down_.of(p, e)); }
  static Product to_hidden(const Frozen& weights, Index e) { return weights.product(2 * e); }
  static Product to_out(const Frozen& weights, Index e) { return weights.product(2 * e + 1); }

  template <class Weights>
  void run(const Weights& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, RowView<Scalar> kept,
           Workspace& workspace, const Exec& exec) const {
    const Workspace::Frame frame(workspace);
    const RowView<Element> hidden = workspace.spread<Element>(rows.count(), hidden_dim_);
    const RowView<Element> gate_up = detail::kept_elements<Element>(kept, 2 * hidden_dim_);
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, workspace, exec);
    const Activate activate{rows, detail::half(gate_up, 0), detail::half(gate_up, 1), detail::Filled<Scalar, Element>(hidden)};
    detail::forward_hidden(
        x, hidden, h, [&](Index e) { return to_hidden(weights, e); }, [&](Index e) { return to_out(weights, e); },
        kernel::Epilogue<Scalar>::of(activate), exec);
  }

  static constexpr detail::BankTensor gate_{0, 3};
  static constexpr detail::BankTensor up_{1, 3};
  static constexpr detail::BankTensor down_{2, 3};

  /// Wg above Wu, (2H,D).
  template <class T>
  static kernel::Rows<T> gate_up_weight(ParameterView<T> p, Index expert) {
    return kernel::stacked(gate_.of(p, expert), up_.of(p, expert));
  }

  /// dWg += dgᵀ x and dWu += duᵀ x as one product, or the one of them that is wanted.
  static kernel::Product<Scalar, Element> gate_up_gradient(const GroupedRows<Element>& x, RowView<const Element> dgate_up,
                                                           ParameterView<Scalar> dp, Index e) {
    const RowView<Scalar> dgate = gate_.of(dp, e);
    const RowView<Scalar> dup = up_.of(dp, e);
    if (dgate.data() != nullptr && dup.data() != nullptr) {
      return detail::weight_gradient<Scalar>(x, detail::regrouped(x, dgate_up), kernel::stacked(dgate, dup), e);
    }
    const bool gate = dgate.data() != nullptr;
    return detail::weight_gradient<Scalar>(x, detail::regrouped(x, detail::half(dgate_up, gate ? 0 : 1)),
                                           kernel::rows_of(gate ? dgate : dup), e);
  }

  /// Products read an expert's gate_proj and up_proj as one matrix, which the rows of both must lie in at equal distances.
  template <class T>
  void expect_equal_distances(ParameterView<T> p) const {
    for (Index e = 0; e < experts_; ++e) {
      const RowView<T> gate = gate_.of(p, e);
      const RowView<T> up = up_.of(p, e);
      expect_value(gate.rows() == 0 || up.rows() == 0 || gate.stride() == up.stride(), "GluExperts",
                   "the rows of gate_proj and up_proj of an expert are not at equal distances");
    }
  }

  Index experts_;
  Index model_dim_;
  Index hidden_dim_;
  Layout layout_;
};

/// DiT-MoE's and DeepSeekMoE's expert.
template <class Scalar, class Element = Scalar>
using SwiGluExperts = GluExperts<Scalar, Silu, Element>;
/// GEGLU with the tanh approximation of GELU, as T5 1.1 and flax compute it. Shazeer 2020, equation 6.
template <class Scalar, class Element = Scalar>
using GegluTanhExperts = GluExperts<Scalar, GeluTanh, Element>;
/// GEGLU with the exact GELU. Shazeer 2020, equation 6.
template <class Scalar, class Element = Scalar>
using GegluErfExperts = GluExperts<Scalar, GeluErf, Element>;
/// ReGLU: the gate is max(x Wgᵀ, 0). Shazeer 2020, equation 6.
template <class Scalar, class Element = Scalar>
using ReGluExperts = GluExperts<Scalar, Relu, Element>;

}  // namespace moxie::inline MOXIE_NAMESPACE

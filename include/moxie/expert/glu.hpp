// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/bank.hpp>
#include <moxie/kernel/activation.hpp>
#include <moxie/kernel/gated_unit.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A bank of gated linear units, with biases or without.
///
///     f(x) = unit(x Wgᵀ + bg, x Wuᵀ + bu) Wdᵀ + bd
///
/// `Unit` is an activation, then unit(g, u) = act(g) ⊙ u: Shazeer 2020, "GLU variants improve transformer", equation 6; SwiGLU
/// with act = SiLU, as in DiT-MoE and DeepSeekMoE. Or it is a gated unit (`kernel/gated_unit.hpp`), whose limits and factors
/// are the option `.unit`: gpt-oss, DeepSeek-V4, GLM-5, MiniMax-M3, Step-3.7. Biases are there with `.bias`, as in gpt-oss.
///
/// Tensors of expert e: `experts.e.gate_proj.weight` (H,D), `experts.e.up_proj.weight` (H,D), `experts.e.down_proj.weight`
/// (D,H); then, with biases, `experts.e.gate_proj.bias` (H), `experts.e.up_proj.bias` (H), `experts.e.down_proj.bias` (D).
/// Keeps 2RH Elements. Cost: 6RDH forward, 12RDH backward. The constructor throws ValueError for sizes below 1, and for options
/// that the unit refuses in Scalar.
///
/// With Element = BFloat16 and Scalar = float, rows, weights, hidden values and the gradients with respect to them are rounded
/// to BFloat16 (to nearest, ties to even) where products read them, and products add in float. Parameters, their gradients, x
/// and y stay float: master weights, as Micikevicius et al. 2018, "Mixed precision training". Biases are added in float.
template <class Scalar_, class Unit_, class Element_ = Scalar_>
class GluExperts {
 public:
  using Scalar = Scalar_;
  using Element = Element_;
  using Frozen = FrozenWeights<Scalar, Element>;
  using Unit = GatedUnitOf<Unit_>;
  using Config = GluConfig<std::conditional_t<std::is_empty_v<Unit>, void, Unit>>;
  using Tape = KeptRows<Element>;  ///< g and u, side by side

  GluExperts(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : experts_(experts),
        model_dim_(model_dim),
        hidden_dim_(config.hidden_dim),
        bias_(config.bias),
        layout_(glu_layout(experts, model_dim, {config.hidden_dim, config.bias}, names)) {
    if constexpr (requires { config.unit; }) {
      unit_ = config.unit;
      unit_.template expect_valid<Scalar>("GluExperts");
    }
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return model_dim_; }
  Index hidden_dim() const { return hidden_dim_; }
  bool has_bias() const { return bias_; }
  const Unit& unit() const { return unit_; }

  /// Weights Glorot uniform, each from a stream of its own; biases zero.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index e = 0; e < experts_; ++e) {
      for (const Index which : {gate, up, down}) {
        detail::initialize_glorot(weight(which).of(p, e), rng.split(std::uint64_t(3 * e + which)));
        if (bias_) {
          detail::fill_rows(bias(which).of(p, e), Scalar(0));
        }
      }
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* keep,
               const Context& context) const {
    expect_equal_distances(p);
    run(p, rows, h, keep, context);
  }
  void forward(const Frozen& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* keep,
               const Context& context) const {
    run(weights, rows, h, keep, context);
  }
  Frozen freeze(ParameterView<const Scalar> p, const Exec& exec) const {
    expect_equal_distances(p);
    std::vector<Product> products;
    std::vector<RowView<const Scalar>> biases;
    for (Index e = 0; e < experts_; ++e) {
      products.push_back(to_hidden(p, e));
      products.push_back(to_out(p, e));
      if (bias_) {
        for (const Index which : {gate, up, down}) {
          biases.push_back(bias(which).of(p, e));
        }
      }
    }
    return {products, biases, exec};
  }

  /// With w the weight of a row: dhidden = w dy Wd, dg = dhidden ⊙ ∂unit/∂g, du = dhidden ⊙ ∂unit/∂u (of an activation:
  /// dhidden ⊙ u ⊙ act'(g) and dhidden ⊙ act(g)); drows = dg Wg + du Wu; dWd += dyᵀ (w hidden), dWg += dgᵀ x, dWu += duᵀ x;
  /// dbd += Σ w dy, dbg += Σ dg, dbu += Σ du; dw = ⟨hidden, dy Wd⟩ + ⟨bd, dy⟩. What was hidden is computed again from g and u.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, const OutputGradient<Scalar>& dout,
                const BankGradient<Scalar>& into, Tape& tape, const Context& context) const {
    const ParameterView<Scalar> dp = into.parameters;
    expect_equal_distances(p);
    expect_equal_distances(dp);
    const Workspace::Frame frame(context.workspace);
    const RowView<Element> hidden = context.workspace.spread<Element>(rows.count(), hidden_dim_);
    const RowView<Element> dgate_up = context.workspace.spread<Element>(rows.count(), 2 * hidden_dim_);
    const RowView<const Element> gate_up = tape.view();
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, context);
    const GroupedRows<Element> dy_rows = detail::output_rows<Element>(rows, dout, context);
    const detail::RowDots<Scalar> dots(rows.count(), hidden_dim_, dout.dweight, context.workspace);
    const Differentiate differentiate{unit_,
                                      rows,
                                      dout,
                                      dots,
                                      detail::half(gate_up, 0),
                                      detail::half(gate_up, 1),
                                      detail::Filled<Scalar, Element>(hidden),
                                      detail::Filled<Scalar, Element>(detail::half(dgate_up, 0)),
                                      detail::Filled<Scalar, Element>(detail::half(dgate_up, 1))};
    detail::backward_hidden(
        dy_rows, hidden, dgate_up, into.rows, [&](Index e) { return gate_up_weight(p, e); },
        [&](Index e) { return kernel::rows_of(weight(down).of(p, e)); },
        [&](Index e) { return gate_up_gradient(x, dgate_up, dp, e); },
        [&](Index e) { return kernel::rows_of(weight(down).of(dp, e)); }, kernel::Epilogue<Scalar>::of(differentiate),
        context.exec);
    if (bias_) {
      dots.finish(detail::bias_dot(rows, dout, [&](Index e) { return bias_of(p, down, e); }), context.exec);
      const auto half = [&](Index which) {
        return OutputGradient<Element>(detail::half(RowView<const Element>(dgate_up), which));
      };
      detail::add_bias_gradient(rows, half(0), detail::of(dp, bias(gate)), context.exec);
      detail::add_bias_gradient(rows, half(1), detail::of(dp, bias(up)), context.exec);
      detail::add_bias_gradient(rows, dout, detail::of(dp, bias(down)), context.exec);
    } else {
      dots.finish([](Index /*r*/) { return Scalar(0); }, context.exec);
    }
  }

 private:
  using V = kernel::Batch<Scalar>;

  /// g = sums + bg, u = sums + bu, hidden = unit(g, u). A tile holds a vector of gates beside the same units' ups.
  template <class Weights>
  struct Activate {
    const GluExperts& bank;
    const Weights& weights;
    const GroupedRows<Scalar>& rows;
    RowView<Element> gates;  // kept, or empty
    RowView<Element> ups;
    detail::Filled<Scalar, Element> hidden;

    void apply(const kernel::TileSums<Scalar>& tile) const {
      if (bank.bias_) {
        const auto load = [&](Index which) {
          return kernel::load<V>(bank.bias_of(weights, which, tile.product) + tile.col, tile.cols);
        };
        apply_to_rows<true>(tile, load(gate), load(up));
      } else {
        apply_to_rows<false>(tile, kernel::constant<V>(0), kernel::constant<V>(0));
      }
    }
    template <bool biased>
    void apply_to_rows(const kernel::TileSums<Scalar>& tile, V gate_bias, V up_bias) const {
      const Unit unit = bank.unit_;  // stores might otherwise change its options
      for (Index i = 0; i < tile.rows; ++i) {
        const Index r = rows.begin(tile.product) + tile.row + i;
        V g = V::load_aligned(tile.of_row(i));
        V u = V::load_aligned(tile.of_row(i) + V::size);
        if constexpr (biased) {
          g = g + gate_bias;
          u = u + up_bias;
        }
        if (gates.size() != 0) {
          kernel::store(g, gates.row(r) + tile.col, tile.cols);
          kernel::store(u, ups.row(r) + tile.col, tile.cols);
        }
        hidden.store(unit.value(g, u), r, tile.col, tile.cols);
      }
    }
    void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<Scalar>& tile) const {
      detail::prefetch_rows(list, rows, tile, hidden.touched());
      detail::prefetch_rows(list, rows, tile, gates);
      detail::prefetch_rows(list, rows, tile, ups);
    }
  };

  /// dhidden ∂unit/∂g and dhidden ∂unit/∂u.
  template <class AnyUnit>
  MOXIE_INLINE static GateUp<V> times_derivatives(const AnyUnit& unit, V dhidden, V g, V u) {
    const GateUp<V> slope = unit.derivatives(g, u);
    return {dhidden * slope.gate, dhidden * slope.up};
  }
  /// In the order (dhidden u) act'(g): the unit is linear in u.
  template <class Activation>
  MOXIE_INLINE static GateUp<V> times_derivatives(const Gated<Activation>& unit, V dhidden, V g, V u) {
    const GateUp<V> slope = unit.derivatives(g, dhidden * u);
    return {slope.gate, dhidden * slope.up};
  }

  /// From the sums s = dy Wd: hidden = w unit(g, u), dg = w s ⊙ ∂unit/∂g, du = w s ⊙ ∂unit/∂u, and ⟨unit(g, u), s⟩.
  struct Differentiate {
    Unit unit;
    const GroupedRows<Scalar>& rows;
    const OutputGradient<Scalar>& dout;
    const detail::RowDots<Scalar>& dots;
    RowView<const Element> gates;
    RowView<const Element> ups;
    detail::Filled<Scalar, Element> hidden;
    detail::Filled<Scalar, Element> dgates;
    detail::Filled<Scalar, Element> dups;

    void apply(const kernel::TileSums<Scalar>& tile) const {
      const Unit f = unit;  // stores might otherwise change its options
      dots.for_each_vector(tile, rows, dout, [&](Index r, Index col, Index n, const V& sums, const V& weight) {
        const V g = kernel::load<V>(gates.row(r) + col, n);
        const V u = kernel::load<V>(ups.row(r) + col, n);
        const V value = f.value(g, u);
        const GateUp<V> d = times_derivatives(f, sums * weight, g, u);  // before anything is stored: they share work
        hidden.store(value * weight, r, col, n);
        dgates.store(d.gate, r, col, n);
        dups.store(d.up, r, col, n);
        return value;
      });
    }
    void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<Scalar>& tile) const {
      detail::prefetch_rows(list, rows, tile, gates);
      detail::prefetch_rows(list, rows, tile, ups);
      detail::prefetch_rows(list, rows, tile, hidden.touched());
      detail::prefetch_rows(list, rows, tile, dgates.touched());
      detail::prefetch_rows(list, rows, tile, dups.touched());
    }
  };

  // The two products of an expert, without rows, and its biases, of a bank that has them.
  using Product = typename Frozen::Product;
  Product to_hidden(ParameterView<const Scalar> p, Index e) const {
    return {.n = hidden_dim_,
            .k = model_dim_,
            .b = kernel::Operand<Scalar>{gate_up_weight(p, e), kernel::Transpose::yes},
            .gated = true};
  }
  Product to_out(ParameterView<const Scalar> p, Index e) const { return detail::through<Element>(weight(down).of(p, e)); }
  const Scalar* bias_of(ParameterView<const Scalar> p, Index which, Index e) const { return bias(which).of(p, e).data(); }
  static Product to_hidden(const Frozen& weights, Index e) { return weights.product(2 * e); }
  static Product to_out(const Frozen& weights, Index e) { return weights.product(2 * e + 1); }
  static const Scalar* bias_of(const Frozen& weights, Index which, Index e) { return weights.vector(3 * e + which); }

  template <class Weights>
  void run(const Weights& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* keep,
           const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const RowView<Element> hidden = context.workspace.spread<Element>(rows.count(), hidden_dim_);
    const RowView<Element> gate_up = keep != nullptr ? keep->resize(rows.count(), 2 * hidden_dim_) : RowView<Element>();
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, context);
    const Activate<Weights> activate{
        *this, weights, rows, detail::half(gate_up, 0), detail::half(gate_up, 1), detail::Filled<Scalar, Element>(hidden)};
    detail::forward_hidden(
        x, hidden, h, [&](Index e) { return to_hidden(weights, e); },
        [&](Index e) {
          Product product = to_out(weights, e);
          product.bias = bias_ ? bias_of(weights, down, e) : nullptr;
          return product;
        },
        kernel::Epilogue<Scalar>::of(activate), context.exec);
  }

  // An expert's tensors: three weights, then their biases.
  static constexpr Index gate = 0;
  static constexpr Index up = 1;
  static constexpr Index down = 2;
  detail::BankTensor weight(Index which) const { return {which, bias_ ? 6 : 3}; }
  static detail::BankTensor bias(Index which) { return {3 + which, 6}; }

  /// Wg above Wu, (2H,D).
  template <class T>
  kernel::Rows<T> gate_up_weight(ParameterView<T> p, Index expert) const {
    return kernel::stacked(weight(gate).of(p, expert), weight(up).of(p, expert));
  }

  /// dWg += dgᵀ x and dWu += duᵀ x as one product, or the one of them that is wanted.
  kernel::Product<Scalar, Element> gate_up_gradient(const GroupedRows<Element>& x, RowView<const Element> dgate_up,
                                                    ParameterView<Scalar> dp, Index e) const {
    const RowView<Scalar> dgate = weight(gate).of(dp, e);
    const RowView<Scalar> dup = weight(up).of(dp, e);
    if (dgate.data() != nullptr && dup.data() != nullptr) {
      return detail::weight_gradient<Scalar>(x, detail::regrouped(x, dgate_up), kernel::stacked(dgate, dup), e);
    }
    const bool first = dgate.data() != nullptr;
    return detail::weight_gradient<Scalar>(x, detail::regrouped(x, detail::half(dgate_up, first ? 0 : 1)),
                                           kernel::rows_of(first ? dgate : dup), e);
  }

  /// Products read an expert's gate_proj and up_proj as one matrix, which the rows of both must lie in at equal distances.
  template <class T>
  void expect_equal_distances(ParameterView<T> p) const {
    for (Index e = 0; e < experts_; ++e) {
      const RowView<T> wg = weight(gate).of(p, e);
      const RowView<T> wu = weight(up).of(p, e);
      expect_value(wg.rows() == 0 || wu.rows() == 0 || wg.stride() == wu.stride(), "GluExperts",
                   "the rows of gate_proj and up_proj of an expert are not at equal distances");
    }
  }

  Index experts_;
  Index model_dim_;
  Index hidden_dim_;
  bool bias_;
  Unit unit_ = {};
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
/// SwiGLU with limits, and the factors of gpt-oss: gpt-oss and MiniMax-M3 (.limit = 7, .alpha = 1.702, .beta = 1; gpt-oss with
/// biases), DeepSeek-V4 and GLM-5 (.limit).
template <class Scalar, class Element = Scalar>
using ClampedSwiGluExperts = GluExperts<Scalar, ClampedSwiGlu, Element>;
/// SwiGLU whose limit comes after the activation: Step-3.7.
template <class Scalar, class Element = Scalar>
using SwiGluClampedAfterExperts = GluExperts<Scalar, SwiGluClampedAfter, Element>;
/// SwiGLU with smooth limits: Inkling 2 (.gate_cap = 4, .up_cap = 25).
template <class Scalar, class Element = Scalar>
using SoftCappedSwiGluExperts = GluExperts<Scalar, SoftCappedSwiGlu, Element>;

}  // namespace moxie::inline MOXIE_NAMESPACE

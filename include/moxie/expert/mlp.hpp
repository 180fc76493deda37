// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/bank.hpp>
#include <moxie/kernel/activation.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A bank of two-layer perceptrons with biases.
///
///     f(x) = act(x W1ᵀ + b1) W2ᵀ + b2
///
/// The feed-forward of the transformer; act = GeluTanh in DiT and in Soft MoE's reference, GeluErf elsewhere. Tensors of expert
/// e: `experts.e.fc1.weight` (H,D), `experts.e.fc1.bias` (H), `experts.e.fc2.weight` (D,H), `experts.e.fc2.bias` (D). Keeps RH
/// Elements. Cost: 4RDH forward, 8RDH backward. Element = BFloat16 means what it does in `GluExperts`; biases are added in
/// float.
template <class Scalar_, class Activation, class Element_ = Scalar_>
class MlpExperts {
 public:
  using Scalar = Scalar_;
  using Element = Element_;
  using Frozen = FrozenWeights<Scalar, Element>;
  using Config = HiddenConfig;
  using Tape = KeptRows<Element>;  ///< a

  MlpExperts(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : experts_(experts),
        model_dim_(model_dim),
        hidden_dim_(config.hidden_dim),
        layout_(mlp_layout(experts, model_dim, config, names)) {}

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return model_dim_; }
  Index hidden_dim() const { return hidden_dim_; }

  /// Weights Glorot uniform, biases zero.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index e = 0; e < experts_; ++e) {
      detail::initialize_glorot(fc1_.of(p, e), rng.split(std::uint64_t(2 * e)));
      detail::initialize_glorot(fc2_.of(p, e), rng.split(std::uint64_t(2 * e + 1)));
      detail::fill_rows(bias1_.of(p, e), Scalar(0));
      detail::fill_rows(bias2_.of(p, e), Scalar(0));
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* keep,
               const Context& context) const {
    run(p, rows, h, keep, context);
  }
  void forward(const Frozen& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* keep,
               const Context& context) const {
    run(weights, rows, h, keep, context);
  }
  Frozen freeze(ParameterView<const Scalar> p, const Exec& exec) const {
    std::vector<Product> products;
    std::vector<RowView<const Scalar>> biases;
    for (Index e = 0; e < experts_; ++e) {
      products.push_back(to_hidden(p, e));
      products.push_back(to_out(p, e));
      biases.push_back(bias1_.of(p, e));
      biases.push_back(bias2_.of(p, e));
    }
    return {products, biases, exec};
  }

  /// With w the weight of a row: da = w (dy W2) ⊙ act'(a); drows = da W1; dW2 += dyᵀ (w hidden), db2 += Σ w dy, dW1 += daᵀ x,
  /// db1 += Σ da; dw = ⟨hidden, dy W2⟩ + ⟨b2, dy⟩. What was hidden is computed again from a.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, const OutputGradient<Scalar>& dout,
                const BankGradient<Scalar>& into, Tape& tape, const Context& context) const {
    const ParameterView<Scalar> dp = into.parameters;
    const Workspace::Frame frame(context.workspace);
    const RowView<Element> hidden = context.workspace.spread<Element>(rows.count(), hidden_dim_);
    const RowView<Element> da = context.workspace.spread<Element>(rows.count(), hidden_dim_);
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, context);
    const GroupedRows<Element> dy_rows = detail::output_rows<Element>(rows, dout, context);
    const detail::RowDots<Scalar> dots(rows.count(), hidden_dim_, dout.dweight, context.workspace);
    const Differentiate differentiate{
        rows, dout, dots, tape.view(), detail::Filled<Scalar, Element>(hidden), detail::Filled<Scalar, Element>(da)};
    detail::backward_hidden(
        dy_rows, hidden, da, into.rows, [&](Index e) { return kernel::rows_of(fc1_.of(p, e)); },
        [&](Index e) { return kernel::rows_of(fc2_.of(p, e)); },
        [&](Index e) {
          return detail::weight_gradient<Scalar>(x, detail::regrouped(x, RowView<const Element>(da)),
                                                 kernel::rows_of(fc1_.of(dp, e)), e);
        },
        [&](Index e) { return kernel::rows_of(fc2_.of(dp, e)); }, kernel::Epilogue<Scalar>::of(differentiate), context.exec);
    dots.finish(detail::bias_dot(rows, dout, [&](Index e) { return bias2_.of(p, e).data(); }), context.exec);
    detail::add_bias_gradient(rows, OutputGradient<Element>(RowView<const Element>(da)), detail::of(dp, bias1_), context.exec);
    detail::add_bias_gradient(rows, dout, detail::of(dp, bias2_), context.exec);
  }

 private:
  using V = kernel::Batch<Scalar>;

  /// a = sums + b1, hidden = act(a).
  template <class Weights>
  struct Activate {
    const GroupedRows<Scalar>& rows;
    const Weights& weights;
    RowView<Element> a;  // kept, or empty
    detail::Filled<Scalar, Element> hidden;

    void apply(const kernel::TileSums<Scalar>& tile) const {
      const Scalar* const bias = hidden_bias(weights, tile.product) + tile.col;
      for (Index i = 0; i < tile.rows; ++i) {
        const Index r = rows.begin(tile.product) + tile.row + i;
        for (Index j = 0; j < tile.cols; j += Index{V::size}) {
          const Index n = tile.cols - j;
          const V before = V::load_aligned(tile.of_row(i) + j) + kernel::load<V>(bias + j, n);
          if (a.size() != 0) {
            kernel::store(before, a.row(r) + tile.col + j, n);
          }
          hidden.store(Activation::value(before), r, tile.col + j, n);
        }
      }
    }
    void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<Scalar>& tile) const {
      detail::prefetch_rows(list, rows, tile, hidden.touched());
      detail::prefetch_rows(list, rows, tile, a);
    }
  };

  /// From the sums s = dy W2: hidden = w act(a), da = w s ⊙ act'(a), and ⟨act(a), s⟩.
  struct Differentiate {
    const GroupedRows<Scalar>& rows;
    const OutputGradient<Scalar>& dout;
    const detail::RowDots<Scalar>& dots;
    RowView<const Element> a;
    detail::Filled<Scalar, Element> hidden;
    detail::Filled<Scalar, Element> da;

    void apply(const kernel::TileSums<Scalar>& tile) const {
      dots.for_each_vector(tile, rows, dout, [&](Index r, Index col, Index n, const V& sums, const V& weight) {
        const V before = kernel::load<V>(a.row(r) + col, n);
        const V value = Activation::value(before);
        const V derivative = Activation::derivative(before);  // before anything is stored: they share what they compute
        hidden.store(value * weight, r, col, n);
        da.store(sums * weight * derivative, r, col, n);
        return value;
      });
    }
    void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<Scalar>& tile) const {
      detail::prefetch_rows(list, rows, tile, a);
      detail::prefetch_rows(list, rows, tile, hidden.touched());
      detail::prefetch_rows(list, rows, tile, da.touched());
    }
  };

  // The two products of an expert, without rows, and their biases.
  using Product = typename Frozen::Product;
  static Product to_hidden(ParameterView<const Scalar> p, Index e) { return detail::through<Element>(fc1_.of(p, e)); }
  static Product to_out(ParameterView<const Scalar> p, Index e) { return detail::through<Element>(fc2_.of(p, e)); }
  static const Scalar* hidden_bias(ParameterView<const Scalar> p, Index e) { return bias1_.of(p, e).data(); }
  static const Scalar* out_bias(ParameterView<const Scalar> p, Index e) { return bias2_.of(p, e).data(); }
  static Product to_hidden(const Frozen& weights, Index e) { return weights.product(2 * e); }
  static Product to_out(const Frozen& weights, Index e) { return weights.product(2 * e + 1); }
  static const Scalar* hidden_bias(const Frozen& weights, Index e) { return weights.vector(2 * e); }
  static const Scalar* out_bias(const Frozen& weights, Index e) { return weights.vector(2 * e + 1); }

  template <class Weights>
  void run(const Weights& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* keep,
           const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const RowView<Element> hidden = context.workspace.spread<Element>(rows.count(), hidden_dim_);
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, context);
    const Activate<Weights> activate{rows, weights,
                                     keep != nullptr ? keep->resize(rows.count(), hidden_dim_) : RowView<Element>(),
                                     detail::Filled<Scalar, Element>(hidden)};
    detail::forward_hidden(
        x, hidden, h, [&](Index e) { return to_hidden(weights, e); },
        [&](Index e) {
          Product product = to_out(weights, e);
          product.bias = out_bias(weights, e);
          return product;
        },
        kernel::Epilogue<Scalar>::of(activate), context.exec);
  }

  static constexpr detail::BankTensor fc1_{0, 4};
  static constexpr detail::BankTensor bias1_{1, 4};
  static constexpr detail::BankTensor fc2_{2, 4};
  static constexpr detail::BankTensor bias2_{3, 4};

  Index experts_;
  Index model_dim_;
  Index hidden_dim_;
  Layout layout_;
};

/// Soft MoE's expert, and DiT's feed-forward: the tanh approximation of GELU.
template <class Scalar, class Element = Scalar>
using GeluTanhExperts = MlpExperts<Scalar, GeluTanh, Element>;
/// The same with the exact GELU.
template <class Scalar, class Element = Scalar>
using GeluErfExperts = MlpExperts<Scalar, GeluErf, Element>;
/// Primer's feed-forward, with biases: max(x W1ᵀ + b1, 0)² W2ᵀ + b2. So et al. 2021.
template <class Scalar, class Element = Scalar>
using ReluSquaredExperts = MlpExperts<Scalar, ReluSquared, Element>;

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/bank.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

struct LinearConfig {
  bool bias = true;
};

/// A bank of affine maps f(x) = x Wᵀ + b (Switch-DiT's expert). Tensors of expert e: `experts.e.weight` (D,D), `experts.e.bias`
/// (D). Keeps nothing. Cost: 2RD² forward, 4RD² backward. Element = BFloat16 means what it does in `GluExperts`; biases are
/// added in float.
template <class Scalar_, class Element_ = Scalar_>
class LinearExperts {
 public:
  using Scalar = Scalar_;
  using Element = Element_;
  using Frozen = FrozenWeights<Scalar, Element>;
  using Config = LinearConfig;
  /// Empty: its backward needs the rows alone.
  struct Tape {
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* /*resource*/) {}
  };

  LinearExperts(Index experts, Index model_dim, const Config& config = {}, const BankNames& names = {})
      : experts_(experts), model_dim_(model_dim), bias_(config.bias) {
    detail::expect_at_least("LinearExperts", "experts", experts, 1);
    detail::expect_at_least("LinearExperts", "model_dim", model_dim, 1);
    for (Index e = 0; e < experts; ++e) {
      layout_.add(names.prefix(e) + "weight", {model_dim, model_dim}, names.options(e));
      if (bias_) {
        layout_.add(names.prefix(e) + "bias", {model_dim}, names.options(e, Role::bias));
      }
    }
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return model_dim_; }

  /// Weights Glorot uniform, biases zero.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index e = 0; e < experts_; ++e) {
      detail::initialize_glorot(weight().of(p, e), rng.split(std::uint64_t(e)));
      if (bias_) {
        detail::fill_rows(bias().of(p, e), Scalar(0));
      }
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* /*keep*/,
               const Context& context) const {
    run([&](Index e) { return detail::through<Element>(weight().of(p, e)); }, [&](Index e) { return bias().of(p, e).data(); },
        rows, h, context);
  }
  void forward(const Frozen& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* /*keep*/,
               const Context& context) const {
    run([&](Index e) { return weights.product(e); }, [&](Index e) { return weights.vector(e); }, rows, h, context);
  }
  Frozen freeze(ParameterView<const Scalar> p, const Exec& exec) const {
    std::vector<typename Frozen::Product> products;
    std::vector<RowView<const Scalar>> biases;
    for (Index e = 0; e < experts_; ++e) {
      products.push_back(detail::through<Element>(weight().of(p, e)));
      if (bias_) {
        biases.push_back(bias().of(p, e));
      }
    }
    return {products, biases, exec};
  }

  /// With w the weight of a row: drows = w dy W, dW += dyᵀ (w x), db += Σ w dy; dw = ⟨x, dy W⟩ + ⟨b, dy⟩.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, const OutputGradient<Scalar>& dout,
                const BankGradient<Scalar>& into, Tape& /*tape*/, const Context& context) const {
    const ParameterView<Scalar> dp = into.parameters;
    const Workspace::Frame frame(context.workspace);
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, context);
    const GroupedRows<Element> dy_rows = detail::output_rows<Element>(rows, dout, context);
    const RowView<Element> weighted = context.workspace.spread<Element>(rows.count(), model_dim_);
    const detail::RowDots<Scalar> dots(rows.count(), model_dim_, dout.dweight, context.workspace);
    const Differentiate differentiate{x, dout, dots, weighted, into.rows};
    kernel::TaskGraph<Scalar, Element> graph;
    graph.add(
        experts_,
        [&](Index e) { return detail::back_through<Scalar>(dy_rows, kernel::rows_of(weight().of(p, e)), model_dim_, e); },
        kernel::Epilogue<Scalar>::of(differentiate));
    graph.add(experts_, [&](Index e) {
      return detail::weight_gradient<Scalar>(detail::regrouped(x, RowView<const Element>(weighted)), dy_rows,
                                             kernel::rows_of(weight().of(dp, e)), e);
    });
    graph.run(context.exec);
    if (bias_) {
      dots.finish(detail::bias_dot(rows, dout, [&](Index e) { return bias().of(p, e).data(); }), context.exec);
      detail::add_bias_gradient(rows, dout, detail::of(dp, bias()), context.exec);
    } else {
      dots.finish([](Index /*r*/) { return Scalar(0); }, context.exec);
    }
  }

 private:
  /// From the sums s = dy W: drows = w s, w x, and ⟨x, s⟩.
  struct Differentiate {
    using V = kernel::Batch<Scalar>;

    const GroupedRows<Element>& x;
    const OutputGradient<Scalar>& dout;
    const detail::RowDots<Scalar>& dots;
    RowView<Element> weighted;
    RowView<Scalar> drows;

    void apply(const kernel::TileSums<Scalar>& tile) const {
      dots.for_each_vector(tile, x, dout, [&](Index r, Index col, Index n, const V& sums, const V& weight) {
        const V row = kernel::load<V>(x.row(r) + col, n);
        kernel::store(row * weight, weighted.row(r) + col, n);
        kernel::store(sums * weight, drows.row(r) + col, n);
        return row;
      });
    }
    void prefetch(kernel::detail::PrefetchList& list, const kernel::TileSums<Scalar>& tile) const {
      detail::prefetch_rows(list, x, tile, drows);
      detail::prefetch_rows(list, x, tile, weighted);
    }
  };

  template <class ProductOf, class BiasOf>
  void run(const ProductOf& product_of, const BiasOf& bias_of, const GroupedRows<Scalar>& rows, RowView<Scalar> h,
           const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const GroupedRows<Element> x = detail::as_elements<Element>(rows, context);
    if (h.rows() == 0) {
      return;  // nothing is kept
    }
    kernel::TaskGraph<Scalar, Element> graph;
    graph.add(experts_, [&](Index e) {
      auto product = detail::with_rows(product_of(e), x.operand(e), rows.count(e), kernel::stream_to<Scalar>(h, rows.begin(e)));
      product.bias = bias_ ? bias_of(e) : nullptr;
      return product;
    });
    graph.run(context.exec);
  }

  detail::BankTensor weight() const { return {0, bias_ ? 2 : 1}; }
  static detail::BankTensor bias() { return {1, 2}; }

  Index experts_;
  Index model_dim_;
  bool bias_;
  Layout layout_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

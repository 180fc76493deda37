// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/activation.hpp>
#include <moxie/expert/bank.hpp>

namespace moxie {

/// A bank of two-layer perceptrons with biases.
///
///     f(x) = act(x W1ᵀ + b1) W2ᵀ + b2
///
/// The feed-forward of the transformer; act = GeluTanh in DiT and in Soft MoE's reference, GeluErf elsewhere. Tensors of expert
/// e: `experts.e.fc1.weight` (H,D), `experts.e.fc1.bias` (H), `experts.e.fc2.weight` (D,H), `experts.e.fc2.bias` (D). Keeps RH
/// numbers. Cost: 4RDH forward, 8RDH backward.
template <class Scalar_, class Activation>
class MlpExperts {
 public:
  using Scalar = Scalar_;
  using Config = HiddenConfig;

  MlpExperts(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : experts_(experts), model_dim_(model_dim), hidden_dim_(config.hidden_dim) {
    detail::expect_at_least("MlpExperts", "experts", experts, 1);
    detail::expect_at_least("MlpExperts", "model_dim", model_dim, 1);
    detail::expect_at_least("MlpExperts", "hidden_dim", hidden_dim_, 1);
    for (Index e = 0; e < experts; ++e) {
      const std::string name = names.prefix(e);
      layout_.add(name + "fc1.weight", {hidden_dim_, model_dim});
      layout_.add(name + "fc1.bias", {hidden_dim_});
      layout_.add(name + "fc2.weight", {model_dim, hidden_dim_});
      layout_.add(name + "fc2.bias", {model_dim});
    }
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return model_dim_; }
  Index hidden_dim() const { return hidden_dim_; }
  /// x W1ᵀ + b1.
  Index kept_width() const { return hidden_dim_; }

  /// Weights Glorot uniform, biases zero.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index e = 0; e < experts_; ++e) {
      detail::initialize_glorot(fc1_.of(p, e), rng.split(std::uint64_t(2 * e)));
      detail::initialize_glorot(fc2_.of(p, e), rng.split(std::uint64_t(2 * e + 1)));
      bias1_.of(p, e).eigen().setZero();
      bias2_.of(p, e).eigen().setZero();
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, RowView<Scalar> kept,
               Workspace& workspace, const Exec& exec) const {
    run(p, rows, h, kept, workspace, exec);
  }
  void forward(const FrozenWeights<Scalar>& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, RowView<Scalar> kept,
               Workspace& workspace, const Exec& exec) const {
    run(weights, rows, h, kept, workspace, exec);
  }
  FrozenWeights<Scalar> freeze(ParameterView<const Scalar> p, const Exec& exec) const {
    std::vector<kernel::Product<Scalar>> products;
    std::vector<RowView<const Scalar>> biases;
    for (Index e = 0; e < experts_; ++e) {
      products.push_back(to_hidden(p, e));
      products.push_back(to_out(p, e));
      biases.push_back(bias1_.of(p, e));
      biases.push_back(bias2_.of(p, e));
    }
    return {products, biases, exec};
  }

  /// da = (dh W2) ⊙ act'(a); drows = da W1; dW2 += dhᵀ hidden, db2 += Σ dh, dW1 += daᵀ x, db1 += Σ da. What was hidden is
  /// computed again from a.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<const Scalar> dh, RowView<Scalar> drows,
                ParameterView<Scalar> dp, RowView<const Scalar> kept, Workspace& workspace, const Exec& exec) const {
    const Workspace::Frame frame(workspace);
    const RowView<Scalar> hidden = workspace.spread<Scalar>(rows.count(), hidden_dim_);
    const RowView<Scalar> da = workspace.spread<Scalar>(rows.count(), hidden_dim_);
    const auto differentiate = [&](auto arch, const auto& /*product*/, Index e, Index row, Index col, Index n,
                                   const Scalar* values) {
      using V = kernel::Batch<Scalar, decltype(arch)>;
      const Index r = rows.begin(e) + row;
      for (Index j = 0; j < n; j += Index{V::size}) {
        const V before = kernel::load<V>(kept.row(r) + col + j, n - j);
        kernel::store(Activation::value(before), hidden.row(r) + col + j, n - j);
        kernel::store(V::load_aligned(values + j) * Activation::derivative(before), da.row(r) + col + j, n - j);
      }
    };
    detail::backward_hidden(
        rows, dh, hidden, da, drows, [&](Index e) { return kernel::rows_of(fc1_.of(p, e)); },
        [&](Index e) { return kernel::rows_of(fc2_.of(p, e)); }, [&](Index e) { return kernel::rows_of(fc1_.of(dp, e)); },
        [&](Index e) { return kernel::rows_of(fc2_.of(dp, e)); },
        kernel::Finish(differentiate, detail::rows_ahead(rows, kept, hidden, da)), exec);
    detail::add_bias_gradient(rows, da, detail::of(dp, bias1_), exec);
    detail::add_bias_gradient(rows, dh, detail::of(dp, bias2_), exec);
  }

 private:
  // The two products of an expert, without rows, and their biases.
  static kernel::Product<Scalar> to_hidden(ParameterView<const Scalar> p, Index e) { return detail::through(fc1_.of(p, e)); }
  static kernel::Product<Scalar> to_out(ParameterView<const Scalar> p, Index e) { return detail::through(fc2_.of(p, e)); }
  static const Scalar* hidden_bias(ParameterView<const Scalar> p, Index e) { return bias1_.of(p, e).data(); }
  static const Scalar* out_bias(ParameterView<const Scalar> p, Index e) { return bias2_.of(p, e).data(); }
  static kernel::Product<Scalar> to_hidden(const FrozenWeights<Scalar>& weights, Index e) { return weights.product(2 * e); }
  static kernel::Product<Scalar> to_out(const FrozenWeights<Scalar>& weights, Index e) { return weights.product(2 * e + 1); }
  static const Scalar* hidden_bias(const FrozenWeights<Scalar>& weights, Index e) { return weights.vector(2 * e); }
  static const Scalar* out_bias(const FrozenWeights<Scalar>& weights, Index e) { return weights.vector(2 * e + 1); }

  template <class Weights>
  void run(const Weights& weights, const GroupedRows<Scalar>& rows, RowView<Scalar> h, RowView<Scalar> kept,
           Workspace& workspace, const Exec& exec) const {
    const Workspace::Frame frame(workspace);
    const RowView<Scalar> hidden = workspace.spread<Scalar>(rows.count(), hidden_dim_);
    const auto activate = [&](auto arch, const auto& /*product*/, Index e, Index row, Index col, Index n,
                              const Scalar* values) {
      using V = kernel::Batch<Scalar, decltype(arch)>;
      const Index r = rows.begin(e) + row;
      const Scalar* bias = hidden_bias(weights, e) + col;
      for (Index j = 0; j < n; j += Index{V::size}) {
        const V before = V::load_aligned(values + j) + kernel::load<V>(bias + j, n - j);
        if (kept.size() != 0) {
          kernel::store(before, kept.row(r) + col + j, n - j);
        }
        kernel::store(Activation::value(before), hidden.row(r) + col + j, n - j);
      }
    };
    detail::forward_hidden(
        rows, hidden, h, [&](Index e) { return to_hidden(weights, e); }, [&](Index e) { return to_out(weights, e); },
        kernel::Finish(activate, detail::rows_ahead(rows, hidden, kept)),
        detail::store_with_bias<Scalar>([&](Index e) { return out_bias(weights, e); }), exec);
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
template <class Scalar>
using GeluTanhExperts = MlpExperts<Scalar, GeluTanh>;
/// The same with the exact GELU.
template <class Scalar>
using GeluErfExperts = MlpExperts<Scalar, GeluErf>;
/// Primer's feed-forward, with biases: max(x W1ᵀ + b1, 0)² W2ᵀ + b2. So et al. 2021.
template <class Scalar>
using ReluSquaredExperts = MlpExperts<Scalar, ReluSquared>;

}  // namespace moxie

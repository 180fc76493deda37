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
/// e: `experts.e.fc1.weight` (H,D), `experts.e.fc1.bias` (H), `experts.e.fc2.weight` (D,H), `experts.e.fc2.bias` (D). Tape:
/// 2RH. Cost: 4RDH forward, 8RDH backward.
template <class Scalar_, class Activation>
class MlpExperts {
 public:
  using Scalar = Scalar_;
  using Config = HiddenConfig;

  class Tape {
    friend class MlpExperts;
    Buffer<Scalar> before_;  // x W1ᵀ + b1
    Buffer<Scalar> hidden_;  // act(before)
  };

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

  /// Weights Glorot uniform, biases zero.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index e = 0; e < experts_; ++e) {
      detail::initialize_glorot(fc1_.of(p, e), rng.split(std::uint64_t(2 * e)));
      detail::initialize_glorot(fc2_.of(p, e), rng.split(std::uint64_t(2 * e + 1)));
      bias1_.of(p, e).eigen().setZero();
      bias2_.of(p, e).eigen().setZero();
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape& tape,
               const Exec& exec) const {
    const RowView<Scalar> before = tape.before_.matrix(rows.count(), hidden_dim_);
    const RowView<Scalar> hidden = tape.hidden_.matrix(rows.count(), hidden_dim_);
    detail::set_rows_to_bias(rows, detail::of(p, bias1_), before, exec);
    detail::multiply_rows(rows, detail::of(p, fc1_), before, true, exec);
    exec.parallel_ranges(rows.count(), 16, [&](Index begin, Index end) {
      kernel::map((end - begin) * hidden_dim_, hidden.row(begin), [](auto a) { return Activation::value(a); },
                  before.row(begin));
    });
    detail::set_rows_to_bias(rows, detail::of(p, bias2_), h, exec);
    detail::multiply_rows(detail::regrouped(rows, hidden), detail::of(p, fc2_), h, true, exec);
  }

  /// da = (dh W2) ⊙ act'(a); drows = da W1; dW2 += dhᵀ hidden, db2 += Σ dh, dW1 += daᵀ x, db1 += Σ da.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<const Scalar> dh, RowView<Scalar> drows,
                ParameterView<Scalar> dp, const Tape& tape, Workspace& workspace, const Exec& exec) const {
    const Index count = rows.count();
    const Workspace::Frame frame(workspace);
    const RowView<const Scalar> before = tape.before_.view(count, hidden_dim_);
    const RowView<const Scalar> hidden = tape.hidden_.view(count, hidden_dim_);
    const RowView<Scalar> da = workspace.matrix<Scalar>(count, hidden_dim_);
    detail::add_weight_gradient(detail::regrouped(rows, hidden), dh, detail::of(dp, fc2_), exec);
    detail::add_bias_gradient(rows, dh, detail::of(dp, bias2_), exec);
    detail::multiply_rows_backward(rows, detail::of(p, fc2_), dh, da, false, exec);
    exec.parallel_ranges(count, 16, [&](Index begin, Index end) {
      kernel::map((end - begin) * hidden_dim_, da.row(begin), [](auto d, auto a) { return d * Activation::derivative(a); },
                  da.row(begin), before.row(begin));
    });
    detail::add_weight_gradient(rows, da, detail::of(dp, fc1_), exec);
    detail::add_bias_gradient(rows, da, detail::of(dp, bias1_), exec);
    detail::multiply_rows_backward(rows, detail::of(p, fc1_), da, drows, false, exec);
  }

 private:
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

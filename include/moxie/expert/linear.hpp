// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/bank.hpp>

namespace moxie {

struct LinearConfig {
  bool bias = true;
};

/// A bank of affine maps f(x) = x Wᵀ + b (Switch-DiT's expert). Tensors of expert e: `experts.e.weight` (D,D), `experts.e.bias`
/// (D). No tape. Cost: 2RD² forward, 4RD² backward.
template <class Scalar_>
class LinearExperts {
 public:
  using Scalar = Scalar_;
  using Config = LinearConfig;
  struct Tape {};

  LinearExperts(Index experts, Index model_dim, const Config& config = {}, const BankNames& names = {})
      : experts_(experts), model_dim_(model_dim), bias_(config.bias) {
    detail::expect_at_least("LinearExperts", "experts", experts, 1);
    detail::expect_at_least("LinearExperts", "model_dim", model_dim, 1);
    for (Index e = 0; e < experts; ++e) {
      layout_.add(names.prefix(e) + "weight", {model_dim, model_dim});
      if (bias_) {
        layout_.add(names.prefix(e) + "bias", {model_dim});
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
        bias().of(p, e).eigen().setZero();
      }
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape& /*tape*/,
               const Exec& exec) const {
    if (bias_) {
      detail::set_rows_to_bias(rows, detail::of(p, bias()), h, exec);
    }
    detail::multiply_rows(rows, detail::of(p, weight()), h, bias_, exec);
  }

  /// drows = dh W, dW += dhᵀ x, db += Σ dh.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<const Scalar> dh, RowView<Scalar> drows,
                ParameterView<Scalar> dp, const Tape& /*tape*/, Workspace& /*workspace*/, const Exec& exec) const {
    detail::add_weight_gradient(rows, dh, detail::of(dp, weight()), exec);
    if (bias_) {
      detail::add_bias_gradient(rows, dh, detail::of(dp, bias()), exec);
    }
    detail::multiply_rows_backward(rows, detail::of(p, weight()), dh, drows, false, exec);
  }

 private:
  detail::BankTensor weight() const { return {0, bias_ ? 2 : 1}; }
  static detail::BankTensor bias() { return {1, 2}; }

  Index experts_;
  Index model_dim_;
  bool bias_;
  Layout layout_;
};

}  // namespace moxie

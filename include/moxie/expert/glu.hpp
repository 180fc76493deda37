// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/activation.hpp>
#include <moxie/expert/bank.hpp>

namespace moxie {

/// A bank of gated linear units without biases.
///
///     f(x) = (act(x Wgᵀ) ⊙ (x Wuᵀ)) Wdᵀ
///
/// Shazeer 2020, "GLU variants improve transformer", equation 6; SwiGLU with act = SiLU, as in DiT-MoE and DeepSeekMoE. Tensors
/// of expert e: `experts.e.gate_proj.weight` (H,D), `experts.e.up_proj.weight` (H,D), `experts.e.down_proj.weight` (D,H). Tape:
/// 3RH. Cost: 6RDH forward, 12RDH backward.
template <class Scalar_, class Activation>
class GluExperts {
 public:
  using Scalar = Scalar_;
  using Config = HiddenConfig;

  class Tape {
    friend class GluExperts;
    Buffer<Scalar> gate_;    // x Wgᵀ
    Buffer<Scalar> up_;      // x Wuᵀ
    Buffer<Scalar> hidden_;  // act(gate) ⊙ up
  };

  GluExperts(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : experts_(experts), model_dim_(model_dim), hidden_dim_(config.hidden_dim) {
    detail::expect_at_least("GluExperts", "experts", experts, 1);
    detail::expect_at_least("GluExperts", "model_dim", model_dim, 1);
    detail::expect_at_least("GluExperts", "hidden_dim", hidden_dim_, 1);
    for (Index e = 0; e < experts; ++e) {
      const std::string name = names.prefix(e);
      layout_.add(name + "gate_proj.weight", {hidden_dim_, model_dim});
      layout_.add(name + "up_proj.weight", {hidden_dim_, model_dim});
      layout_.add(name + "down_proj.weight", {model_dim, hidden_dim_});
    }
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return model_dim_; }
  Index hidden_dim() const { return hidden_dim_; }

  /// Glorot uniform, each tensor from a stream of its own.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index i = 0; i < 3 * experts_; ++i) {
      detail::initialize_glorot(p[i], rng.split(std::uint64_t(i)));
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape& tape,
               const Exec& exec) const {
    const Index count = rows.count();
    const RowView<Scalar> gate = tape.gate_.matrix(count, hidden_dim_);
    const RowView<Scalar> up = tape.up_.matrix(count, hidden_dim_);
    const RowView<Scalar> hidden = tape.hidden_.matrix(count, hidden_dim_);
    detail::multiply_rows(rows, detail::of(p, gate_), gate, false, exec);
    detail::multiply_rows(rows, detail::of(p, up_), up, false, exec);
    exec.parallel_ranges(count, 16, [&](Index begin, Index end) {
      kernel::map((end - begin) * hidden_dim_, hidden.row(begin), [](auto g, auto u) { return Activation::value(g) * u; },
                  gate.row(begin), up.row(begin));
    });
    detail::multiply_rows(detail::regrouped(rows, hidden), detail::of(p, down_), h, false, exec);
  }

  /// With a = act(g): dhidden = dh Wd, dg = dhidden ⊙ u ⊙ act'(g), du = dhidden ⊙ a; drows = dg Wg + du Wu;
  /// dWd += dhᵀ hidden, dWg += dgᵀ x, dWu += duᵀ x.
  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<const Scalar> dh, RowView<Scalar> drows,
                ParameterView<Scalar> dp, const Tape& tape, Workspace& workspace, const Exec& exec) const {
    const Index count = rows.count();
    const Workspace::Frame frame(workspace);
    const RowView<const Scalar> gate = tape.gate_.view(count, hidden_dim_);
    const RowView<const Scalar> up = tape.up_.view(count, hidden_dim_);
    const RowView<const Scalar> hidden = tape.hidden_.view(count, hidden_dim_);
    const RowView<Scalar> dgate = workspace.matrix<Scalar>(count, hidden_dim_);
    const RowView<Scalar> dup = workspace.matrix<Scalar>(count, hidden_dim_);
    detail::add_weight_gradient(detail::regrouped(rows, hidden), dh, detail::of(dp, down_), exec);
    detail::multiply_rows_backward(rows, detail::of(p, down_), dh, dup, false, exec);
    exec.parallel_ranges(count, 16, [&](Index begin, Index end) {
      kernel::map((end - begin) * hidden_dim_, std::array{dgate.row(begin), dup.row(begin)},
                  [](auto d, auto g, auto u) {
                    return std::array{d * u * Activation::derivative(g), d * Activation::value(g)};
                  },
                  dup.row(begin), gate.row(begin), up.row(begin));
    });
    detail::add_weight_gradient(rows, dgate, detail::of(dp, gate_), exec);
    detail::add_weight_gradient(rows, dup, detail::of(dp, up_), exec);
    detail::multiply_rows_backward(rows, detail::of(p, gate_), dgate, drows, false, exec);
    detail::multiply_rows_backward(rows, detail::of(p, up_), dup, drows, true, exec);
  }

 private:
  static constexpr detail::BankTensor gate_{0, 3};
  static constexpr detail::BankTensor up_{1, 3};
  static constexpr detail::BankTensor down_{2, 3};

  Index experts_;
  Index model_dim_;
  Index hidden_dim_;
  Layout layout_;
};

/// DiT-MoE's and DeepSeekMoE's expert.
template <class Scalar>
using SwiGluExperts = GluExperts<Scalar, Silu>;
/// GEGLU with the tanh approximation of GELU, as T5 1.1 and flax compute it. Shazeer 2020, equation 6.
template <class Scalar>
using GegluTanhExperts = GluExperts<Scalar, GeluTanh>;
/// GEGLU with the exact GELU. Shazeer 2020, equation 6.
template <class Scalar>
using GegluErfExperts = GluExperts<Scalar, GeluErf>;
/// ReGLU: the gate is max(x Wgᵀ, 0). Shazeer 2020, equation 6.
template <class Scalar>
using ReGluExperts = GluExperts<Scalar, Relu>;

}  // namespace moxie

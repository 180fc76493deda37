// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/gemm.hpp>
#include <moxie/routing/router.hpp>
#include <moxie/routing/score.hpp>

namespace moxie {

struct SoftRouterConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index slots_per_expert = 1;
  /// logits = l2norm(x) (scale · l2norm(Φ))ᵀ with a learned scale; false: logits = x Φᵀ, Algorithm 1 of the paper as printed.
  bool normalize = true;
};

/// Soft MoE: every slot is a convex combination of all tokens of its sequence, every token one of all slots.
///
///     Z = l2norm(X) (g · l2norm(Φ))ᵀ,   D = softmax over tokens (columns of Z),   C = softmax over slots (rows of Z)
///
/// Puigcerver et al. 2023, section 2.1, Algorithms 1 and 2; l2norm(v) = v / √(Σ v² + 1e-6), ε inside the root. Slots mix the
/// tokens as they are, not normalized. Not causal: each output depends on all tokens of its sequence. Parameters: `phi.weight`
/// (E·S,D), a row a slot, and `scale` (). Cost: 2TDN for the logits, N = E·S.
template <class Scalar_>
class SoftRouter {
 public:
  using Scalar = Scalar_;
  using Plan = DensePlan<Scalar>;
  using Config = SoftRouterConfig;

  class Tape {
   public:
    /// Soft MoE needs no balance loss.
    double balance_loss() const { return 0; }

   private:
    friend class SoftRouter;
    Buffer<Scalar> x_;           // l2norm(X), (T,D)
    Buffer<Scalar> phi_;         // l2norm(Φ), (N,D)
    Buffer<Scalar> x_factor_;    // 1 / √(Σ x² + ε), T
    Buffer<Scalar> phi_factor_;  // N
  };

  /// Throws ValueError for sizes below 1.
  explicit SoftRouter(const Config& config) : config_(config) {
    constexpr std::string_view where = "SoftRouter";
    detail::expect_at_least(where, "model_dim", config.model_dim, 1);
    detail::expect_at_least(where, "experts", config.experts, 1);
    detail::expect_at_least(where, "slots_per_expert", config.slots_per_expert, 1);
    phi_ = layout_.add("phi.weight", {slots(), config.model_dim});
    if (config.normalize) {
      scale_ = layout_.add("scale", {});
    }
  }

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return config_.model_dim; }
  /// N = E·S.
  Index slots() const { return config_.experts * config_.slots_per_expert; }

  /// Φ normal with deviation 1/√D, scale 1.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    rng.fill_normal(p[phi_], 1 / std::sqrt(double(config_.model_dim)));
    if (config_.normalize) {
      p[scale_](0, 0) = Scalar(1);
    }
  }

  /// Throws ValueError naming the first token whose norm or logits are not finite.
  void route(ParameterView<const Scalar> p, const Tokens<Scalar>& in, Plan& plan, Tape& tape, Workspace& workspace,
             const Exec& exec) const {
    const Index tokens = in.count();
    RowView<const Scalar> x = in.x;
    RowView<const Scalar> phi = p[phi_];
    Scalar scale = 1;
    if (config_.normalize) {
      x = normalized(x, tape.x_, tape.x_factor_, exec);
      for (Index t = 0; t < tokens; ++t) {
        if (!(tape.x_factor_[t] > 0)) {
          throw ValueError("SoftRouter::route: token " + std::to_string(t) + " is not finite, or its norm is not");
        }
      }
      phi = normalized(phi, tape.phi_, tape.phi_factor_, exec);
      scale = p[scale_](0, 0);
    }
    const Workspace::Frame frame(workspace);
    const RowView<Scalar> z = workspace.matrix<Scalar>(tokens, slots());
    kernel::gemm<Scalar>({tokens, slots(), config_.model_dim, kernel::plain<Scalar>(x), kernel::transposed<Scalar>(phi),
                          kernel::replace<Scalar>(z)},
                         exec);  // (T,D)(D,N) -> (T,N)
    if (config_.normalize) {
      z.eigen() *= scale;
    }
    detail::expect_finite_logits<Scalar>("SoftRouter::route", z);
    plan.resize(tokens, in.sequences(), config_.experts, config_.slots_per_expert);
    plan.combine().eigen() = z.eigen();
    softmax_rows(plan.combine(), exec);
    const RowView<Scalar> d = plan.dispatch();
    exec.parallel_for(plan.sequences(),
                      [&](Index b) { softmax_columns(z.middle_rows(b * in.length(), in.length()), d.row(b * in.length())); });
  }

  /// Both softmaxes back to dZ, then dX̂ = g dZ Φ̂, dΦ̂ = g dZᵀ X̂, dg = ⟨dZᵀ X̂, Φ̂⟩, and through both normalizations.
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Plan& plan, const typename Plan::Gradient& dplan,
                RowView<Scalar> dx, ParameterView<Scalar> dp, const Tape& tape, Workspace& workspace, const Exec& exec) const {
    const Index tokens = in.count();
    const Index dim = config_.model_dim;
    const Index n = slots();
    const Workspace::Frame frame(workspace);
    const RowView<Scalar> dz = workspace.matrix<Scalar>(tokens, n);
    dz.eigen() = dplan.combine.view(tokens, n).eigen();
    softmax_rows_backward(plan.combine(), dz, exec);
    const RowView<const Scalar> dd = dplan.dispatch.view(tokens, n);
    exec.parallel_for(plan.sequences(), [&](Index b) {
      const Index first = b * in.length();
      add_softmax_columns_backward(plan.dispatch().middle_rows(first, in.length()), dd.row(first), dz.row(first));
    });
    if (!config_.normalize) {
      kernel::gemm<Scalar>(
          {n, dim, tokens, kernel::transposed<Scalar>(dz), kernel::plain<Scalar>(in.x), kernel::add_to<Scalar>(dp[phi_])},
          exec);  // (N,T)(T,D) -> (N,D)
      kernel::gemm<Scalar>(
          {tokens, dim, n, kernel::plain<Scalar>(dz), kernel::plain<Scalar>(p[phi_]), kernel::add_to<Scalar>(dx)},
          exec);  // (T,N)(N,D) -> (T,D)
      return;
    }
    const Scalar scale = p[scale_](0, 0);
    const RowView<const Scalar> x_hat = tape.x_.view(tokens, dim);
    const RowView<const Scalar> phi_hat = tape.phi_.view(n, dim);
    const RowView<Scalar> dx_hat = workspace.matrix<Scalar>(tokens, dim);
    const RowView<Scalar> dphi_hat = workspace.matrix<Scalar>(n, dim);
    kernel::gemm<Scalar>(
        {n, dim, tokens, kernel::transposed<Scalar>(dz), kernel::plain<Scalar>(x_hat), kernel::replace<Scalar>(dphi_hat)},
        exec);  // (N,T)(T,D) -> (N,D)
    kernel::gemm<Scalar>(
        {tokens, dim, n, kernel::plain<Scalar>(dz), kernel::plain<Scalar>(phi_hat), kernel::replace<Scalar>(dx_hat)},
        exec);  // (T,N)(N,D) -> (T,D)
    dp[scale_](0, 0) += kernel::dot(n * dim, dphi_hat.data(), phi_hat.data());
    add_normalized_backward(phi_hat, tape.phi_factor_, dphi_hat, scale, dp[phi_], exec);
    add_normalized_backward(x_hat, tape.x_factor_, dx_hat, scale, dx, exec);
  }

 private:
  /// Rows v · r with r = 1 / √(Σ v² + 1e-6).
  static RowView<const Scalar> normalized(RowView<const Scalar> v, Buffer<Scalar>& out, Buffer<Scalar>& factor,
                                          const Exec& exec) {
    const RowView<Scalar> hat = out.matrix(v.rows(), v.cols());
    factor.resize(v.rows());
    exec.parallel_ranges(v.rows(), 64, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        factor[i] = Scalar(1) / std::sqrt(kernel::dot(v.cols(), v.row(i), v.row(i)) + Scalar(1e-6));
        hat.middle_rows(i, 1).eigen() = v.middle_rows(i, 1).eigen() * factor[i];
      }
    });
    return hat;
  }

  /// With v̂ = r v: dv += scale · r (dv̂ - ⟨dv̂, v̂⟩ v̂).
  static void add_normalized_backward(RowView<const Scalar> hat, const Buffer<Scalar>& factor, RowView<const Scalar> dhat,
                                      Scalar scale, RowView<Scalar> dv, const Exec& exec) {
    exec.parallel_ranges(hat.rows(), 64, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const auto h = hat.middle_rows(i, 1).eigen();
        const auto d = dhat.middle_rows(i, 1).eigen();
        const Scalar dot = kernel::dot(hat.cols(), hat.row(i), dhat.row(i));
        dv.middle_rows(i, 1).eigen() += (scale * factor[i]) * (d - dot * h);
      }
    });
  }

  /// Softmax of every column of z (L,N) into d, which has the same rows.
  static void softmax_columns(RowView<const Scalar> z, Scalar* d) {
    const auto in = z.eigen().array();
    auto out = Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(d, z.rows(), z.cols());
    for (Index j = 0; j < z.cols(); ++j) {
      const Scalar largest = in.col(j).maxCoeff();
      Scalar sum = 0;
      for (Index t = 0; t < z.rows(); ++t) {
        out(t, j) = std::exp(in(t, j) - largest);
        sum += out(t, j);
      }
      out.col(j) /= sum;
    }
  }

  /// dz_tj += d_tj (dd_tj - Σ_u dd_uj d_uj), rows contiguous.
  static void add_softmax_columns_backward(RowView<const Scalar> d, const Scalar* dd, Scalar* dz) {
    for (Index j = 0; j < d.cols(); ++j) {
      Scalar dot = 0;
      for (Index t = 0; t < d.rows(); ++t) {
        dot += dd[t * d.cols() + j] * d(t, j);
      }
      for (Index t = 0; t < d.rows(); ++t) {
        dz[t * d.cols() + j] += d(t, j) * (dd[t * d.cols() + j] - dot);
      }
    }
  }

  Config config_;
  Layout layout_;
  Index phi_ = 0;
  Index scale_ = 0;
};

}  // namespace moxie

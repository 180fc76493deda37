// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/cost.hpp>
#include <moxie/kernel/activation.hpp>
#include <moxie/kernel/gemm.hpp>
#include <moxie/kernel/rows.hpp>
#include <moxie/routing/config.hpp>
#include <moxie/routing/router.hpp>
#include <moxie/routing/score.hpp>
#include <moxie/routing/selection.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

struct TimestepRouterConfig {
  Index condition_dim = 0;  ///< C, the width of `Tokens::condition`
  Index experts = 0;
  Index top_k = 1;
  double scale = 1;  ///< factor of all weights
};

/// Timestep (or task) routing: the condition of a sequence chooses, and all of its tokens go to the same K experts.
///
///     s = softmax(silu(c) Wᵀ + b)       (B,C)(C,E) -> (B,E)
///     chosen_b = the K largest, ties to the lower index;   w_t = γ s_b of the sequence b of token t
///
/// Switch-DiT (Park et al. 2024), section 3.2: c is the embedding of the timestep. Weights are the scores as they are, not
/// normalized. The gradient of c goes to `TokensGradient::condition`. Parameters: `gate.weight` (E,C), `gate.bias` (E).
/// Cost: 2BCE + O(TK).
template <class Scalar_>
class TimestepRouter {
 public:
  using Scalar = Scalar_;
  using Plan = SparsePlan<Scalar>;
  using Config = TimestepRouterConfig;

  class Tape {
   public:
    /// s (B,E): what `diffusion_prior_loss` looks at.
    RowView<const Scalar> scores() const { return scores_.view(sequences_, experts_); }
    /// The K experts of every sequence in decreasing order of score, B·K.
    std::span<const Index> choices() const { return chosen_.span(); }
    double balance_loss() const { return 0; }
    /// Adds the gradient (B,E) of a loss on `scores()`, for the next backward; the next forward forgets it. Throws ShapeError.
    void add_score_gradient(RowView<const Scalar> dscores) {
      detail::expect_shape("TimestepRouter::Tape::add_score_gradient", "dscores", dscores, sequences_, experts_);
      detail::add_rows(dscores, RowView<Scalar>(dscores_.data(), sequences_, experts_));
    }

   private:
    friend class TimestepRouter;
    Index sequences_ = 0;
    Index experts_ = 0;
    Index top_k_ = 0;
    Buffer<Scalar> activated_;  // silu(c)
    Buffer<Scalar> scores_;
    Buffer<Scalar> dscores_;
    Buffer<Index> chosen_;
    Buffer<Index> expert_;    // of each pair
    Buffer<Scalar> weight_;   // of each pair
    Buffer<Index> sequence_;  // of each token
  };

  /// Throws ValueError for sizes below 1 and K > E.
  explicit TimestepRouter(const Config& config) : config_(config) {
    constexpr std::string_view where = "TimestepRouter";
    detail::expect_at_least(where, "condition_dim", config.condition_dim, 1);
    detail::expect_experts(where, config.experts);
    detail::expect_at_least(where, "top_k", config.top_k, 1);
    detail::expect_value(config.top_k <= config.experts, where, "top_k is more than there are experts");
    detail::expect_scale<Scalar>(where, config.scale);
    weight_ = layout_.add("gate.weight", {config.experts, config.condition_dim}, {.role = Role::gate});
    bias_ = layout_.add("gate.bias", {config.experts}, {.role = Role::bias});
  }

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return -1; }
  /// R of a call: T·K.
  Index most_rows(const Sequences& sequences) const { return sequences.tokens() * config_.top_k; }
  /// Of the gate, which reads a condition for each sequence.
  Cost multiply_adds(Index /*tokens*/, Index sequences) const {
    const double products = double(sequences) * double(config_.condition_dim) * double(config_.experts);
    return {products, 2 * products};
  }

  /// Weights uniform on ±√(6 / (C + E)), biases zero.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    const double bound = std::sqrt(6.0 / double(config_.condition_dim + config_.experts));
    rng.fill_uniform(p[weight_], -bound, bound);
    detail::fill_rows(p[bias_], Scalar(0));
  }

  /// Throws ShapeError if the condition is not (B,C), ValueError naming the first sequence whose logits are not finite, and for
  /// what only other routers read.
  void route(ParameterView<const Scalar> p, const Tokens<Scalar>& in, Plan& plan, Tape& tape, Workspace& /*workspace*/,
             const Exec& exec) const {
    constexpr std::string_view where = "TimestepRouter::route";
    detail::expect_read(where, in, {});
    const Index sequences = in.sequences.count();
    const Index experts = config_.experts;
    const Index k = in.top_k > 0 ? in.top_k : config_.top_k;
    detail::expect_shape(where, "condition", in.condition, sequences, sequences == 0 ? -1 : config_.condition_dim);
    detail::expect_value(k <= experts, where, "top_k is more than there are experts");
    tape.sequences_ = sequences;
    tape.experts_ = experts;
    tape.top_k_ = k;
    tape.dscores_.assign(sequences * experts, Scalar(0));
    const RowView<Scalar> activated = tape.activated_.matrix(sequences, config_.condition_dim);
    const RowView<Scalar> s = tape.scores_.matrix(sequences, experts);
    detail::for_each_row(sequences, exec, [&](Index b) {
      kernel::map(
          activated.cols(), activated.row(b), [](auto v) { return Silu::value(v); }, in.condition.row(b));
      std::copy_n(p[bias_].data(), experts, s.row(b));
    });
    kernel::gemm<Scalar>({sequences, experts, config_.condition_dim, kernel::plain<Scalar>(activated),
                          kernel::transposed<Scalar>(p[weight_]), kernel::add_to<Scalar>(s)},
                         exec);  // (B,C)(C,E) -> (B,E)
    detail::expect_finite_logits<Scalar>(
        where, s, [](Index b) { return b; }, exec, "sequence");
    tape.chosen_.resize(sequences * k);
    for (Index b = 0; b < sequences; ++b) {
      select_top_k(s.row(b), experts, k, tape.chosen_.data() + b * k);
    }
    softmax_rows(s, exec);
    tape.expert_.resize(in.count() * k);
    tape.weight_.resize(in.count() * k);
    tape.sequence_.resize(in.count());
    in.sequences.for_each([&](Index b, Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        tape.sequence_[t] = b;
        for (Index j = 0; j < k; ++j) {
          tape.expert_[t * k + j] = tape.chosen_[b * k + j];
          tape.weight_[t * k + j] = Scalar(config_.scale) * s(b, tape.chosen_[b * k + j]);
        }
      }
    });
    plan.build(in.count(), experts, k, tape.expert_.span(), tape.weight_.span());
  }

  /// ds_b = γ Σ_{t in b} dw_t (tokens in order, and what `add_score_gradient` added) -> dz; dW += dzᵀ silu(c), db += Σ_b dz,
  /// dc += (dz W) ⊙ silu'(c).
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Plan& plan, const typename Plan::Gradient& dplan,
                const TokensGradient<Scalar>& din, ParameterView<Scalar> dp, const Tape& tape, Workspace& workspace,
                const Exec& exec) const {
    const Index sequences = tape.sequences_;
    const Index experts = config_.experts;
    const Workspace::Frame frame(workspace);
    const RowView<Scalar> dz = workspace.matrix<Scalar>(sequences, experts);
    detail::copy_rows(tape.dscores_.view(sequences, experts), dz);
    for (Index r = 0; r < plan.rows(); ++r) {
      const Index pair = plan.pair(r);
      dz(tape.sequence_[pair / tape.top_k_], tape.expert_[pair]) += Scalar(config_.scale) * dplan.weight[r];
    }
    softmax_rows_backward(tape.scores(), dz, exec);
    const RowView<const Scalar> activated = tape.activated_.view(sequences, config_.condition_dim);
    kernel::gemm<Scalar>({dp[weight_].rows(), config_.condition_dim, sequences, kernel::transposed<Scalar>(dz),
                          kernel::plain<Scalar>(activated), kernel::add_to<Scalar>(dp[weight_])},
                         exec);  // (E,B)(B,C) -> (E,C)
    for (Index b = 0; b < sequences && dp.has(bias_); ++b) {
      detail::add_rows(dz.middle_rows(b, 1), dp[bias_]);
    }
    if (din.condition.rows() == 0) {
      return;
    }
    const RowView<Scalar> dactivated = workspace.matrix<Scalar>(sequences, config_.condition_dim);
    kernel::gemm<Scalar>({sequences, config_.condition_dim, experts, kernel::plain<Scalar>(dz),
                          kernel::plain<Scalar>(p[weight_]), kernel::replace<Scalar>(dactivated)},
                         exec);  // (B,E)(E,C) -> (B,C)
    detail::for_each_row(sequences, exec, [&](Index b) {
      kernel::map(
          dactivated.cols(), din.condition.row(b), [](auto sum, auto d, auto c) { return sum + d * Silu::derivative(c); },
          din.condition.row(b), dactivated.row(b), in.condition.row(b));
    });
  }

 private:
  Config config_;
  Layout layout_;
  Index weight_ = 0;
  Index bias_ = 0;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

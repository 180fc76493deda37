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
  static constexpr bool logits_of_sequences = true;  ///< (B,E), not (T,E)

  class Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : resource_(resource) {}

    /// z (B,E), before the softmax.
    RowView<const Scalar> logits() const { return logits_.view(sequences_, experts_); }
    /// s (B,E): what `diffusion_prior_loss` looks at.
    RowView<const Scalar> scores() const { return scores_.view(sequences_, experts_); }
    /// The K experts of every sequence in decreasing order of score, B·K.
    std::span<const Index> choices() const { return chosen_.span(); }
    double balance_loss() const { return 0; }

   private:
    friend class TimestepRouter;
    detail::OwnResource resource_;
    Index sequences_ = 0;
    Index experts_ = 0;
    Index top_k_ = 0;
    Buffer<Scalar> activated_{0, resource_};  // silu(c)
    Buffer<Scalar> logits_{0, resource_};
    Buffer<Scalar> scores_{0, resource_};
    Buffer<Index> chosen_{0, resource_};
    Buffer<Index> expert_{0, resource_};    // of each pair
    Buffer<Scalar> weight_{0, resource_};   // of each pair
    Buffer<Index> sequence_{0, resource_};  // of each token
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
  void route(ParameterView<const Scalar> p, const Tokens<Scalar>& in, Plan& plan, Tape& tape, const Context& context) const {
    constexpr std::string_view where = "TimestepRouter::route";
    detail::expect_read(where, in, {.top_k = true});
    const Index sequences = in.sequences.count();
    const Index experts = config_.experts;
    const Index k = in.top_k > 0 ? in.top_k : config_.top_k;
    detail::expect_shape(where, "condition", in.condition, sequences, sequences == 0 ? -1 : config_.condition_dim);
    detail::expect_value(k <= experts, where, "top_k is more than there are experts");
    tape.sequences_ = sequences;
    tape.experts_ = experts;
    tape.top_k_ = k;
    const RowView<Scalar> activated = tape.activated_.matrix(sequences, config_.condition_dim);
    const RowView<Scalar> z = tape.logits_.matrix(sequences, experts);
    const RowView<Scalar> s = tape.scores_.matrix(sequences, experts);
    detail::for_each_row(sequences, context.exec, [&](Index b) {
      kernel::map(
          activated.cols(), activated.row(b), [](auto v) { return Silu::value(v); }, in.condition.row(b));
      std::copy_n(p[bias_].data(), experts, z.row(b));
    });
    kernel::gemm<Scalar>({sequences, experts, config_.condition_dim, kernel::plain<Scalar>(activated),
                          kernel::transposed<Scalar>(p[weight_]), kernel::add_to<Scalar>(z)},
                         context.exec);  // (B,C)(C,E) -> (B,E)
    detail::expect_finite_logits<Scalar>(
        where, z, [](Index b) { return b; }, context.exec, "sequence");
    tape.chosen_.resize(sequences * k);
    for (Index b = 0; b < sequences; ++b) {
      select_top_k(z.row(b), experts, k, tape.chosen_.data() + b * k);
    }
    softmax_rows(RowView<const Scalar>(z), s, context.exec);
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

  /// ds_b = γ Σ_{t in b} dw_t (tokens in order) -> dz, with the gradient of the logits; dW += dzᵀ silu(c), db += Σ_b dz,
  /// dc += (dz W) ⊙ silu'(c).
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Plan& plan, const RouterGradient<Plan>& gradient,
                Tape& tape, const Context& context) const {
    const ParameterView<Scalar> dp = gradient.into.parameters;
    const RowView<Scalar>& dcondition = gradient.into.tokens.condition;
    const Index sequences = tape.sequences_;
    const Index experts = config_.experts;
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> dz = context.workspace.matrix<Scalar>(sequences, experts);
    detail::fill_rows(dz, Scalar(0));
    for (Index r = 0; r < plan.rows(); ++r) {
      const Index pair = plan.pair(r);
      dz(tape.sequence_[pair / tape.top_k_], tape.expert_[pair]) += Scalar(config_.scale) * gradient.plan.weight[r];
    }
    softmax_rows_backward(tape.scores(), dz, context.exec);
    if (gradient.logits.size() != 0) {
      detail::add_rows(gradient.logits, dz);
    }
    const RowView<const Scalar> activated = tape.activated_.view(sequences, config_.condition_dim);
    kernel::gemm<Scalar>({dp[weight_].rows(), config_.condition_dim, sequences, kernel::transposed<Scalar>(dz),
                          kernel::plain<Scalar>(activated), kernel::add_to<Scalar>(dp[weight_])},
                         context.exec);  // (E,B)(B,C) -> (E,C)
    for (Index b = 0; b < sequences && dp.has(bias_); ++b) {
      detail::add_rows(dz.middle_rows(b, 1), dp[bias_]);
    }
    if (dcondition.rows() == 0) {
      return;
    }
    const RowView<Scalar> dactivated = context.workspace.matrix<Scalar>(sequences, config_.condition_dim);
    kernel::gemm<Scalar>({sequences, config_.condition_dim, experts, kernel::plain<Scalar>(dz),
                          kernel::plain<Scalar>(p[weight_]), kernel::replace<Scalar>(dactivated)},
                         context.exec);  // (B,E)(E,C) -> (B,C)
    detail::for_each_row(sequences, context.exec, [&](Index b) {
      kernel::map(
          dactivated.cols(), dcondition.row(b), [](auto sum, auto d, auto c) { return sum + d * Silu::derivative(c); },
          dcondition.row(b), dactivated.row(b), in.condition.row(b));
    });
  }

 private:
  Config config_;
  Layout layout_;
  Index weight_ = 0;
  Index bias_ = 0;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

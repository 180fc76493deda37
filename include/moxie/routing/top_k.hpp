// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/gemm.hpp>
#include <moxie/loss/balance.hpp>
#include <moxie/routing/router.hpp>
#include <moxie/routing/score.hpp>
#include <moxie/routing/selection.hpp>

namespace moxie {

/// Which comes first.
enum class TopKOrder {
  softmax_top_k,  ///< softmax over all experts, then the K largest (V-MoE, DeepSeekMoE, DiT-MoE)
  top_k_softmax,  ///< the K largest logits, then softmax over those (Mixtral): the same as `normalize`
};

struct TopKRouterConfig {
  Index model_dim = 0;
  Index experts = 0;
  Index top_k = 1;
  TopKOrder order = TopKOrder::softmax_top_k;
  bool normalize = false;  ///< weights divided by (their sum + 1e-20); top_k_softmax always is
  double scale = 1;        ///< factor of all weights (DeepSeek's routed scaling factor)
  Balance balance = {};
  /// Allows K = 1 with weights that sum to 1: they are constant, and the gate would learn from the balance loss alone.
  bool allow_constant_weights = false;
};

/// Token choice: a linear gate, every token takes its K best experts, without capacity.
///
///     z = x Wgᵀ,  s = softmax(z),  chosen = K largest z (ties: the lower index)
///     w = scale · s,  or normalized: w = scale · s / (Σ_chosen s + 1e-20)
///
/// Sources: V-MoE (Riquelme et al. 2021), DeepSeekMoE (Dai et al. 2024) eq. 10 and 11; the other order: Mixtral (Jiang et al.
/// 2024), section 2. Parameter: `gate.weight` (E,D). Gate, softmax and weights in `Scalar`. Cost: 2TDE + O(TEK).
template <class Scalar_>
class TopKRouter {
 public:
  using Scalar = Scalar_;
  using Plan = SparsePlan<Scalar>;
  using Config = TopKRouterConfig;

  class Tape {
   public:
    /// s, (T,E): the softmax over all experts.
    RowView<const Scalar> scores() const { return scores_.view(tokens_, experts_); }
    /// The K experts of every token in decreasing order of score, T·K indices.
    std::span<const Index> choices() const { return chosen_.span(); }
    /// Weighted sum of the balance losses; `backward` adds its gradient.
    double balance_loss() const { return balance_loss_; }

   private:
    friend class TopKRouter;
    Index tokens_ = 0;
    Index experts_ = 0;
    Buffer<Scalar> scores_;
    Buffer<Index> chosen_;
    Buffer<Scalar> weights_;
    Buffer<std::int64_t> counts_;           // (1,E)
    Buffer<std::int64_t> sequence_counts_;  // (B,E)
    Index sequences_ = 0;
    double balance_loss_ = 0;
  };

  /// Throws ValueError for sizes below 1, K > E, a negative balance weight, and weights that would be constant.
  explicit TopKRouter(const Config& config) : config_(config) {
    constexpr std::string_view where = "TopKRouter";
    detail::expect_at_least(where, "model_dim", config.model_dim, 1);
    detail::expect_at_least(where, "experts", config.experts, 1);
    detail::expect_at_least(where, "top_k", config.top_k, 1);
    if (config.top_k > config.experts) {
      throw ValueError("TopKRouter: top_k is " + std::to_string(config.top_k) + ", expected at most the " +
                       std::to_string(config.experts) + " experts");
    }
    detail::expect_value(std::isfinite(config.scale), where, "scale is not finite");
    detail::expect_value(config.balance.expert_level >= 0 && config.balance.sequence_level >= 0, where,
                         "balance weights must not be negative or NaN");
    detail::expect_value(
        config.top_k > 1 || config.experts == 1 || config.allow_constant_weights ||
            !(config.normalize || config.order == TopKOrder::top_k_softmax),
        where,
        "with top_k = 1, normalized weights are always 1 and the gate gets no gradient from the output; choose "
        "normalize = false with softmax_top_k, or set allow_constant_weights");
    gate_ = layout_.add("gate.weight", {config.experts, config.model_dim});
  }

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return config_.model_dim; }

  /// Uniform on ±1/√D (Kaiming uniform with a = √5, as the reference).
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    const double bound = 1 / std::sqrt(double(config_.model_dim));
    rng.fill_uniform(p[gate_], -bound, bound);
  }

  /// Throws ValueError naming the first token whose logits are not finite.
  void route(ParameterView<const Scalar> p, const Tokens<Scalar>& in, Plan& plan, Tape& tape, Workspace& /*workspace*/,
             const Exec& exec) const {
    const Index tokens = in.count();
    const Index experts = config_.experts;
    const Index k = config_.top_k;
    tape.tokens_ = tokens;
    tape.experts_ = experts;
    const RowView<Scalar> s = tape.scores_.matrix(tokens, experts);
    kernel::gemm<Scalar>({tokens, experts, config_.model_dim, kernel::plain<Scalar>(in.x), kernel::transposed<Scalar>(p[gate_]),
                          kernel::replace<Scalar>(s)},
                         exec);  // (T,D)(D,E) -> (T,E)
    detail::expect_finite_logits<Scalar>("TopKRouter::route", s);
    tape.chosen_.resize(tokens * k);
    tape.weights_.resize(tokens * k);
    // Of the logits, not of the scores: rounding the softmax makes ties that the logits do not have.
    for_each_row(tokens, exec, [&](Index t) { select_top_k(s.row(t), experts, k, tape.chosen_.data() + t * k); });
    softmax_rows(s, exec);
    for_each_row(tokens, exec, [&](Index t) {
      const Index* chosen = tape.chosen_.data() + t * k;
      const Scalar factor = Scalar(config_.scale) / normalizer(s.row(t), chosen);
      for (Index j = 0; j < k; ++j) {
        tape.weights_[t * k + j] = factor * s(t, chosen[j]);
      }
    });
    plan.build(tokens, experts, k, tape.chosen_.span(), tape.weights_.span());
    count(in, tape);
  }

  /// dw -> ds (and the balance losses' ds) -> dz; dWg += dzᵀ x, dx += dz Wg. Choices and counts are constants.
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Plan& plan, const typename Plan::Gradient& dplan,
                RowView<Scalar> dx, ParameterView<Scalar> dp, const Tape& tape, Workspace& workspace, const Exec& exec) const {
    const Index tokens = in.count();
    const Index experts = config_.experts;
    const Index k = config_.top_k;
    const Workspace::Frame frame(workspace);
    const RowView<const Scalar> s = tape.scores();
    const RowView<Scalar> dz = workspace.matrix<Scalar>(tokens, experts);
    const RowView<Scalar> dw = workspace.matrix<Scalar>(tokens, k);
    dz.eigen().setZero();
    dw.eigen().setZero();
    for (Index r = 0; r < plan.rows(); ++r) {
      dw.data()[plan.pair(r)] = Scalar(config_.scale) * dplan.weight[r];
    }
    if (!normalized()) {
      for_each_row(tokens, exec, [&](Index t) {
        for (Index j = 0; j < k; ++j) {
          dz(t, tape.chosen_[t * k + j]) = dw(t, j);  // ds so far
        }
      });
    }
    if (config_.balance.expert_level > 0) {
      balance_loss_backward(tape.counts_.view(1, experts), k, config_.balance.expert_level, dz);
    }
    if (config_.balance.sequence_level > 0) {
      balance_loss_backward(tape.sequence_counts_.view(tape.sequences_, experts), k, config_.balance.sequence_level, dz);
    }
    softmax_rows_backward(s, dz, exec);
    if (normalized()) {
      for_each_row(tokens, exec,
                   [&](Index t) { add_normalized_gradient(s.row(t), tape.chosen_.data() + t * k, dw.row(t), dz.row(t)); });
    }
    kernel::gemm<Scalar>({experts, config_.model_dim, tokens, kernel::transposed<Scalar>(dz), kernel::plain<Scalar>(in.x),
                          kernel::add_to<Scalar>(dp[gate_])},
                         exec);  // (E,T)(T,D) -> (E,D)
    kernel::gemm<Scalar>({tokens, config_.model_dim, experts, kernel::plain<Scalar>(dz), kernel::plain<Scalar>(p[gate_]),
                          kernel::add_to<Scalar>(dx)},
                         exec);  // (T,E)(E,D) -> (T,D)
  }

 private:
  template <class F>
  static void for_each_row(Index rows, const Exec& exec, F&& f) {
    exec.parallel_ranges(rows, 64, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        f(t);
      }
    });
  }

  /// Softmax over the chosen logits is their scores divided by the sum of these: both orders are one computation.
  bool normalized() const { return config_.normalize || config_.order == TopKOrder::top_k_softmax; }

  /// What the chosen scores are divided by: n = Σ_chosen s + 1e-20, or 1.
  Scalar normalizer(const Scalar* s, const Index* chosen) const {
    if (!normalized()) {
      return Scalar(1);
    }
    Scalar sum = 0;
    for (Index j = 0; j < config_.top_k; ++j) {
      sum += s[chosen[j]];
    }
    return sum + Scalar(1e-20);
  }

  /// The weights w_j = s_j / n are a softmax over the chosen logits alone: dz_j += w_j (dw_j - Σ_i dw_i w_i). Straight to the
  /// logits, so that experts that were not chosen get exactly nothing.
  void add_normalized_gradient(const Scalar* s, const Index* chosen, const Scalar* dw, Scalar* dz) const {
    const Scalar n = normalizer(s, chosen);
    Scalar dot = 0;
    for (Index j = 0; j < config_.top_k; ++j) {
      dot += dw[j] * s[chosen[j]] / n;
    }
    for (Index j = 0; j < config_.top_k; ++j) {
      dz[chosen[j]] += s[chosen[j]] / n * (dw[j] - dot);
    }
  }

  /// Counts the choices and takes the balance losses.
  void count(const Tokens<Scalar>& in, Tape& tape) const {
    const Index experts = config_.experts;
    const Index k = config_.top_k;
    tape.balance_loss_ = 0;
    tape.sequences_ = in.sequences();
    const auto tally = [&](Buffer<std::int64_t>& counts, Index groups, double weight) {
      counts.assign(groups * experts, 0);
      const Index per_group = groups == 0 ? 1 : in.count() * k / groups;
      for (Index i = 0; i < in.count() * k; ++i) {
        ++counts[i / per_group * experts + tape.chosen_[i]];
      }
      tape.balance_loss_ += weight * balance_loss<Scalar>(tape.scores(), counts.view(groups, experts), k);
    };
    if (config_.balance.expert_level > 0) {
      tally(tape.counts_, 1, config_.balance.expert_level);
    }
    if (config_.balance.sequence_level > 0) {
      tally(tape.sequence_counts_, tape.sequences_, config_.balance.sequence_level);
    }
  }

  Config config_;
  Layout layout_;
  Index gate_ = 0;
};

}  // namespace moxie

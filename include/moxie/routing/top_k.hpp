// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/rows.hpp>
#include <moxie/loss/balance.hpp>
#include <moxie/routing/capacity.hpp>
#include <moxie/routing/gated_router.hpp>
#include <moxie/routing/selection.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Token choice: a linear gate, every token takes its K best experts.
///
///     z  = x Wgᵀ (+ noise),   s = softmax(z) or sigmoid(z)
///     chosen = the K largest z; or s + b, from the best groups of experts        ties: the lower index
///     w = γ s;  normalized: w = γ s / Σ_chosen s
///
/// then, with a capacity, every expert keeps the first C of those in a group that chose it, and the others are dropped: their
/// weight is not given to other choices.
///
///     V-MoE        .capacity = {.factor = 1.05, .priority = Priority::weight}, .noise = {.logits = 1}
///     GShard       .top_k = 2, .normalize = true, .balance = {.gshard = 0.01}, .capacity = {.factor = 2}
///     Switch       .balance = {.expert_level = 0.01}, .capacity = {.factor = 1.25}, .noise = {.jitter = 0.01}
///     Mixtral      .order = TopKOrder::top_k_softmax
///     DeepSeekMoE  .balance = {.expert_level = 0.01}; DiT-MoE too
///     DeepSeek-V3  .normalize = true, .scale = 2.5, .score = Score::sigmoid, .selection_bias = true,
///                  .groups = {.count = 8, .chosen = 4}
///
/// Riquelme et al. 2021; Lepikhin et al. 2020; Fedus et al. 2021; Jiang et al. 2024; Dai et al. 2024; DeepSeek-AI 2024.
///
/// The experts may also be given: `Tokens::chosen`. Parameters: `gate.weight` (E,D), or (E,G) with `gate_dim`; with a selection
/// bias `gate.e_score_correction_bias` (E), which no gradient trains. Gate, scores and weights in `Scalar`. Cost: 2TDE +
/// O(TEK).
template <class Scalar_>
class TopKRouter : public GatedRouter<TopKRouter<Scalar_>, Scalar_> {
  using Base = GatedRouter<TopKRouter, Scalar_>;

 public:
  using Scalar = Scalar_;
  using typename Base::Plan;
  using Config = TopKRouterConfig;

  class Tape : public Base::Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : Base::Tape(resource), resource_(resource) {}

    /// s, (T,E): the scores of all experts.
    RowView<const Scalar> scores() const { return scores_.view(tokens_, experts_); }
    /// The K experts of every token in decreasing order of what selects, T·K indices; dropped ones too. What `Tokens::chosen`
    /// takes to route as this forward did.
    std::span<const Index> choices() const { return chosen_.span(); }
    /// The place of every choice at its expert, T·K, -1 of no choice; empty without a capacity. Choices with place >= C are
    /// dropped.
    std::span<const Index> places() const { return places_.place.span(); }
    /// K of this forward.
    Index top_k() const { return top_k_; }
    /// Weighted sum of the balance losses; `backward` adds its gradient.
    double balance_loss() const { return totals_.loss(balance_); }
    /// What the losses are made of. To accumulate over micro-batches, add those of all forwards up, and give each tape the sum
    /// before its backward.
    const BalanceTotals& balance_totals() const { return totals_; }
    /// Throws ShapeError for totals of other experts.
    void set_balance_totals(const BalanceTotals& totals) {
      if (totals.counts.size() != totals_.counts.size()) {
        throw ShapeError("TopKRouter::Tape::set_balance_totals: totals of " + std::to_string(totals.counts.size()) +
                         " experts, expected " + std::to_string(totals_.counts.size()));
      }
      totals_ = totals;
    }
    /// How often each expert was chosen, by pairs that were then dropped too: the load that `update_selection_bias` takes.
    std::vector<std::int64_t> times_chosen() const {
      std::vector<std::int64_t> counts(std::size_t(experts_), 0);
      for (const Index e : chosen_) {
        if (e >= 0) {
          ++counts[std::size_t(e)];
        }
      }
      return counts;
    }

   private:
    friend class TopKRouter;
    detail::OwnResource resource_;
    Index tokens_ = 0;
    Index experts_ = 0;
    Index top_k_ = 0;
    Buffer<Scalar> scores_{0, resource_};
    Buffer<Scalar> probabilities_{0, resource_};        // sigmoid scores over their sum, for the losses
    Buffer<Scalar> clean_probabilities_{0, resource_};  // of the logits without noise
    Buffer<Index> chosen_{0, resource_};
    Buffer<Index> best_{0, resource_};  // the K largest logits, where others may have been chosen and losses look at them
    Places places_{resource_};
    Buffer<Scalar> weights_{0, resource_};
    Buffer<Scalar> shares_{0, resource_};  // normalized weights without the scale
    Balance balance_;
    BalanceTotals totals_;
  };

  /// Throws what `TopKRouterConfig::expect_valid` throws.
  explicit TopKRouter(const Config& config) : Base("TopKRouter", config.model_dim, gate_of(config)), config_(config) {
    this->layout_ = config.layout();
  }

  static constexpr RouterReads reads = {.gate_x = true, .chosen = true, .capacity_factor = true, .top_k = true};

  const Config& config() const { return config_; }
  /// R of a call: T·K, or with a capacity the most that it can be, min(L·K, E·C) of each group.
  Index most_rows(const Sequences& sequences) const {
    if (!config_.capacity.limited()) {
      return sequences.tokens() * config_.top_k;
    }
    Index rows = 0;
    config_.capacity.groups(sequences).for_each([&](Index, Index begin, Index end) {
      const Index pairs = (end - begin) * config_.top_k;
      rows += pairs == 0 ? 0 : (std::min)(pairs, config_.experts * expert_capacity(pairs, config_.experts, config_.capacity));
    });
    return rows;
  }

  /// The gate as `LinearGate` says, the selection bias zero.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    Base::initialize(p, rng);
    if (config_.selection_bias) {
      detail::fill_rows(p[bias_], Scalar(0));
    }
  }

  /// Experts from `in.chosen`, where there are any, get the weights that they would have got if the router had chosen them;
  /// groups and the selection bias then select nothing.
  void choose(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> z, Plan& plan, Tape& tape,
              const Context& context) const {
    const Index tokens = in.count();
    const Index experts = config_.experts;
    const Index k = choices_of(in);
    const Capacity capacity = config_.capacity.with(in.capacity_factor);
    const Exec& exec = context.exec;
    tape.tokens_ = tokens;
    tape.experts_ = experts;
    tape.top_k_ = k;
    tape.balance_ = config_.balance;
    const RowView<Scalar> s = tape.scores_.matrix(tokens, experts);
    scores(z, s, exec);
    tape.chosen_.resize(tokens * k);
    select(p, in, z, s, tape, context);
    take_weights(z, s, tape, exec);
    std::span<const Index> assigned = tape.chosen_.span();
    tape.places_.place.resize(0);
    if (capacity.limited()) {
      assign_places<Scalar>(capacity.groups(in.sequences), {experts, k, tape.chosen_.span(), tape.weights_.span()}, capacity,
                            tape.places_);
      assigned = tape.places_.assigned.span();
    }
    plan.build(tokens, experts, k, assigned, tape.weights_.span());
    take_losses(in, tape, context);
  }

  /// dw -> ds, with what the balance losses give ds -> dz. Choices, places and counts are constants; the weight of a dropped
  /// choice has no gradient.
  void choose_backward(const Tokens<Scalar>& in, const Plan& plan, const RouterGradient<Plan>& gradient, RowView<Scalar> dz,
                       Tape& tape, const Context& context) const {
    const Index tokens = in.count();
    const Index experts = config_.experts;
    const Exec& exec = context.exec;
    const RowView<const Scalar> s = tape.scores();  // dz is first ∂/∂scores, then ∂/∂logits
    const RowView<Scalar> dw = zeros(tokens, tape.top_k_, context.workspace);
    for (Index r = 0; r < plan.rows(); ++r) {
      dw.data()[plan.pair(r)] = Scalar(config_.scale) * gradient.plan.weight[r];
    }
    const bool losses = config_.balance.any();
    // What does not pass through the scores on its way to the logits.
    const RowView<Scalar> dlogits = losses ? zeros(tokens, experts, context.workspace) : RowView<Scalar>();
    if (losses) {
      add_loss_gradients(in, gradient.into.tokens.loss_factor, tape, dz, dlogits, context);
    }
    if (!config_.normalized()) {
      detail::for_each_row(tokens, exec, [&](Index t) { add_weight_gradient(tape, t, dw.row(t), dz.row(t)); });
    }
    config_.score == Score::softmax ? softmax_rows_backward(s, dz, exec) : sigmoid_rows_backward(s, dz, exec);
    if (config_.normalized()) {
      detail::for_each_row(tokens, exec, [&](Index t) { add_share_gradient(s.row(t), tape, t, dw.row(t), dz.row(t)); });
    }
    if (losses) {
      detail::add_rows(dlogits, dz);
    }
  }

  /// Throws ValueError for an `in.top_k` or `in.chosen` that the router could not have, and a selection bias that is not
  /// finite.
  void expect_routable(std::string_view where, ParameterView<const Scalar> p, const Tokens<Scalar>& in) const {
    const Index k = choices_of(in);
    const Capacity capacity = config_.capacity.with(in.capacity_factor);
    if (in.has_chosen()) {
      detail::expect_value(in.top_k == 0 || in.top_k == k, where, "top_k is not the number of columns of chosen");
      detail::expect_shape(where, "chosen", in.chosen, in.count(), k);
      detail::expect_chosen(where, in, config_.experts);
    }
    if (in.has_chosen() || in.top_k > 0) {
      config_.expect_top_k(where, k, in.has_chosen());
    }
    if (capacity.limited()) {
      capacity.groups(in.sequences).for_each([&](Index, Index begin, Index end) {
        if (begin < end) {
          expert_capacity((end - begin) * k, config_.experts, capacity);
        }
      });
    }
    if (config_.selection_bias) {
      detail::expect_value(kernel::all_finite(config_.experts, p[bias_].data()), where, "the selection bias is not finite");
    }
  }

 private:
  static LinearGate<Scalar> gate_of(const Config& config) {
    config.template expect_valid<Scalar>("TopKRouter");
    return {"TopKRouter", config.gate_input_dim(), config.experts, config.noise};
  }

  /// K of a call.
  Index choices_of(const Tokens<Scalar>& in) const {
    return in.has_chosen() ? in.chosen.cols() : in.top_k > 0 ? in.top_k : config_.top_k;
  }

  static RowView<Scalar> zeros(Index rows, Index cols, Workspace& workspace) {
    const RowView<Scalar> m = workspace.matrix<Scalar>(rows, cols);
    detail::fill_rows(m, Scalar(0));
    return m;
  }

  /// s of logits z; s may be z.
  void scores(RowView<const Scalar> z, RowView<Scalar> s, const Exec& exec) const {
    if (config_.score == Score::softmax) {
      softmax_rows(z, s, exec);
      return;
    }
    if (s.data() != z.data()) {
      detail::copy_rows(z, s);
    }
    sigmoid_rows(s, exec);
  }

  void select(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> z, RowView<const Scalar> s,
              Tape& tape, const Context& context) const {
    const Index k = tape.top_k_;
    // Of the logits, not of the scores: rounding the softmax makes ties that the logits do not have.
    const auto best_of = [&](Buffer<Index>& chosen) {
      detail::for_each_row(z.rows(), context.exec,
                           [&](Index t) { select_top_k(z.row(t), config_.experts, k, chosen.data() + t * k); });
    };
    tape.best_.resize(0);
    if (!in.has_chosen() && !config_.biased()) {
      best_of(tape.chosen_);
      return;
    }
    if (in.has_chosen()) {
      detail::copy_rows(in.chosen, RowView<Index>(tape.chosen_.data(), in.count(), k));
    } else {
      select_biased(p, s, tape, context);
    }
    if (config_.balance.any()) {
      tape.best_.resize(z.rows() * k);
      best_of(tape.best_);
    }
  }

  /// By s + b, from the best groups.
  void select_biased(ParameterView<const Scalar> p, RowView<const Scalar> s, Tape& tape, const Context& context) const {
    const Index experts = config_.experts;
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> score = context.workspace.matrix<Scalar>(s.rows(), experts);
    const RowView<Scalar> group_score = context.workspace.matrix<Scalar>(s.rows(), config_.groups.count);
    const RowView<Index> group = context.workspace.matrix<Index>(s.rows(), config_.groups.count);
    const Index k = tape.top_k_;
    detail::for_each_row(s.rows(), context.exec, [&](Index t) {
      for (Index e = 0; e < experts; ++e) {
        score(t, e) = s(t, e) + (config_.selection_bias ? p[bias_](0, e) : Scalar(0));
      }
      select_top_k_in_groups(score.row(t), experts, k, config_.groups, {group_score.row(t), group.row(t)},
                             tape.chosen_.data() + t * k);
    });
  }

  /// The weights of all choices; 0 of none.
  void take_weights(RowView<const Scalar> z, RowView<const Scalar> s, Tape& tape, const Exec& exec) const {
    const Index k = tape.top_k_;
    tape.weights_.resize(s.rows() * k);
    if (config_.normalized()) {
      tape.shares_.resize(s.rows() * k);
    }
    detail::for_each_row(s.rows(), exec, [&](Index t) {
      const Index* chosen = tape.chosen_.data() + t * k;
      Scalar* weight = tape.weights_.data() + t * k;
      if (config_.normalized()) {
        Scalar* share = tape.shares_.data() + t * k;
        shares(z.row(t), s.row(t), chosen, k, share);
        std::copy_n(share, k, weight);
      } else {
        for (Index j = 0; j < k; ++j) {
          weight[j] = chosen[j] < 0 ? Scalar(0) : s(t, chosen[j]);
        }
      }
      for (Index j = 0; j < k; ++j) {
        weight[j] *= Scalar(config_.scale);
      }
    });
  }

  /// The normalized weights of one token, without the scale: their scores over the sum of these, from the logits, so that the
  /// weights sum to 1 where all of these scores are 0. For softmax scores this is a softmax of the chosen logits. Exactly 1 for
  /// one choice, 0 of none.
  void shares(const Scalar* z, const Scalar* s, const Index* chosen, Index k, Scalar* share) const {
    Scalar sum = 0;
    Scalar largest = -std::numeric_limits<Scalar>::infinity();
    for (Index j = 0; j < k; ++j) {
      largest = chosen[j] < 0 ? largest : (std::max)(largest, z[chosen[j]]);
    }
    for (Index j = 0; j < k; ++j) {
      const Index e = chosen[j];
      if (e < 0) {
        share[j] = 0;
        continue;
      }
      share[j] = formula::relative_score(config_.score, z[e], s[e], largest);
      sum += share[j];
    }
    for (Index j = 0; j < k; ++j) {
      share[j] /= chosen[j] < 0 ? Scalar(1) : sum;
    }
  }

  /// w_j = s_j:  ds_j += dw_j.
  static void add_weight_gradient(const Tape& tape, Index t, const Scalar* dw, Scalar* ds) {
    const Index* chosen = tape.chosen_.data() + t * tape.top_k_;
    for (Index j = 0; j < tape.top_k_; ++j) {
      if (chosen[j] >= 0) {
        ds[chosen[j]] += dw[j];
      }
    }
  }

  /// The normalized weights are a softmax of the chosen z, or of the chosen ln σ(z), whose derivative is 1 - s:
  ///
  ///     dz_j += w_j (dw_j - Σ_i dw_i w_i), for sigmoid scores times 1 - s_j
  ///
  /// Straight to the logits, so that experts that were not chosen get exactly nothing, and scores may be 0.
  void add_share_gradient(const Scalar* s, const Tape& tape, Index t, const Scalar* dw, Scalar* dz) const {
    const Index k = tape.top_k_;
    const Index* chosen = tape.chosen_.data() + t * k;
    const Scalar* w = tape.shares_.data() + t * k;
    Scalar dot = 0;
    for (Index j = 0; j < k; ++j) {
      dot += dw[j] * w[j];
    }
    for (Index j = 0; j < k; ++j) {
      if (chosen[j] < 0) {
        continue;
      }
      dz[chosen[j]] += formula::share_slope(config_.score, s[chosen[j]], w[j], dw[j], dot);
    }
  }

  /// Adds the gradients of `factor` times the losses to ∂/∂scores, and to ∂/∂logits what does not pass through the scores.
  void add_loss_gradients(const Tokens<Scalar>& in, double factor, const Tape& tape, RowView<Scalar> dscores,
                          RowView<Scalar> dlogits, const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const bool softmax = config_.score == Score::softmax;
    const bool normalizes = !softmax && config_.balance.of_probabilities();
    const bool clean = tape.gate().noisy() && config_.balance.importance > 0;
    const RowView<Scalar> dprobabilities = normalizes ? zeros(tape.tokens_, tape.experts_, context.workspace) : dscores;
    const RowView<Scalar> dclean = clean ? zeros(tape.tokens_, tape.experts_, context.workspace) : dprobabilities;
    balance_backward<Scalar>(config_.balance.times(factor), losses_of(in, tape), tape.totals_,
                             {dprobabilities, dclean, dlogits, dlogits}, context.workspace);
    if (normalizes) {
      sigmoid_probabilities_backward<Scalar>(tape.probabilities_.view(tape.tokens_, tape.experts_), tape.scores(),
                                             dprobabilities, context.exec);
      detail::add_rows(dprobabilities, dlogits);
    }
    if (clean) {
      const RowView<const Scalar> p_clean = tape.clean_probabilities_.view(tape.tokens_, tape.experts_);
      if (softmax) {
        softmax_rows_backward(p_clean, dclean, context.exec);
      } else {
        const RowView<Scalar> s_clean = context.workspace.matrix<Scalar>(tape.tokens_, tape.experts_);
        scores(tape.gate().logits(), s_clean, context.exec);
        sigmoid_probabilities_backward<Scalar>(p_clean, s_clean, dclean, context.exec);
      }
      detail::add_rows(dclean, dlogits);
    }
  }

  BalanceInput<Scalar> losses_of(const Tokens<Scalar>& in, const Tape& tape) const {
    const Balance& balance = config_.balance;
    const bool sigmoid_scores = config_.score == Score::sigmoid;
    BalanceInput<Scalar> out;
    out.sequences = in.sequences;
    out.top_k = tape.top_k_;
    if (balance.of_probabilities()) {
      out.probabilities = sigmoid_scores ? tape.probabilities_.view(tape.tokens_, tape.experts_) : tape.scores();
    }
    if (balance.importance > 0) {
      out.clean_probabilities =
          tape.gate().noisy() ? tape.clean_probabilities_.view(tape.tokens_, tape.experts_) : out.probabilities;
    }
    out.logits = tape.gate().logits();
    out.noisy_logits = tape.gate().noisy_logits();
    out.best = tape.best_.size() > 0 ? tape.best_.span() : tape.chosen_.span();
    out.counted = balance.count_chosen ? tape.chosen_.span() : out.best;
    out.deviation = tape.gate().noisy() ? this->gate().deviation() : 0;
    return out;
  }

  void take_losses(const Tokens<Scalar>& in, Tape& tape, const Context& context) const {
    const Balance& balance = config_.balance;
    tape.totals_.clear(config_.experts);
    if (!balance.any()) {
      return;
    }
    if (config_.score == Score::sigmoid && balance.of_probabilities()) {
      sigmoid_probabilities<Scalar>(tape.gate().noisy_logits(), tape.scores(),
                                    tape.probabilities_.matrix(tape.tokens_, tape.experts_), context.exec);
    }
    if (tape.gate().noisy() && balance.importance > 0) {
      const RowView<Scalar> clean = tape.clean_probabilities_.matrix(tape.tokens_, tape.experts_);
      scores(tape.gate().logits(), clean, context.exec);
      if (config_.score == Score::sigmoid) {
        sigmoid_probabilities<Scalar>(tape.gate().logits(), clean, clean, context.exec);
      }
    }
    add_balance_totals(balance, losses_of(in, tape), config_.experts, tape.totals_, context.workspace);
  }

  Config config_;
  static constexpr Index bias_ = 1;  // its position in the layout, after the gate's weight
};

}  // namespace moxie::inline MOXIE_NAMESPACE

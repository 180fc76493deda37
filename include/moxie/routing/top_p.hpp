// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/rows.hpp>
#include <moxie/loss/entropy.hpp>
#include <moxie/routing/gated_router.hpp>
#include <moxie/routing/selection.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

struct TopPRouterConfig {
  Index model_dim = 0;
  Index experts = 0;
  double top_p = 0.4;  ///< the chosen scores of a token add up to at least this, if `most` allows
  Index most = 0;      ///< never more experts a token than this; 0: all
  /// Weight of the mean entropy of the scores: a token that is certain needs few experts (the paper's dynamic loss).
  double token_entropy = 0;
  double scale = 1;    ///< factor of all weights
  Index gate_dim = 0;  ///< G, the width of `Tokens::gate_x`; 0: the gate reads what is D wide
};

/// Top-p: every token takes as many experts as it needs to be sure enough, easy ones few and hard ones many.
///
///     s = softmax(x Wgᵀ)                                                        (T,D)(D,E) -> (T,E)
///     chosen = the fewest of the largest s, ties to the lower index, with Σ_chosen s >= p;   w = γ s
///
/// Huang et al. 2024, "Harder tasks need more experts", equations 3 to 5. A token has at least one expert. Pair numbers count
/// tokens, then choices. Parameter: `gate.weight` (E,D), or (E,G) with `gate_dim`. Cost: 2TDE + O(T E log E).
template <class Scalar_>
class TopPRouter : public GatedRouter<TopPRouter<Scalar_>, Scalar_> {
  using Base = GatedRouter<TopPRouter, Scalar_>;

 public:
  using Scalar = Scalar_;
  using typename Base::Plan;
  using Config = TopPRouterConfig;

  class Tape : public Base::Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : Base::Tape(resource), resource_(resource) {}

    /// s (T,E).
    RowView<const Scalar> scores() const { return scores_.view(tokens_, experts_); }
    /// The mean entropy of the scores, weighted; `backward` adds its gradient.
    double balance_loss() const { return loss_; }

   private:
    friend class TopPRouter;
    detail::OwnResource resource_;
    Index tokens_ = 0;
    Index experts_ = 0;
    double loss_ = 0;
    Buffer<Scalar> scores_{0, resource_};
    Buffer<Index> order_{0, resource_};  // (T,E): experts by decreasing score
    Buffer<Index> token_{0, resource_};  // of each pair
    Buffer<Index> expert_{0, resource_};
    Buffer<Scalar> weight_{0, resource_};
  };

  /// Throws ValueError for sizes below 1, p outside (0, 1], and a weight of the entropy that is negative or not finite.
  explicit TopPRouter(const Config& config)
      : Base("TopPRouter", config.model_dim,
             {"TopPRouter", config.gate_dim > 0 ? config.gate_dim : config.model_dim, config.experts}),
        config_(config) {
    constexpr std::string_view where = "TopPRouter";
    detail::expect_value(config.top_p > 0 && config.top_p <= 1, where, "top_p must be above 0 and at most 1");
    detail::expect_at_least(where, "gate_dim", config.gate_dim, 0);
    detail::expect_at_least(where, "most", config.most, 0);
    detail::expect_scale<Scalar>(where, config.scale);
    detail::expect_value(config.token_entropy >= 0 && std::isfinite(config.token_entropy), where,
                         "token_entropy must be finite and not negative");
    detail::expect_in_scalar<Scalar>(where, "token_entropy", config.token_entropy);
  }

  static constexpr RouterReads reads = {.gate_x = true, .top_k = true};

  const Config& config() const { return config_; }
  /// The most that R of a call can be: `most` experts for every token.
  Index most_rows(const Sequences& sequences) const {
    return sequences.tokens() * (config_.most > 0 ? (std::min)(config_.most, config_.experts) : config_.experts);
  }

  /// `in.top_k` is another `most` for this call.
  void choose(ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& in, RowView<const Scalar> z, Plan& plan, Tape& tape,
              const Context& context) const {
    const Index tokens = in.count();
    const Index experts = config_.experts;
    const Index limit = in.top_k > 0 ? in.top_k : config_.most > 0 ? config_.most : experts;
    tape.tokens_ = tokens;
    tape.experts_ = experts;
    const RowView<Scalar> s = tape.scores_.matrix(tokens, experts);
    softmax_rows(z, s, context.exec);
    const RowView<Index> order = tape.order_.matrix(tokens, experts);
    detail::for_each_row(tokens, context.exec, [&](Index t) {
      partial_sort_top_k([&](Index e) { return z(t, e); }, experts, experts, order.row(t));
    });
    tape.token_.resize(tokens * experts);
    tape.expert_.resize(tokens * experts);
    tape.weight_.resize(tokens * experts);
    Index pairs = 0;
    tape.loss_ = 0;
    for (Index t = 0; t < tokens; ++t) {
      double sum = 0;
      for (Index j = 0; j < (std::min)(limit, experts) && (j == 0 || sum < config_.top_p); ++j, ++pairs) {
        const Index e = order(t, j);
        tape.token_[pairs] = t;
        tape.expert_[pairs] = e;
        tape.weight_[pairs] = Scalar(config_.scale) * s(t, e);
        sum += double(s(t, e));
      }
      if (config_.token_entropy > 0) {
        tape.loss_ += config_.token_entropy * entropy(std::span<const Scalar>(s.row(t), std::size_t(experts))) / double(tokens);
      }
    }
    tape.token_.resize(pairs);
    tape.expert_.resize(pairs);
    tape.weight_.resize(pairs);
    plan.build(
        tokens, experts, [&](Index pair) { return tape.token_[pair]; }, tape.expert_.span(), tape.weight_.span());
  }

  /// ds = γ dw for the chosen, and the entropy's gradient, through the softmax. How many were chosen is constant.
  void choose_backward(const Tokens<Scalar>& in, const Plan& plan, const RouterGradient<Plan>& gradient, RowView<Scalar> dz,
                       Tape& tape, const Context& context) const {
    const RowView<const Scalar> s = tape.scores();
    for (Index r = 0; r < plan.rows(); ++r) {
      dz(tape.token_[plan.pair(r)], tape.expert_[plan.pair(r)]) = Scalar(config_.scale) * gradient.plan.weight[r];
    }
    for (Index t = 0; t < in.count() && config_.token_entropy > 0; ++t) {
      entropy_backward(std::span<const Scalar>(s.row(t), std::size_t(s.cols())),
                       gradient.into.tokens.loss_factor * config_.token_entropy / double(in.count()),
                       std::span<Scalar>(dz.row(t), std::size_t(s.cols())));
    }
    softmax_rows_backward(s, dz, context.exec);
  }

 private:
  Config config_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

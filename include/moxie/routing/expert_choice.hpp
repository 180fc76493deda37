// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/rows.hpp>
#include <moxie/routing/capacity.hpp>
#include <moxie/routing/gated_router.hpp>
#include <moxie/routing/selection.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Expert choice: every expert takes its C best tokens of each sequence, so the load is even by construction; a token may get
/// no expert, or all.
///
///     s = softmax(x Wgᵀ (+ noise)) over the experts        (T,E)
///     of group b, expert i takes the C_b tokens with the largest s_ti, ties to the lower token;   w_ti = γ s_ti
///
/// Zhou et al. 2022, section 3.2. Groups are sequences, or with `Grouping::call` one of all tokens. It looks at all tokens of a
/// group, so it is not causal. Pair numbers count groups, then experts, then choices. It computes R = Σ_b E C_b rows: C_b is
/// whole, so these are up to E - 1 more a group than the factor says. Parameter: `gate.weight` (E,D), or (E,G) with `gate_dim`.
/// Cost: 2TDE + O(T E log C).
template <class Scalar_>
class ExpertChoiceRouter : public GatedRouter<ExpertChoiceRouter<Scalar_>, Scalar_> {
  using Base = GatedRouter<ExpertChoiceRouter, Scalar_>;

 public:
  using Scalar = Scalar_;
  using typename Base::Plan;
  using Config = ExpertChoiceRouterConfig;

  /// It has no balance loss: balanced by construction.
  class Tape : public Base::Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : Base::Tape(resource), resource_(resource) {}

    /// s (T,E).
    RowView<const Scalar> scores() const { return scores_.view(tokens_, experts_); }
    /// The tokens that were taken: of each group, of each expert, the best first.
    std::span<const Index> choices() const { return token_.span(); }

   private:
    friend class ExpertChoiceRouter;
    detail::OwnResource resource_;
    Index tokens_ = 0;
    Index experts_ = 0;
    Buffer<Scalar> scores_{0, resource_};
    Buffer<Index> token_{0, resource_};
    Buffer<Index> expert_{0, resource_};
    Buffer<Scalar> weight_{0, resource_};
    Buffer<Index> first_{0, resource_};  // the first pair of each group
  };

  /// Throws what `ExpertChoiceRouterConfig::expect_valid` throws.
  explicit ExpertChoiceRouter(const Config& config)
      : Base("ExpertChoiceRouter", config.model_dim, gate_of(config)), config_(config) {}

  static constexpr RouterReads reads = {.gate_x = true, .capacity_factor = true, .top_k = true};

  const Config& config() const { return config_; }

  /// C of a group of that many tokens. Throws ValueError for a capacity below 1.
  Index capacity(Index tokens) const { return config_.room(tokens); }
  /// R of a call: E·C of each group.
  Index most_rows(const Sequences& sequences) const {
    Index rows = 0;
    config_.capacity.groups(sequences).for_each(
        [&](Index, Index begin, Index end) { rows += config_.experts * config_.room(end - begin); });
    return rows;
  }

  void choose(ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& in, RowView<const Scalar> z, Plan& plan, Tape& tape,
              const Context& context) const {
    const Sequences groups = config_.capacity.groups(in.sequences);
    tape.tokens_ = in.count();
    tape.experts_ = config_.experts;
    tape.first_.resize(groups.count() + 1);
    tape.first_[0] = 0;
    groups.for_each([&](Index b, Index begin, Index end) {
      tape.first_[b + 1] = tape.first_[b] + config_.experts * config_.room(end - begin, in.capacity_factor);
    });
    const RowView<Scalar> s = tape.scores_.matrix(in.count(), config_.experts);
    softmax_rows(z, s, context.exec);
    take_tokens(in, groups, s, tape, context.exec);
    plan.build(
        in.count(), config_.experts, [&](Index pair) { return tape.token_[pair]; }, tape.expert_.span(), tape.weight_.span());
  }

  /// ds_ti = γ dw_ti where expert i took token t, through the softmax. What was taken is constant.
  void choose_backward(const Tokens<Scalar>& /*in*/, const Plan& plan, const RouterGradient<Plan>& gradient, RowView<Scalar> dz,
                       Tape& tape, const Context& context) const {
    for (Index r = 0; r < plan.rows(); ++r) {
      const Index pair = plan.pair(r);
      dz(tape.token_[pair], tape.expert_[pair]) = Scalar(config_.scale) * gradient.plan.weight[r];
    }
    softmax_rows_backward(tape.scores(), dz, context.exec);
  }

  /// Throws ValueError for `in.top_k`, which experts do not have, and a capacity below 1.
  void expect_routable(std::string_view where, ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& in) const {
    detail::expect_value(in.top_k == 0, where, "experts choose their tokens, so there is no top_k to set");
    config_.capacity.groups(in.sequences).for_each([&](Index, Index begin, Index end) {
      config_.room(end - begin, in.capacity_factor);
    });
  }

 private:
  static LinearGate<Scalar> gate_of(const Config& config) {
    config.template expect_valid<Scalar>("ExpertChoiceRouter");
    return {"ExpertChoiceRouter", config.gate_input_dim(), config.experts, config.noise};
  }

  /// The best tokens of every expert in every group, and their weights.
  void take_tokens(const Tokens<Scalar>& in, const Sequences& groups, RowView<const Scalar> s, Tape& tape,
                   const Exec& exec) const {
    const Index experts = config_.experts;
    const Index pairs = tape.first_[groups.count()];
    tape.token_.resize(pairs);
    tape.expert_.resize(pairs);
    tape.weight_.resize(pairs);
    // Some experts at once: their scores of a token share a cache line, or two.
    constexpr Index together = Index{alignment / sizeof(Scalar)};
    exec.parallel_ranges(experts, together, [&](Index first, Index last) {
      thread_local Buffer<Scalar> columns;
      thread_local Buffer<Index> order;
      const RowView<Scalar> score = columns.spread(together, in.count());
      order.resize(in.count());
      constexpr Index ahead = 8;
      for (Index t = 0; t < in.count(); ++t) {
        const Scalar* const later = s.row((std::min)(t + ahead, in.count() - 1));
        __builtin_prefetch(later + first);
        __builtin_prefetch(later + last - 1);
        for (Index e = first; e < last; ++e) {
          score(e - first, t) = s(t, e);
        }
      }
      for (Index e = first; e < last; ++e) {
        groups.for_each([&](Index b, Index begin, Index end) {
          const Index room = config_.room(end - begin, in.capacity_factor);
          const Scalar* of_token = score.row(e - first) + begin;
          Index* const best = order.data();
          select_largest(of_token, end - begin, room, best);
          for (Index c = 0; c < room; ++c) {
            const Index pair = tape.first_[b] + e * room + c;
            tape.token_[pair] = begin + best[c];
            tape.expert_[pair] = e;
            tape.weight_[pair] = Scalar(config_.scale) * of_token[best[c]];
          }
        });
      }
    });
  }

  Config config_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

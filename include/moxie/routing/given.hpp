// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/routing/config.hpp>
#include <moxie/routing/router.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

struct GivenRouterConfig {
  Index experts = 0;
};

/// A plan from elsewhere: the experts of every token are `Tokens::chosen` (T,K), their weights `Tokens::weight` (T,K).
///
///     y_t = Σ_k weight_tk f_chosen_tk(x_t)      without the choices that are -1
///
/// For the routing of another framework, or of one's own. K is that of each call. The gradient of the weights goes to
/// `TokensGradient::weight`: 0 of no choice. No parameters. O(TK).
template <class Scalar_>
class GivenRouter : public FixedRouter<Scalar_> {
 public:
  using Scalar = Scalar_;
  using Base = FixedRouter<Scalar>;
  using typename Base::Plan;
  using Config = GivenRouterConfig;

  class Tape : public Base::Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : expert_(0, resource), weight_(0, resource) {}

   private:
    friend class GivenRouter;
    Buffer<Index> expert_;
    Buffer<Scalar> weight_;
  };

  /// Throws ValueError for no experts, or more than `most_experts`.
  explicit GivenRouter(const Config& config) : config_(config) { detail::expect_experts("GivenRouter", config.experts); }

  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }

  /// Throws ShapeError unless there are a choice and a weight for each token, ValueError for an expert outside [-1, E), one
  /// that a token has twice, a weight that is not finite, and `in.top_k` of another K.
  void route(ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& in, Plan& plan, Tape& tape,
             const Context& /*context*/) const {
    constexpr std::string_view where = "GivenRouter::route";
    const Index k = in.chosen.cols();
    detail::expect_read(where, in, {.chosen = true, .weight = true, .top_k = true});
    detail::expect_shape(where, "chosen", in.chosen, in.count(), k > 0 ? k : 1);
    detail::expect_shape(where, "weight", in.weight, in.count(), k);
    detail::expect_value(in.top_k == 0 || in.top_k == k, where, "top_k is not the number of columns of chosen");
    detail::expect_chosen(where, in, config_.experts);
    tape.expert_.resize(in.count() * k);
    tape.weight_.resize(in.count() * k);
    for (Index t = 0; t < in.count(); ++t) {
      for (Index j = 0; j < k; ++j) {
        detail::expect_value(in.chosen(t, j) < 0 || std::isfinite(in.weight(t, j)), where, "a weight is not finite");
        tape.expert_[t * k + j] = in.chosen(t, j);
        tape.weight_[t * k + j] = in.weight(t, j);
      }
    }
    plan.build(in.count(), config_.experts, k, tape.expert_.span(), tape.weight_.span());
  }

  /// Adds dw of each row to the weight it came from.
  void backward(ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& /*in*/, const Plan& plan,
                const RouterGradient<Plan>& gradient, Tape& /*tape*/, const Context& /*context*/) const {
    const RowView<Scalar>& dweight = gradient.into.tokens.weight;
    const Index k = dweight.cols();
    for (Index r = 0; k > 0 && r < plan.rows(); ++r) {
      dweight(plan.pair(r) / k, plan.pair(r) % k) += gradient.plan.weight[r];
    }
  }

 private:
  Config config_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <moxie/core/exec.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/core/workspace.hpp>
#include <moxie/routing/plan.hpp>
#include <moxie/routing/tokens.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A router: tokens in, plan out.
///
/// * `Scalar`, `Plan` (SparsePlan or DensePlan) and `Tape` (what its backward needs, copyable, with `balance_loss()`);
/// * `layout()`: its parameters, `initialize(p, rng)`: their first values;
/// * `experts()`, `model_dim()` (-1 takes any width);
/// * `route(p, in, plan, tape, workspace, exec)`: fills the plan, or throws before anything else is written;
/// * `backward(p, in, plan, dplan, din, dp, tape, workspace, exec)`: from the plan's gradient (and the balance losses) adds to
///   din.x (T,D), or to din.gate_x if the gate has an input of its own, to din.condition (B,C) and din.weight (T,K) if they are
///   there, and to the parameters' gradients dp. What was selected is constant.
///
/// A router never sees masked tokens: the layer leaves them out, so that `in.mask` is empty and the sequences are shorter.
///
/// Derive from `FixedRouter` to write only `experts` and `route`.
template <class R>
concept Router = std::copyable<R> &&
    requires(const R& router, ParameterView<const typename R::Scalar> p, ParameterView<typename R::Scalar> dp,
             const Tokens<typename R::Scalar>& in, typename R::Plan& plan, const typename R::Plan::Gradient& dplan,
             const TokensGradient<typename R::Scalar>& din, typename R::Tape& tape, const typename R::Tape& done,
             Workspace& workspace, const Exec& exec) {
  { router.layout() } -> std::convertible_to<const Layout&>;
  router.initialize(dp, Rng(0));
  { router.experts() } -> std::convertible_to<Index>;
  { router.model_dim() } -> std::convertible_to<Index>;
  router.route(p, in, plan, tape, workspace, exec);
  router.backward(p, in, plan, dplan, din, dp, done, workspace, exec);
  { done.balance_loss() } -> std::convertible_to<double>;
};

/// The base of a router without parameters and without a gradient: everything that `Router`
/// requires except `experts` and `route`. A tape of one's own derives from its `Tape`.
template <class Scalar_, class Plan_ = SparsePlan<Scalar_>>
class FixedRouter {
 public:
  using Scalar = Scalar_;
  using Plan = Plan_;
  struct Tape {
    double balance_loss() const { return 0; }
  };

  const Layout& layout() const {
    static const Layout none;
    return none;
  }
  void initialize(ParameterView<Scalar> /*p*/, const Rng& /*rng*/) const {}
  Index model_dim() const { return -1; }
  void backward(ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& /*in*/, const Plan& /*plan*/,
                const typename Plan::Gradient& /*dplan*/, const TokensGradient<Scalar>& /*din*/, ParameterView<Scalar> /*dp*/,
                const Tape& /*tape*/, Workspace& /*workspace*/, const Exec& /*exec*/) const {}
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <memory_resource>
#include <moxie/core/context.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/routing/gradients.hpp>
#include <moxie/routing/plan.hpp>
#include <moxie/routing/tokens.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A router: tokens in, plan out.
///
/// * `Scalar`, `Plan` (SparsePlan or DensePlan) and `Tape` (what its backward needs, copyable, with `balance_loss()`);
/// * `layout()`: its parameters, `initialize(p, rng)`: their first values;
/// * `experts()`, `model_dim()` (-1 takes any width);
/// * `route(p, in, plan, tape, context)`: fills the plan, or throws before anything else is written;
/// * `backward(p, in, plan, gradient, tape, context)`: from the plan's gradient (and the balance losses) adds to
/// `gradient.into`:
///   to tokens.x (T,D), or to gate_x if the gate has an input of its own, to the condition (B,C) and the weight (T,K) if they
///   are there, and to the parameters' gradients. What was selected is constant. The tape is the forward's, and may be written.
///
/// A router never sees masked tokens: the layer leaves them out, so that `in.mask` is empty and the sequences are shorter.
/// Where the tape has `logits()`, a layer can give them out, and takes a gradient of them (`Outputs::logits`). Where a tape is
/// made from a `std::pmr::memory_resource*`, its memory comes from that of the layer's tape.
///
/// Derive from `FixedRouter` to write only `experts` and `route`, from `GatedRouter` to write only what is made of the logits.
template <class R>
concept Router = std::copyable<R> &&
    requires(const R& router, ParameterView<const typename R::Scalar> p, ParameterView<typename R::Scalar> dp,
             const Tokens<typename R::Scalar>& in, typename R::Plan& plan, const RouterGradient<typename R::Plan>& gradient,
             typename R::Tape& tape, const typename R::Tape& done, const Context& context) {
  { router.layout() } -> std::convertible_to<const Layout&>;
  router.initialize(dp, Rng(0));
  { router.experts() } -> std::convertible_to<Index>;
  { router.model_dim() } -> std::convertible_to<Index>;
  router.route(p, in, plan, tape, context);
  router.backward(p, in, plan, gradient, tape, context);
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
                const RouterGradient<Plan>& /*gradient*/, Tape& /*tape*/, const Context& /*context*/) const {}
};

namespace detail {

/// A tape, or a part of one, whose memory comes from `resource` if its type can be made so.
template <class T>
T made_with(std::pmr::memory_resource* resource) {
  if constexpr (std::is_constructible_v<T, std::pmr::memory_resource*>) {
    return T(resource);
  } else {
    return T();
  }
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

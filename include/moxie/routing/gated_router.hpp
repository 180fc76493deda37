// SPDX-License-Identifier: MIT
#pragma once

#include <memory_resource>
#include <moxie/core/cost.hpp>
#include <moxie/kernel/rows.hpp>
#include <moxie/routing/gate.hpp>
#include <moxie/routing/router.hpp>
#include <string>
#include <type_traits>

namespace moxie::inline MOXIE_NAMESPACE {

/// The base of a router with a gate: all that `Router` requires, except what is made of the logits.
///
///     class Mine : public GatedRouter<Mine, float> { ... choose, choose_backward ... };
///
/// `Derived` writes two functions:
///
/// * `choose(p, in, z, plan, tape, context)`: fills the plan from the logits z (T,E), with the gate's noise where there is any;
/// * `choose_backward(in, plan, gradient, dz, tape, context)`: adds to dz (T,E), which is zeros, the gradient of the logits:
///   from `gradient.plan`, and of its balance losses times `gradient.into.tokens.loss_factor`. The base adds the gradient of
///   the logits that the caller may have (`OutputsGradient::logits`), and passes the sum through the gate.
///
/// A tape of one's own derives from `Tape` and hides `balance_loss()` if there are losses. `reads` says what of `Tokens` it
/// reads beside x: what is set and not read is refused, by name. Tensors of one's own follow the gate's in `layout_`.
template <class Derived, class Scalar_, class Plan_ = SparsePlan<Scalar_>, Gate Gate_ = LinearGate<Scalar_>>
class GatedRouter {
  static_assert(std::is_same_v<typename Gate_::Scalar, Scalar_>, "GatedRouter: gate and router must have the same scalar");

 public:
  using Scalar = Scalar_;
  using Plan = Plan_;

  class Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : gate_(resource) {}

    /// z (T,E), without noise.
    RowView<const Scalar> logits() const { return gate_.logits(); }
    double balance_loss() const { return 0; }

   protected:
    const typename Gate_::Tape& gate() const { return gate_; }

   private:
    friend class GatedRouter;
    typename Gate_::Tape gate_;
  };

  static constexpr RouterReads reads = {.gate_x = true};

  const Layout& layout() const { return layout_; }
  Index experts() const { return gate_.experts(); }
  Index model_dim() const { return model_dim_; }
  const Gate_& gate() const { return gate_; }
  void initialize(ParameterView<Scalar> p, const Rng& rng) const { gate_.initialize(p, rng); }

  /// Throws ValueError naming the first token whose logits are not finite, and for what is set in `in` and not read; and what
  /// `choose` throws.
  template <std::derived_from<Tape> T>
  void route(ParameterView<const Scalar> p, const Tokens<Scalar>& in, Plan& plan, T& tape, const Context& context) const {
    detail::expect_read(route_name_, in, Derived::reads);
    derived().expect_routable(route_name_, p, in);
    gate_.forward(route_name_, p, in, tape.Tape::gate_, context.exec);
    derived().choose(p, in, tape.gate_.noisy_logits(), plan, tape, context);
  }

  /// `choose_backward`, then the gate's backward.
  template <std::derived_from<Tape> T>
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Plan& plan, const RouterGradient<Plan>& gradient,
                T& tape, const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> dz = context.workspace.matrix<Scalar>(in.count(), experts());
    detail::fill_rows(dz, Scalar(0));
    derived().choose_backward(in, plan, gradient, dz, tape, context);
    if (gradient.logits.size() != 0) {
      detail::add_rows(gradient.logits, dz);
    }
    gate_.backward(p, in, dz, gradient.into, tape.gate_, context);
  }

  /// More that a call has to keep to. Throws, before anything is computed.
  void expect_routable(std::string_view /*where*/, ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& /*in*/) const {}

 protected:
  /// A router of this name, for errors, whose tokens are `model_dim` wide.
  GatedRouter(const std::string& name, Index model_dim, Gate_ gate)
      : layout_(gate.layout()), model_dim_(model_dim), gate_(std::move(gate)), route_name_(name + "::route") {
    detail::expect_at_least(name, "model_dim", model_dim, 1);
  }
  /// The same with a linear gate that reads the tokens.
  GatedRouter(const std::string& name, Index model_dim, Index experts)
      : GatedRouter(name, model_dim, Gate_(name, model_dim, experts)) {}

  Layout layout_;

 private:
  const Derived& derived() const { return static_cast<const Derived&>(*this); }

  Index model_dim_;
  Gate_ gate_;
  std::string route_name_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

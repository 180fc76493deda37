// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <memory_resource>
#include <moxie/exchange/combine.hpp>
#include <moxie/exchange/dispatch.hpp>
#include <moxie/expert/bank.hpp>
#include <moxie/layer/cost.hpp>
#include <moxie/layer/outputs.hpp>
#include <moxie/routing/router.hpp>
#include <moxie/routing/statistics.hpp>
#include <optional>
#include <string>

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

/// What a bank reads in inference: what its `freeze` made, or a copy of its parameters.
template <class B>
class Frozen {
 public:
  using Scalar = typename B::Scalar;
  static constexpr bool packs = requires(const B& bank, ParameterView<const Scalar> p, const Exec& exec) {
    bank.freeze(p, exec);
  };

  Frozen(const B& bank, ParameterView<const Scalar> p, const Exec& exec) : weights_(make(bank, p, exec)) {}

  template <class... Arguments>
  void forward(const B& bank, Arguments&&... arguments) const {
    if constexpr (packs) {
      bank.forward(weights_, std::forward<Arguments>(arguments)...);
    } else {
      bank.forward(weights_.view(), std::forward<Arguments>(arguments)...);
    }
  }

 private:
  static auto make(const B& bank, ParameterView<const Scalar> p, const Exec& exec) {
    if constexpr (packs) {
      return bank.freeze(p, exec);
    } else {
      Parameters<Scalar> copy{Layout(bank.layout())};
      copy_tensors(p, copy.view());
      return copy;
    }
  }

  decltype(make(std::declval<const B&>(), std::declval<ParameterView<const Scalar>>(), std::declval<const Exec&>())) weights_;
};

/// `bank.forward` of parameters, or of what was frozen of them.
template <class B, class Scalar = typename B::Scalar, class... Arguments>
void forward_bank(const B& bank, ParameterView<const std::type_identity_t<Scalar>> p, Arguments&&... arguments) {
  bank.forward(p, std::forward<Arguments>(arguments)...);
}
template <class B, class... Arguments>
void forward_bank(const B& bank, const Frozen<B>& frozen, Arguments&&... arguments) {
  frozen.forward(bank, std::forward<Arguments>(arguments)...);
}

}  // namespace detail

/// The mixture-of-experts layer: the one algorithm under every named layer.
///
///     plan = route(x)                     who computes what, and how much it counts
///     h    = experts(dispatch(plan, x))   E experts, each on its own rows
///     y    = combine(plan, h) [+ shared(x)]
///
/// `shared` is an optional second bank of one expert that every token passes, not gated (DeepSeekMoE eq. 9, DiT-MoE). Whatever
/// the router and the bank are, the layer owns one block of parameters (router, experts, shared experts, in this order). The
/// overloads that take a block use that one instead, so that a whole model can live in one; the layer's own then stays as it
/// was made, zeros that take no memory.
///
/// `forward` and `backward` are const: threads may share a layer, each with a tape of its own. The same bits for any number of
/// threads. A step allocates nothing that an earlier one of as many tokens, unmasked tokens and assigned rows has (the kernels
/// keep a small packing buffer a thread).
template <class Router_, class Experts_, class Scalar_ = typename Router_::Scalar>
class Moe {
  static_assert(Router<Router_>, "Moe: the first argument is not a Router; the requirement that failed is named below");
  static_assert(Bank<Experts_>,
                "Moe: the second argument is not a Bank of experts; the requirement that failed is named below");
  static_assert(std::is_same_v<typename Router_::Scalar, Scalar_> && std::is_same_v<typename Experts_::Scalar, Scalar_>,
                "Moe: router, experts and layer must have the same scalar");

 public:
  using Scalar = Scalar_;
  using Plan = typename Router_::Plan;

  /// What `backward` needs of a `forward`, and the routing to look at. Reused from step to step. Its memory, and that of a
  /// router's tape that takes one, comes from `resource`, by default as a `Buffer`'s; the resource must outlive the tape.
  class Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource, Keep keep = Keep::activations) : resource_(resource), keep_(keep) {}

    /// Its tokens are those that are not masked, numbered without gaps: `row(t)` is where token t of the plan stands in x.
    const Plan& plan() const { return plan_; }
    Index row(Index token) const { return masked_ ? unmasked_[token] : token; }
    /// The router's own record: scores and choices of `TopKRouter`, for example.
    const typename Router_::Tape& router() const { return router_; }
    typename Router_::Tape& router() { return router_; }
    /// The balance losses of the last forward, weighted. `backward` adds their gradient times `TokensGradient::loss_factor`.
    double balance_loss() const { return router_.balance_loss(); }
    RoutingStatistics statistics() const { return routing_statistics(plan_); }

   private:
    friend class Moe;

    detail::OwnResource resource_;
    Keep keep_ = Keep::activations;
    // The layer that a forward was of; none before the first one, after one that threw, and where the tape was moved away.
    std::shared_ptr<const Layout> layer_;
    Index tokens_ = 0;
    Index condition_dim_ = 0;
    Buffer<Index> sequence_starts_{0, resource_};
    Plan plan_{resource_};
    typename Router_::Tape router_ = detail::made_with<typename Router_::Tape>(resource_);
    std::array<Index, 2> shared_starts_{};
    // What Keep::activations keeps: the slots and what the experts made of them (dense plans), and what the banks keep.
    Buffer<Scalar> slots_{0, resource_};
    Buffer<Scalar> h_{0, resource_};
    typename Experts_::Tape experts_{resource_};
    typename Experts_::Tape shared_{resource_};
    // With a mask: the tokens that take part.
    bool masked_ = false;
    Buffer<Index> unmasked_{0, resource_};         // their rows in x
    Buffer<Index> unmasked_starts_{0, resource_};  // of their sequences
    detail::TokenCopies unmasked_fields_{resource_};
    // Scratch: anyone may throw it away.
    typename Plan::Gradient dplan_{resource_};
    Workspace workspace_{resource_};  // stays empty where the caller has one
  };

  /// The layer for inference: the router's parameters, and weights in the form that the kernels read. It refers to no block, so
  /// that parameters may change or go.
  class Frozen {
    friend class Moe;

    std::shared_ptr<const Layout> layer_;
    Parameters<Scalar> router_;
    std::optional<detail::Frozen<Experts_>> experts_;
    std::optional<detail::Frozen<Experts_>> shared_;
  };

  /// Throws ValueError if the parts differ in experts or width.
  Moe(Router_ router, Experts_ experts, std::optional<Experts_> shared = std::nullopt, std::string name = "Moe")
      : name_(std::move(name)), router_(std::move(router)), experts_(std::move(experts)), shared_(std::move(shared)) {
    const auto expect_equal = [&](const char* what, Index a, Index b) {
      if (a != b) {
        throw ValueError(name_ + ": the router has " + std::to_string(a) + " " + what + ", the bank " + std::to_string(b));
      }
    };
    expect_equal("experts", router_.experts(), experts_.experts());
    if (router_.model_dim() >= 0) {
      expect_equal("features", router_.model_dim(), experts_.model_dim());
    }
    if (shared_) {
      detail::expect_value(shared_->experts() == 1 && shared_->model_dim() == experts_.model_dim(), name_,
                           "shared experts are a bank of one expert of the same width");
    }
    Layout layout;
    router_first_ = layout.add_part("", router_.layout());
    experts_first_ = layout.add_part("", experts_.layout());
    if (shared_) {
      shared_first_ = layout.add_part("", shared_->layout());
    }
    layout_ = std::make_shared<const Layout>(std::move(layout));
    parameters_ = Parameters<Scalar>(layout_);
  }

  const Router_& router() const { return router_; }
  const Experts_& experts() const { return experts_; }
  Index model_dim() const { return experts_.model_dim(); }

  /// What T tokens cost that are not masked, with the rows that the router plans: T·K for top-k, E·C of each sequence for
  /// expert choice, N of each for Soft MoE. Where the tokens decide (top-p, a capacity) it is the most that it can be.
  ///
  /// Throws ShapeError if the tokens do not divide so, ValueError for a router that does not tell its rows.
  Cost multiply_adds(Index tokens, const Sequences& division = {}) const {
    return detail::mixture_cost(router_, experts_, shared_, division.over(tokens));
  }
  /// What the forward of a tape cost, by the rows of its plan; 0 where there was none.
  Cost multiply_adds(const Tape& tape) const {
    return detail::mixture_cost(router_, experts_, shared_, tape.plan_, (std::max)(tape.sequence_starts_.size() - 1, Index{0}));
  }

  /// Without tensors where the layer was moved away.
  const Layout& layout() const { return layout_ != nullptr ? *layout_ : *detail::empty_layout(); }
  /// The layer's own block.
  Parameters<Scalar>& parameters() { return parameters_; }
  const Parameters<Scalar>& parameters() const { return parameters_; }

  /// First values for all parameters; router, experts and shared experts draw from streams of their own.
  void initialize(const Rng& rng) { initialize(parameters_, rng); }
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    router_.initialize(router_part(p), rng.split(0));
    experts_.initialize(experts_part(p), rng.split(1));
    if (shared_) {
      shared_->initialize(shared_part(p), rng.split(2));
    }
  }

  /// A tape. The first step of a shape takes the memory it needs, and later ones reuse it; `max_tokens` is a hint.
  ///
  /// With R rows (T·K for top-k, B·E·S for Soft MoE) it holds what the bank keeps of R rows, of T rows more for a shared
  /// expert, 2RD numbers more for the slots and outputs of a dense plan; with Keep::inputs and Keep::nothing none of these.
  /// What the router keeps comes on top, and scratch, which stays on the tape for the next step: with Keep::inputs a backward's
  /// scratch has room for all of the above. A backward's scratch of top-k has about T·K(2D + 3H) numbers; a model of many
  /// layers passes one workspace to all.
  Tape make_tape(Index max_tokens = 0, Keep keep = Keep::activations, std::pmr::memory_resource* resource = nullptr) const {
    Tape tape(resource, keep);
    if (keep == Keep::activations && !gathers) {
      tape.h_.matrix(max_tokens, model_dim());
    }
    return tape;
  }

  /// y (T,D) from x (T,D), overwritten; and the router's logits, where `out` has a place for them and the router has logits.
  /// T = 0 is legal. Rows of y and of the logits that are masked become 0.
  ///
  /// Throws ShapeError for other shapes, ValueError if what is written overlaps what is read, or a logit is not finite, before
  /// y is written.
  void forward(const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape, const Exec& exec = {}) const {
    forward(parameters_.view(), in, out, tape, Context{tape.workspace_, exec});
  }

  /// From a forward's input and tape: overwrites dx (T,D), and the gradient of the condition where `din` has one; adds to the
  /// gradients of all parameters. The gradient is that of ⟨y, dy⟩ + ⟨logits, dlogits⟩ + din.loss_factor · balance_loss.
  /// Rows of dx that are masked become 0.
  ///
  /// Throws ShapeError for other shapes or a block of another layout, ValueError if the tape holds no forward of this layer
  /// (or a copy of it) and input, or what is written overlaps what is read, before anything is written. If memory runs out in
  /// the middle (std::bad_alloc), gradients are partly added and dx partly written: set them to zero, and call it again. That
  /// cannot happen where an earlier step was as large.
  void backward(const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout, const TokensGradient<Scalar>& din,
                ParameterView<Scalar> grads, Tape& tape, const Exec& exec = {}) const {
    backward(parameters_.view(), in, dout, {din, grads}, tape, Context{tape.workspace_, exec});
  }

  /// The same over a block of parameters that lives elsewhere (one block for a whole model).
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Exec& exec = {}) const {
    forward(p, in, out, tape, Context{tape.workspace_, exec});
  }
  /// The same with scratch that lives elsewhere: one workspace for all layers of a model, in place of one on each tape. It may
  /// have open frames, and what they hold may be arguments. Calls that run at the same time need one each.
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Context& context) const {
    expect_layout(forward_name_, p);
    expect_value(p.complete(), forward_name_, "a parameter is absent");
    detail::expect_no_overlap(overlaps(p, out.y), forward_name_, "y", "the parameters");
    detail::expect_no_overlap(overlaps(p, out.logits), forward_name_, "logits", "the parameters");
    run_checked(p, in, out, tape, context);
    tape.layer_ = layout_;
    tape.tokens_ = in.count();
    tape.condition_dim_ = in.condition.cols();
  }

  /// Packs the layer's weights, or those of a block, for any number of forwards without a backward.
  Frozen freeze(const Exec& exec = {}) const { return freeze(parameters_.view(), exec); }
  Frozen freeze(ParameterView<const Scalar> p, const Exec& exec = {}) const {
    expect_layout(freeze_name_, p);
    Frozen frozen;
    frozen.layer_ = layout_;
    frozen.router_ = Parameters<Scalar>{Layout(router_.layout())};
    copy_tensors(router_part(p), frozen.router_.view());
    frozen.experts_.emplace(experts_, experts_part(p), exec);
    if (shared_) {
      frozen.shared_.emplace(*shared_, shared_part(p), exec);
    }
    return frozen;
  }
  /// The same y as with the parameters that were frozen, faster where experts have few rows; bit for bit. The tape holds the
  /// plan, and nothing for a backward.
  void forward(const Frozen& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Exec& exec = {}) const {
    forward(frozen, in, out, tape, Context{tape.workspace_, exec});
  }
  void forward(const Frozen& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Context& context) const {
    detail::expect_value(layout_ != nullptr && frozen.layer_ == layout_, forward_name_,
                         "the weights were not frozen by this layer");
    run_checked(frozen, in, out, tape, context);
  }

  /// `backward` over parameters that live elsewhere: `layer.backward(p, x, dy, {dx, grads}, tape, {workspace, exec})`.
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, Tape& tape, const Exec& exec = {}) const {
    backward(p, in, dout, into, tape, Context{tape.workspace_, exec});
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, Tape& tape, const Context& context) const {
    expect_backward(p, in, dout, into, tape);
    const TokensGradient<Scalar>& din = into.tokens;
    for (const RowView<Scalar>& d : {din.condition, din.gate_x, din.weight}) {
      if (d.size() != 0) {
        detail::fill_rows(d, Scalar(0));
      }
    }
    if (!tape.masked_) {
      run_backward(p, in, dout, into, tape, context);
      return;
    }
    // With a mask: the same of the tokens that take part, between gathering and scattering rows.
    Workspace& workspace = context.workspace;
    const Tokens<Scalar> unmasked = unmasked_tokens(in, tape);
    const Index count = unmasked.count();
    const Workspace::Frame frame(workspace);
    const auto gathered = [&](RowView<const Scalar> whole) {
      const RowView<Scalar> part = workspace.matrix<Scalar>(count, whole.cols());
      for (Index i = 0; i < count; ++i) {
        std::copy_n(whole.row(tape.unmasked_[i]), whole.cols(), part.row(i));
      }
      return RowView<const Scalar>(part);
    };
    const auto zeros = [&](Index cols) {
      const RowView<Scalar> part = workspace.matrix<Scalar>(count, cols);
      detail::fill_rows(part, Scalar(0));
      return part;
    };
    OutputsGradient<Scalar> dout_part(gathered(dout.y), dout.logits);
    if (!logits_of_sequences && dout.logits.size() != 0) {
      dout_part.logits = gathered(dout.logits);
    }
    Gradients<Scalar> part = into;
    part.tokens.x = workspace.matrix<Scalar>(count, model_dim());
    part.tokens.gate_x = zeros(din.gate_x.cols());
    part.tokens.weight = zeros(din.weight.cols());
    run_backward(p, unmasked, dout_part, part, tape, context);
    scatter(part.tokens.x, din.x, tape);
    scatter(part.tokens.gate_x, din.gate_x, tape);
    scatter(part.tokens.weight, din.weight, tape);
  }

 private:
  /// Whether dispatch gathers tokens by an index, as sparse plans do; else it computes slots.
  static constexpr bool gathers = requires(const Plan& plan) { plan.token(); };
  /// Whether the router's tape has logits, and whether these are of sequences (B,E), not of tokens (T,E).
  static constexpr bool has_logits = requires(const typename Router_::Tape& tape) { tape.logits(); };
  static constexpr bool logits_of_sequences = requires { Router_::logits_of_sequences; };

  /// (rows, cols) of the logits of a call; no columns if there are none.
  std::pair<Index, Index> logits_shape(const Tokens<Scalar>& in) const {
    return {logits_of_sequences ? in.sequences.count() : in.count(), has_logits ? router_.experts() : 0};
  }

  /// Checks all but the weights, and runs; after a failure and afterwards the tape has no forward.
  template <class Weights>
  void run_checked(const Weights& weights, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
                   const Context& context) const {
    const auto [rows, cols] = logits_shape(in);
    detail::expect_forward(forward_name_, in, out, model_dim(), rows, cols);
    tape.layer_.reset();
    try {
      in.sequences.copy_starts(tape.sequence_starts_);
      run_unmasked(weights, in, out, tape, context);
    } catch (...) {  // a tape without a forward, not one with parts of two
      tape.masked_ = false;
      tape.plan_ = Plan(tape.resource_);
      tape.router_ = detail::made_with<typename Router_::Tape>(tape.resource_);
      throw;
    }
  }

  void expect_backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                       const Gradients<Scalar>& into, const Tape& tape) const {
    const std::string& where = backward_name_;
    detail::expect_backward(where, p, in, dout, into, model_dim());
    detail::expect_value(layout_ != nullptr && tape.layer_ == layout_, where, "the tape holds no forward of this layer");
    detail::expect_value(tape.keep_ != Keep::nothing, where, "the tape was made to keep nothing for a backward");
    detail::expect_value(is_forward_of(tape, in), where, "the tape holds no forward of these tokens, sequences and mask");
    if (dout.logits.cols() != 0) {
      const auto [rows, cols] = logits_shape(in);
      detail::expect_value(has_logits, where, "there is a gradient of the logits, and the router of this layer has none");
      detail::expect_shape(where, "dlogits", dout.logits, rows, cols);
    }
    expect_layout(where, p);
    expect_layout(where, into.parameters);
    expect_value(p.complete(), where, "a parameter is absent");
  }

  /// Leaves masked tokens out and runs the rest.
  template <class Weights>
  void run_unmasked(const Weights& weights, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
                    const Context& context) const {
    tape.masked_ = !in.mask.empty();
    if (tape.masked_) {
      leave_out_masked(in, tape);
      const Tokens<Scalar> unmasked = unmasked_tokens(in, tape);
      const Workspace::Frame frame(context.workspace);
      const RowView<Scalar> part = context.workspace.matrix<Scalar>(unmasked.count(), model_dim());
      run(weights, unmasked, part, tape, context);
      scatter(part, out.y, tape);
    } else {
      run(weights, in, out.y, tape, context);
    }
    if constexpr (has_logits) {
      if (out.logits.size() == 0) {
        return;
      }
      const RowView<const Scalar> z = tape.router_.logits();
      if (tape.masked_ && !logits_of_sequences) {
        scatter(z, out.logits, tape);
      } else {
        detail::copy_rows(z, out.logits);
      }
    }
  }

  /// The three steps, over tokens that are not masked; the arguments have been checked.
  template <class Weights>
  void run(const Weights& weights, const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape, const Context& context) const {
    router_.route(router_part(weights), in, tape.plan_, tape.router_, context);
    if (tape.plan_.tokens() != in.count() || tape.plan_.experts() != experts_.experts()) {
      throw ValueError(forward_name_ + ": the router planned " + std::to_string(tape.plan_.tokens()) + " tokens and " +
                       std::to_string(tape.plan_.experts()) + " experts, expected " + std::to_string(in.count()) + " and " +
                       std::to_string(experts_.experts()));
    }
    tape.shared_starts_ = {0, in.count()};
    const Workspace::Frame frame(context.workspace);
    const auto scratch = [&](Index rows) { return context.workspace.matrix<Scalar>(rows, model_dim()); };
    const Index rows = tape.plan_.rows();
    if (tape.keep_ == Keep::activations && !std::is_same_v<Weights, Frozen>) {
      run_experts(weights, in, y, tape,
                  {tape.slots_.matrix(slot_rows(tape), model_dim()),
                   gathers ? scratch(rows) : tape.h_.matrix(rows, model_dim()), &tape.experts_, &tape.shared_},
                  context);
    } else {
      run_experts(weights, in, y, tape, {scratch(slot_rows(tape)), scratch(rows), nullptr, nullptr}, context);
    }
  }

  /// Where shared experts wrote before, to be added to; else to be overwritten.
  kernel::Destination<Scalar> after_shared(RowView<Scalar> m) const {
    return shared_ ? kernel::add_to<Scalar>(m) : kernel::replace<Scalar>(m);
  }

  /// What the experts read and write between dispatch and combine.
  struct Activations {
    RowView<Scalar> slot_rows;             // of a dense plan
    RowView<Scalar> h;                 // the experts' outputs; only a dense plan's backward reads them
    typename Experts_::Tape* experts;  // what the banks keep, or null
    typename Experts_::Tape* shared;
  };
  static Index slot_rows(const Tape& tape) { return gathers ? 0 : tape.plan_.rows(); }

  /// y (T,D) = C f(A x) + shared(x).
  template <class Weights>
  void run_experts(const Weights& weights, const Tokens<Scalar>& in, RowView<Scalar> y, const Tape& tape, const Activations& to,
                   const Context& context) const {
    const GroupedRows<Scalar> rows = dispatch(tape.plan_, in.x, to.slot_rows, context.exec);
    detail::forward_bank(experts_, experts_part(weights), rows, to.h, to.experts, context);
    if (shared_) {
      detail::forward_bank(*shared_, shared_part(weights), all_rows(in, tape), y, to.shared, context);
    }
    combine(tape.plan_, to.h, after_shared(y), context.exec);
  }

  /// Computes again what a tape with Keep::inputs did not keep.
  void run_again(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Tape& tape, const Activations& to,
                 const Context& context) const {
    const GroupedRows<Scalar> rows = dispatch(tape.plan_, in.x, to.slot_rows, context.exec);
    experts_.forward(experts_part(p), rows, to.h, to.experts, context);
    if (shared_) {
      shared_->forward(shared_part(p), all_rows(in, tape), RowView<Scalar>(), to.shared, context);
    }
  }

  void run_backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                    const Gradients<Scalar>& into, Tape& tape, const Context& context) const {
    const Index rows = tape.plan_.rows();
    if (tape.keep_ == Keep::activations) {
      run_backward(p, in, dout, into, tape,
                   {tape.slots_.view(slot_rows(tape), model_dim()), tape.h_.view(gathers ? 0 : rows, model_dim()),
                    &tape.experts_, &tape.shared_},
                   context);
      return;
    }
    // On the second stack: the banks open and close frames on the first one.
    Workspace& tapes = context.workspace.tapes();
    const Workspace::Frame frame(tapes);
    typename Experts_::Tape experts(&tapes);
    typename Experts_::Tape shared(&tapes);
    const Activations again{tapes.matrix<Scalar>(slot_rows(tape), model_dim()),
                            tapes.matrix<Scalar>(gathers ? 0 : rows, model_dim()), &experts, &shared};
    run_again(p, in, tape, again, context);
    run_backward(p, in, dout, into, tape, again, context);
  }
  void run_backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                    const Gradients<Scalar>& into, Tape& tape, const Activations& kept, const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const GroupedRows<Scalar> rows = rows_of(tape, in, kept.slot_rows);
    const RowView<Scalar> drows = context.workspace.matrix<Scalar>(rows.count(), model_dim());
    const RowView<Scalar>& dx = into.tokens.x;
    experts_.backward(experts_part(p), rows, output_gradient(tape, dout.y, kept.h, context),
                      {drows, experts_part(into.parameters)}, *kept.experts, context);
    if (shared_) {
      shared_->backward(shared_part(p), all_rows(in, tape), dout.y, {dx, shared_part(into.parameters)}, *kept.shared, context);
    }
    dispatch_backward(tape.plan_, in.x, drows, after_shared(dx), tape.dplan_, context.exec);
    router_.backward(router_part(p), in, tape.plan_, {tape.dplan_, dout.logits, {into.tokens, router_part(into.parameters)}},
                     tape.router_, context);
  }

  /// Copies what is known of the tokens that are not masked into the tape. The router, the experts and the losses then work on
  /// shorter sequences, and nothing of a masked token is ever read.
  void leave_out_masked(const Tokens<Scalar>& in, Tape& tape) const {
    const auto kept = Index(in.mask.size()) - Index(std::count(in.mask.begin(), in.mask.end(), std::uint8_t{0}));
    tape.unmasked_.resize(kept);
    tape.unmasked_starts_.resize(in.sequences.count() + 1);
    tape.unmasked_starts_[0] = 0;
    Index next = 0;
    in.sequences.for_each([&](Index b, Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (in.mask[std::size_t(t)] != 0) {
          tape.unmasked_[next++] = t;
        }
      }
      tape.unmasked_starts_[b + 1] = next;
    });
    tape.unmasked_fields_.copy(in, tape.unmasked_.span());
  }
  Tokens<Scalar> unmasked_tokens(const Tokens<Scalar>& in, const Tape& tape) const {
    const Index kept = tape.unmasked_.size();
    Tokens<Scalar> out = in;
    tape.unmasked_fields_.view(out, kept);
    out.sequences = Sequences(tape.unmasked_starts_.span()).over(kept);
    out.mask = {};
    out.rows = tape.unmasked_.span();
    return out;
  }
  /// The rows of `part` to their places in `whole`, zeros elsewhere.
  static void scatter(RowView<const Scalar> part, RowView<Scalar> whole, const Tape& tape) {
    detail::fill_rows(whole, Scalar(0));
    for (Index i = 0; i < part.rows(); ++i) {
      std::copy_n(part.row(i), part.cols(), whole.row(tape.unmasked_[i]));
    }
  }

  static bool is_forward_of(const Tape& tape, const Tokens<Scalar>& in) {
    if (tape.tokens_ != in.count() || tape.condition_dim_ != in.condition.cols() || tape.masked_ == in.mask.empty() ||
        Sequences(tape.sequence_starts_.span()).over(tape.tokens_) != in.sequences) {
      return false;
    }
    Index next = 0;
    for (Index t = 0; t < Index(in.mask.size()); ++t) {
      if (in.mask[std::size_t(t)] != 0 && (next == tape.unmasked_.size() || tape.unmasked_[next++] != t)) {
        return false;
      }
    }
    return next == tape.unmasked_.size() || !tape.masked_;
  }

  template <class T>
  void expect_layout(const std::string& where, ParameterView<T> p) const {
    if (p.empty() || layout_ == nullptr || !detail::same_layout(p.layout(), *layout_)) {
      throw ShapeError(where + ": the parameters or gradients have another layout than the layer");
    }
  }
  template <class T>
  ParameterView<T> router_part(ParameterView<T> p) const {
    return p.part(router_first_, router_.layout());
  }
  ParameterView<const Scalar> router_part(const Frozen& frozen) const { return frozen.router_; }
  static const detail::Frozen<Experts_>& experts_part(const Frozen& frozen) { return *frozen.experts_; }
  static const detail::Frozen<Experts_>& shared_part(const Frozen& frozen) { return *frozen.shared_; }
  template <class T>
  ParameterView<T> experts_part(ParameterView<T> p) const {
    return p.part(experts_first_, experts_.layout());
  }
  template <class T>
  ParameterView<T> shared_part(ParameterView<T> p) const {
    return p.part(shared_first_, shared_->layout());
  }

  /// The gradient of h. Of a sparse plan the bank makes it row by row from dy and answers with the gradient of the weights.
  static OutputGradient<Scalar> output_gradient(Tape& tape, RowView<const Scalar> dy, RowView<const Scalar> h,
                                                const Context& context) {
    if constexpr (gathers) {
      tape.dplan_.weight.resize(tape.plan_.rows());
      return {dy, tape.plan_.token().data(), tape.plan_.weights().data(), tape.dplan_.weight.data()};
    } else {
      const RowView<Scalar> dh = context.workspace.spread<Scalar>(h.rows(), h.cols());
      combine_backward(tape.plan_, h, dy, dh, tape.dplan_, context.exec);
      return RowView<const Scalar>(dh);
    }
  }

  static GroupedRows<Scalar> rows_of(const Tape& tape, const Tokens<Scalar>& in, RowView<const Scalar> slot_rows) {
    if constexpr (gathers) {
      return {tape.plan_.expert_starts(), in.x, tape.plan_.token().data()};
    } else {
      return {tape.plan_.expert_starts(), slot_rows, nullptr};
    }
  }
  /// All tokens as the rows of one expert.
  static GroupedRows<Scalar> all_rows(const Tokens<Scalar>& in, const Tape& tape) {
    return {tape.shared_starts_, in.x, nullptr};
  }

  std::string name_;
  // Made once: a step allocates nothing.
  std::string forward_name_ = name_ + "::forward";
  std::string backward_name_ = name_ + "::backward";
  std::string freeze_name_ = name_ + "::freeze";
  Router_ router_;
  Experts_ experts_;
  std::optional<Experts_> shared_;
  // The positions of the parts' first tensors.
  Index router_first_ = 0;
  Index experts_first_ = 0;
  Index shared_first_ = 0;
  std::shared_ptr<const Layout> layout_;  // what tapes know the layer by; copies of the layer share it
  Parameters<Scalar> parameters_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

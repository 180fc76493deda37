// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <memory_resource>
#include <moxie/core/context.hpp>
#include <moxie/core/cost.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/expert/config.hpp>
#include <moxie/layer/outputs.hpp>
#include <moxie/routing/statistics.hpp>
#include <moxie/routing/tokens.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A layer: tokens (T,D) in, tokens (T,D) out. `Moe` with all its named layers, `DenseFeedForward`, `AnyLayer`, and a block of
/// one's own around any of them (a norm before, a residual around).
///
/// * `Scalar`, `model_dim()` (D);
/// * `layout()`, `initialize(p, rng)`: its parameters and their first values; `parameters()`: a block of its own;
/// * `Tape`, `make_tape(max_tokens, keep, resource)`: what a backward needs of its forward; with `balance_loss()` and
///   `statistics()`;
/// * `forward(p, in, out, tape, context)`: overwrites out.y (T,D), and out.logits if they are wanted and there are any; or
///   throws before y is written;
/// * `backward(p, in, dout, into, tape, context)`: from what its forward was given and the gradient of what it wrote,
///   overwrites into.tokens.x (T,D) and what else is there of `into.tokens`, and adds to the parameters' gradients: of
///   ⟨y, dy⟩ + ⟨logits, dlogits⟩ + loss_factor · balance_loss. The tape may be written;
/// * `multiply_adds(tokens, sequences)`, `multiply_adds(tape)`: what a call costs, and what the forward of a tape cost.
///
/// Rows of masked tokens are 0 in y and din.x, T = 0 is legal, and both functions are const: threads may share a layer, each
/// with a tape and a workspace of its own. `check_layer_laws` and `check_layer_gradients` try it.
///
/// Where inference can be faster with weights in another form, `freeze(p, exec)` returns them, and
/// `forward(frozen, in, out, tape, context)` reads them.
template <class L>
concept Layer = std::copyable<L> &&
    requires(const L& layer, L& mutable_layer, ParameterView<const typename L::Scalar> p,
             ParameterView<typename L::Scalar> grads, const Tokens<typename L::Scalar>& in,
             const Outputs<typename L::Scalar>& out, const OutputsGradient<typename L::Scalar>& dout,
             const Gradients<typename L::Scalar>& into, typename L::Tape& tape, const typename L::Tape& done,
             std::pmr::memory_resource* resource, const Context& context) {
  { layer.model_dim() } -> std::convertible_to<Index>;
  { layer.layout() } -> std::convertible_to<const Layout&>;
  layer.initialize(grads, Rng(0));
  { mutable_layer.parameters() } -> std::same_as<Parameters<typename L::Scalar>&>;
  { layer.parameters() } -> std::same_as<const Parameters<typename L::Scalar>&>;
  { layer.make_tape(Index{0}, Keep::activations, resource) } -> std::same_as<typename L::Tape>;
  layer.forward(p, in, out, tape, context);
  layer.backward(p, in, dout, into, tape, context);
  { done.balance_loss() } -> std::convertible_to<double>;
  { done.statistics() } -> std::same_as<RoutingStatistics>;
  { layer.multiply_adds(Index{0}, Sequences()) } -> std::same_as<Cost>;
  { layer.multiply_adds(done) } -> std::same_as<Cost>;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

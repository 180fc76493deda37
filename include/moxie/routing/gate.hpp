// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <memory_resource>
#include <moxie/core/context.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/kernel/gemm.hpp>
#include <moxie/routing/config.hpp>
#include <moxie/routing/formula.hpp>
#include <moxie/routing/gradients.hpp>
#include <moxie/routing/score.hpp>
#include <moxie/routing/tokens.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A gate: tokens in, logits (T,E) out. What a router makes of the logits is the router's (`GatedRouter`).
///
/// * `Scalar`; `layout()`, `initialize(p, rng)`: its parameters, the first ones of its router; `experts()`, `dim()` (the width
///   of its input);
/// * `Tape`: copyable, made from a `std::pmr::memory_resource*`, with `logits()` and `noisy_logits()`, what selects;
/// * `forward(where, p, in, tape, exec)`: fills the tape. Throws, with the name `where`, for logits that are not finite;
/// * `backward(p, in, dz, into, tape, context)`: from dz (T,E), the sum of the gradients of both, adds to `into`.
template <class G>
concept Gate = std::copyable<G> && requires(const G& gate, std::string_view where, ParameterView<const typename G::Scalar> p,
                                            ParameterView<typename G::Scalar> dp, const Tokens<typename G::Scalar>& in,
                                            RowView<const typename G::Scalar> dz, const Gradients<typename G::Scalar>& into,
                                            typename G::Tape& tape, const typename G::Tape& done, const Context& context) {
  { gate.layout() } -> std::convertible_to<const Layout&>;
  gate.initialize(dp, Rng(0));
  { gate.experts() } -> std::convertible_to<Index>;
  { gate.dim() } -> std::convertible_to<Index>;
  gate.forward(where, p, in, tape, context.exec);
  gate.backward(p, in, dz, into, done, context);
  { done.logits() } -> std::same_as<RowView<const typename G::Scalar>>;
  { done.noisy_logits() } -> std::same_as<RowView<const typename G::Scalar>>;
};

/// The linear gate: a logit for each token and expert. Its input x is `Tokens::gate_x` (T,G) where there is one.
///
///     z  = (x ⊙ j) Wgᵀ        j = 1, or U(1-ε, 1+ε) in training           (T,G)(G,E) -> (T,E)
///     z' = z + (σ/E) N(0,1)   in training
///
/// Noise and jitter of token t are numbers first + t of their streams. Backward, with dz = ∂/∂z + ∂/∂z': dWg += dzᵀ (x ⊙ j),
/// dx += (dz Wg) ⊙ j. Parameter: `gate.weight` (E,G). Cost: 2TGE forward, 4TGE backward.
template <class Scalar_>
class LinearGate {
 public:
  using Scalar = Scalar_;

  class Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : resource_(resource) {}

    /// z (T,E), without noise.
    RowView<const Scalar> logits() const { return logits_.view(tokens_, experts_); }
    /// z' (T,E): what selects. The same as `logits` without noise.
    RowView<const Scalar> noisy_logits() const { return noisy_ ? noisy_logits_.view(tokens_, experts_) : logits(); }
    bool noisy() const { return noisy_; }

   private:
    friend class LinearGate;
    detail::OwnResource resource_;
    Index tokens_ = 0;
    Index experts_ = 0;
    bool noisy_ = false;
    bool jittered_ = false;
    Buffer<Scalar> logits_{0, resource_};
    Buffer<Scalar> noisy_logits_{0, resource_};
    Buffer<Scalar> factor_{0, resource_};  // j
    Buffer<Scalar> input_{0, resource_};   // x ⊙ j
  };

  /// Throws what `detail::expect_gate` throws.
  LinearGate(std::string_view where, Index dim, Index experts, const GateNoise& noise = {})
      : dim_(dim), experts_(experts), noise_(noise) {
    detail::expect_gate<Scalar>(where, dim, experts, noise);
    layout_.add("gate.weight", {experts, dim}, {.role = Role::gate});
  }

  const Layout& layout() const { return layout_; }
  /// G, the width of its input.
  Index dim() const { return dim_; }
  Index experts() const { return experts_; }
  /// The deviation of the noise on a logit, σ/E.
  double deviation() const { return noise_.logits / double(experts_); }

  /// Uniform on ±1/√G (Kaiming uniform with a = √5, as DiT-MoE's reference).
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    const double bound = 1 / std::sqrt(double(dim_));
    rng.fill_uniform(p[weight_], -bound, bound);
  }

  /// Fills the tape. Throws ShapeError for another width of the input, ValueError that names the first token whose logits are
  /// not finite, and where noise or jitter have to be drawn without a stream.
  void forward(std::string_view where, ParameterView<const Scalar> p, const Tokens<Scalar>& in, Tape& tape,
               const Exec& exec) const {
    detail::expect_shape(where, in.has_gate_x() ? "gate_x" : "the input of the gate, x,", in.gate_input(), in.count(), dim_);
    const bool noisy = in.training && noise_.logits > 0;
    const bool jittered = in.training && noise_.jitter > 0;
    detail::expect_value(
        in.rng.has_value() || in.count() == 0 || !(jittered || (noisy && in.noise.rows() == 0)), where,
        "training draws noise, and there is no stream to draw from; set Tokens::rng, another one for every step");
    tape.tokens_ = in.count();
    tape.experts_ = experts_;
    tape.noisy_ = noisy;
    tape.jittered_ = jittered;
    if (tape.noisy_ && in.noise.rows() != 0) {
      detail::expect_shape(where, "noise", in.noise, in.count(), experts_);
    }
    const RowView<Scalar> z = tape.logits_.matrix(in.count(), experts_);
    kernel::gemm<Scalar>({in.count(), experts_, dim_, kernel::plain<Scalar>(input(in, tape, exec)),
                          kernel::transposed<Scalar>(p[weight_]), kernel::replace<Scalar>(z)},
                         exec);  // (T,G)(G,E) -> (T,E)
    const auto row_of = [&](Index t) { return in.row(t); };
    detail::expect_finite_logits<Scalar>(where, z, row_of, exec);
    if (tape.noisy_) {
      const RowView<Scalar> z_noisy = tape.noisy_logits_.matrix(in.count(), experts_);
      const Rng rng = in.rng.value_or(Rng(0)).split(1);  // not read where the noise is given
      detail::for_each_row(in.count(), exec, [&](Index t) {
        for (Index e = 0; e < experts_; ++e) {
          const double n = in.noise.rows() != 0 ? double(in.noise(t, e)) : rng.normal(number(in, t, experts_, e));
          z_noisy(t, e) = z(t, e) + Scalar(deviation() * n);
        }
      });
      detail::expect_finite_logits<Scalar>(where, z_noisy, row_of, exec);
    }
  }

  /// From dz, the sum of the gradients of z and z'. Adds to the gradient of the input unless it is absent.
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> dz,
                const Gradients<Scalar>& into, const Tape& tape, const Context& context) const {
    const RowView<Scalar>& dx = into.tokens.of_gate_input(in);
    const RowView<Scalar> dweight = into.parameters[weight_];
    const RowView<const Scalar> x = tape.jittered_ ? tape.input_.view(in.count(), dim_) : in.gate_input();
    kernel::gemm<Scalar>({dweight.rows(), dim_, in.count(), kernel::transposed<Scalar>(dz), kernel::plain<Scalar>(x),
                          kernel::add_to<Scalar>(dweight)},
                         context.exec);  // (E,T)(T,G) -> (E,G)
    if (dx.cols() == 0) {
      return;
    }
    const auto add_input_gradient = [&](kernel::Destination<Scalar> to) {
      kernel::gemm<Scalar>({in.count(), dim_, experts_, kernel::plain<Scalar>(dz), kernel::plain<Scalar>(p[weight_]), to},
                           context.exec);  // (T,E)(E,G) -> (T,G)
    };
    if (!tape.jittered_) {
      add_input_gradient(kernel::add_to<Scalar>(dx));
      return;
    }
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> dinput = context.workspace.matrix<Scalar>(in.count(), dim_);
    add_input_gradient(kernel::replace<Scalar>(dinput));
    const RowView<const Scalar> factor = tape.factor_.view(in.count(), dim_);
    detail::for_each_row(in.count(), context.exec, [&](Index t) {
      Scalar* to = dx.row(t);
      const Scalar* d = dinput.row(t);
      for (Index g = 0; g < dim_; ++g) {
        to[g] += d[g] * factor(t, g);
      }
    });
  }

 private:
  RowView<const Scalar> input(const Tokens<Scalar>& in, Tape& tape, const Exec& exec) const {
    if (!tape.jittered_) {
      return in.gate_input();
    }
    const RowView<Scalar> factor = tape.factor_.matrix(in.count(), dim_);
    const RowView<Scalar> input = tape.input_.matrix(in.count(), dim_);
    const Rng rng = in.rng->split(0);
    detail::for_each_row(in.count(), exec, [&](Index t) {
      for (Index d = 0; d < dim_; ++d) {
        factor(t, d) = Scalar(formula::jitter_factor(noise_.jitter, rng.uniform(number(in, t, dim_, d))));
        input(t, d) = in.gate_input()(t, d) * factor(t, d);
      }
    });
    return input;
  }

  /// Which number of its stream is that of element i of token t, of `width` a token.
  static std::uint64_t number(const Tokens<Scalar>& in, Index t, Index width, Index i) {
    return (std::uint64_t(in.first) + std::uint64_t(t)) * std::uint64_t(width) + std::uint64_t(i);
  }

  Index dim_;
  Index experts_;
  GateNoise noise_;
  Layout layout_;
  static constexpr Index weight_ = 0;  // its position in the layout
};

}  // namespace moxie::inline MOXIE_NAMESPACE

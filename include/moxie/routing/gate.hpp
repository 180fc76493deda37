// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/parameters.hpp>
#include <moxie/core/workspace.hpp>
#include <moxie/kernel/gemm.hpp>
#include <moxie/routing/config.hpp>
#include <moxie/routing/score.hpp>
#include <moxie/routing/tokens.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// The linear gate: a logit for each token and expert. Its input x is `Tokens::gate_x` (T,G) where there is one.
///
///     z  = (x ⊙ j) Wgᵀ        j = 1, or U(1-ε, 1+ε) in training           (T,G)(G,E) -> (T,E)
///     z' = z + (σ/E) N(0,1)   in training
///
/// Noise and jitter of token t are numbers first + t of their streams. Backward, with dz = ∂/∂z + ∂/∂z': dWg += dzᵀ (x ⊙ j),
/// dx += (dz Wg) ⊙ j. Cost: 2TGE forward, 4TGE backward.
template <class Scalar>
class Gate {
 public:
  class Tape {
   public:
    /// z (T,E), without noise.
    RowView<const Scalar> logits() const { return logits_.view(tokens_, experts_); }
    /// z' (T,E): what selects. The same as `logits` without noise.
    RowView<const Scalar> noisy_logits() const { return noisy_ ? noisy_logits_.view(tokens_, experts_) : logits(); }
    bool noisy() const { return noisy_; }

   private:
    friend class Gate;
    Index tokens_ = 0;
    Index experts_ = 0;
    bool noisy_ = false;
    bool jittered_ = false;
    Buffer<Scalar> logits_;
    Buffer<Scalar> noisy_logits_;
    Buffer<Scalar> factor_;  // j
    Buffer<Scalar> input_;   // x ⊙ j
  };

  /// Throws what `detail::expect_gate` throws.
  Gate(std::string_view where, Index dim, Index experts, const GateNoise& noise) : dim_(dim), experts_(experts), noise_(noise) {
    detail::expect_gate<Scalar>(where, dim, experts, noise);
  }

  /// G, the width of its input.
  Index dim() const { return dim_; }
  Index experts() const { return experts_; }
  /// The deviation of the noise on a logit, σ/E.
  double deviation() const { return noise_.logits / double(experts_); }

  /// Uniform on ±1/√G (Kaiming uniform with a = √5, as DiT-MoE's reference).
  void initialize(RowView<Scalar> weight, const Rng& rng) const {
    const double bound = 1 / std::sqrt(double(dim_));
    rng.fill_uniform(weight, -bound, bound);
  }

  /// Fills the tape. Throws ShapeError for another width of the input, ValueError that names the first token whose logits are
  /// not finite, and where noise or jitter have to be drawn without a stream.
  void forward(std::string_view where, RowView<const Scalar> weight, const Tokens<Scalar>& in, Tape& tape,
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
                          kernel::transposed<Scalar>(weight), kernel::replace<Scalar>(z)},
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

  /// From the sum of the gradients of z and z'. Adds to `dx`, the gradient of the input, unless it is empty.
  void backward(RowView<const Scalar> weight, const Tokens<Scalar>& in, RowView<const Scalar> dz, RowView<Scalar> dx,
                RowView<Scalar> dweight, const Tape& tape, Workspace& workspace, const Exec& exec) const {
    const RowView<const Scalar> x = tape.jittered_ ? tape.input_.view(in.count(), dim_) : in.gate_input();
    kernel::gemm<Scalar>({dweight.rows(), dim_, in.count(), kernel::transposed<Scalar>(dz), kernel::plain<Scalar>(x),
                          kernel::add_to<Scalar>(dweight)},
                         exec);  // (E,T)(T,G) -> (E,G)
    if (dx.cols() == 0) {
      return;
    }
    const auto add_input_gradient = [&](kernel::Destination<Scalar> to) {
      kernel::gemm<Scalar>({in.count(), dim_, experts_, kernel::plain<Scalar>(dz), kernel::plain<Scalar>(weight), to},
                           exec);  // (T,E)(E,G) -> (T,G)
    };
    if (!tape.jittered_) {
      add_input_gradient(kernel::add_to<Scalar>(dx));
      return;
    }
    const Workspace::Frame frame(workspace);
    const RowView<Scalar> dinput = workspace.matrix<Scalar>(in.count(), dim_);
    add_input_gradient(kernel::replace<Scalar>(dinput));
    const RowView<const Scalar> factor = tape.factor_.view(in.count(), dim_);
    detail::for_each_row(in.count(), exec, [&](Index t) {
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
        factor(t, d) = Scalar(1 + noise_.jitter * (2 * rng.uniform(number(in, t, dim_, d)) - 1));
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
};

}  // namespace moxie::inline MOXIE_NAMESPACE

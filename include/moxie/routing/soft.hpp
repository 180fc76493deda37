// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/gemm.hpp>
#include <moxie/kernel/rows.hpp>
#include <moxie/routing/config.hpp>
#include <moxie/routing/formula.hpp>
#include <moxie/routing/router.hpp>
#include <moxie/routing/score.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Soft MoE: every slot is a convex combination of all tokens of its sequence, every token one of all slots.
///
///     Z = l2norm(X) (g · l2norm(Φ))ᵀ,   D = softmax over tokens (columns of Z),   C = γ softmax over slots (rows of Z)
///
/// Puigcerver et al. 2023, section 2.1, Algorithms 1 and 2; l2norm(v) = v / √(Σ v² + 1e-6), ε inside the root. Slots mix the
/// tokens as they are, not normalized. Not causal: each output depends on all tokens of its sequence. Sequences may differ in
/// length, and have no tokens. Logits are made of `Tokens::gate_x` (T,G) where there is one. Parameters: `phi.weight` (E·S,D),
/// or (E·S,G) with `gate_dim`, a row a slot, and `scale` (), g; none if nothing is learned. Cost: 2TDN for the logits, N = E·S.
template <class Scalar_>
class SoftRouter {
 public:
  using Scalar = Scalar_;
  using Plan = DensePlan<Scalar>;
  using Config = SoftRouterConfig;

  class Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : resource_(resource) {}

    /// Soft MoE needs no balance loss.
    double balance_loss() const { return 0; }

   private:
    friend class SoftRouter;
    detail::OwnResource resource_;
    Buffer<Scalar> x_{0, resource_};           // l2norm(X), (T,G)
    Buffer<Scalar> phi_{0, resource_};         // l2norm(Φ), (N,G)
    Buffer<Scalar> x_factor_{0, resource_};    // 1 / √(Σ x² + ε), T
    Buffer<Scalar> phi_factor_{0, resource_};  // N
  };

  /// Throws ValueError for sizes below 1.
  explicit SoftRouter(const Config& config)
      : config_((config.template expect_valid<Scalar>("SoftRouter"), config)), layout_(config.layout()) {}

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return config_.model_dim; }
  /// N = E·S.
  Index slot_count() const { return config_.slot_count(); }
  /// R of a call: B·N.
  Index most_rows(const Sequences& sequences) const { return sequences.count() * slot_count(); }

  /// Φ normal with deviation 1/√G, scale `initial_scale`.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    if (config_.learned()) {
      rng.fill_normal(p[phi_], 1 / std::sqrt(double(config_.gate_input_dim())));
    }
    if (config_.normalized()) {
      p[scale_](0, 0) = Scalar(config_.initial_scale);
    }
  }

  /// Throws ValueError naming the first token whose norm or logits are not finite, for `in.top_k` and choices or weights from
  /// elsewhere, which slots do not have, and a `gate_x` where nothing is learned; ShapeError for a sequence that has not as
  /// many tokens as there are slots, where identity mixing needs it. What the plan then holds is no plan.
  void route(ParameterView<const Scalar> p, const Tokens<Scalar>& in, Plan& plan, Tape& tape, const Context& context) const {
    detail::expect_value(in.top_k == 0, "SoftRouter::route", "every token uses all slots, so there is no top_k to set");
    detail::expect_read("SoftRouter::route", in, {.gate_x = config_.learned()});
    if (config_.learned()) {
      detail::expect_shape("SoftRouter::route", in.has_gate_x() ? "gate_x" : "what logits are made of, x,", in.gate_input(),
                           in.count(), config_.gate_input_dim());
    }
    if (config_.dispatch == Mixing::identity || config_.combine == Mixing::identity) {
      in.sequences.for_each([&](Index b, Index begin, Index end) {
        if (end - begin != slot_count()) {
          throw ShapeError("SoftRouter::route: sequence " + std::to_string(b) + " has " + std::to_string(end - begin) +
                           " tokens, expected one for each of the " + std::to_string(slot_count()) + " slots");
        }
      });
    }
    plan.resize(in.sequences, config_.experts, config_.slots_per_expert);
    if (config_.learned()) {
      // Logits lie where their softmax over tokens goes. Each step reads and writes them in memory once.
      const RowView<Scalar> z = config_.dispatch == Mixing::learned ? plan.dispatch() : plan.combine();
      logits(p, in, z, tape, context);
      detail::for_each_row(in.count(), context.exec, [&](Index t) {
        detail::expect_finite_logits("SoftRouter::route", slot_count(), z.row(t), in.row(t));
        if (config_.combine == Mixing::learned) {
          detail::softmax(slot_count(), z.row(t), plan.combine().row(t));
          multiply(config_.scale, slot_count(), plan.combine().row(t));
        }
      });
    }
    if (config_.dispatch == Mixing::learned) {
      for_each_block(in.sequences, context.exec, [&](Index b, Index first, Index count) {
        softmax_columns(first, count, plan.dispatch().middle_rows(in.sequences.begin(b), in.sequences.length(b)));
      });
    }
    context.exec.parallel_for(in.sequences.count(), [&](Index b) {
      const Index begin = in.sequences.begin(b);
      const Index length = in.sequences.length(b);
      if (length == 0) {
        return;
      }
      if (config_.combine != Mixing::learned) {
        set_constant(config_.combine, Scalar(config_.scale), slot_count(), plan.combine().middle_rows(begin, length));
      }
      if (config_.dispatch != Mixing::learned) {
        set_constant(config_.dispatch, Scalar(1), length, plan.dispatch().middle_rows(begin, length));
      }
    });
  }

  /// Both softmaxes back to dZ, then dX̂ = g dZ Φ̂, dΦ̂ = g dZᵀ X̂, dg = ⟨dZᵀ X̂, Φ̂⟩, and through both normalizations.
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Plan& plan, const RouterGradient<Plan>& gradient,
                Tape& tape, const Context& context) const {
    if (!config_.learned()) {
      return;
    }
    const ParameterView<Scalar> dp = gradient.into.parameters;
    const RowView<Scalar>& dx = gradient.into.tokens.of_gate_input(in);
    const Index tokens = in.count();
    const Index dim = config_.gate_input_dim();
    const Index n = slot_count();
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> dz = context.workspace.spread<Scalar>(tokens, n);
    logits_gradient(in, plan, gradient.plan, dz, context.exec);
    if (!config_.normalize) {
      kernel::gemm<Scalar>({dp[phi_].rows(), dim, tokens, kernel::transposed<Scalar>(dz),
                            kernel::plain<Scalar>(in.gate_input()), kernel::add_to<Scalar>(dp[phi_])},
                           context.exec);  // (N,T)(T,G) -> (N,G)
      if (dx.cols() > 0) {
        kernel::gemm<Scalar>(
            {tokens, dim, n, kernel::plain<Scalar>(dz), kernel::plain<Scalar>(p[phi_]), kernel::add_to<Scalar>(dx)},
            context.exec);  // (T,N)(N,G) -> (T,G)
      }
      return;
    }
    const Scalar scale = p[scale_](0, 0);
    const RowView<const Scalar> x_hat = tape.x_.view(tokens, dim);
    const RowView<const Scalar> phi_hat = tape.phi_.view(n, dim);
    const RowView<Scalar> dphi_hat = context.workspace.matrix<Scalar>(n, dim);
    kernel::gemm<Scalar>(
        {n, dim, tokens, kernel::transposed<Scalar>(dz), kernel::plain<Scalar>(x_hat), kernel::replace<Scalar>(dphi_hat)},
        context.exec);  // (N,T)(T,G) -> (N,G)
    if (dp.has(scale_)) {
      dp[scale_](0, 0) += kernel::dot(n * dim, dphi_hat.data(), phi_hat.data());
    }
    if (dp.has(phi_)) {
      add_normalized_backward(phi_hat, tape.phi_factor_, dphi_hat, scale, dp[phi_], context.exec);
    }
    if (dx.cols() > 0) {
      const RowView<Scalar> dx_hat = context.workspace.matrix<Scalar>(tokens, dim);
      kernel::gemm<Scalar>(
          {tokens, dim, n, kernel::plain<Scalar>(dz), kernel::plain<Scalar>(phi_hat), kernel::replace<Scalar>(dx_hat)},
          context.exec);  // (T,N)(N,G) -> (T,G)
      add_normalized_backward(x_hat, tape.x_factor_, dx_hat, scale, dx, context.exec);
    }
  }

 private:
  /// dZ (T,N) from the gradients of both softmaxes.
  void logits_gradient(const Tokens<Scalar>& in, const Plan& plan, const typename Plan::Gradient& dplan, RowView<Scalar> dz,
                       const Exec& exec) const {
    const Index n = slot_count();
    if (config_.combine == Mixing::learned) {
      const RowView<const Scalar> dc = dplan.combine.spread_view(in.count(), n);
      detail::for_each_row(in.count(), exec, [&](Index t) {
        detail::softmax_backward(n, plan.combine().row(t), dc.row(t), dz.row(t), Scalar(config_.scale));
      });
    } else {
      detail::fill_rows(dz, Scalar(0));
    }
    if (config_.dispatch == Mixing::learned) {
      const RowView<const Scalar> dd = dplan.dispatch.spread_view(in.count(), n);
      for_each_block(in.sequences, exec, [&](Index b, Index first, Index count) {
        const auto part = [&](auto m) { return m.middle_rows(in.sequences.begin(b), in.sequences.length(b)); };
        add_softmax_columns_backward(part(plan.dispatch()), part(dd), first, count, part(dz));
      });
    }
  }

  void logits(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<Scalar> z, Tape& tape,
              const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    RowView<const Scalar> x = in.gate_input();
    RowView<const Scalar> phi = p[phi_];
    if (config_.normalize) {
      x = normalized(x, tape.x_, tape.x_factor_, context.exec);
      for (Index t = 0; t < in.count(); ++t) {
        if (!(tape.x_factor_[t] > 0)) {
          throw ValueError("SoftRouter::route: token " + std::to_string(in.row(t)) + " is not finite, or its norm is not");
        }
      }
      const RowView<Scalar> scaled = context.workspace.matrix<Scalar>(slot_count(), config_.gate_input_dim());
      detail::copy_rows(normalized(phi, tape.phi_, tape.phi_factor_, context.exec), scaled);
      for (Index n = 0; n < slot_count(); ++n) {
        multiply(double(p[scale_](0, 0)), scaled.cols(), scaled.row(n));
      }
      phi = scaled;
    }
    kernel::gemm<Scalar>({in.count(), slot_count(), config_.gate_input_dim(), kernel::plain<Scalar>(x),
                          kernel::transposed<Scalar>(phi), kernel::stream_to<Scalar>(z)},
                         context.exec);  // (T,G)(G,N) -> (T,N)
  }

  /// n numbers times a factor.
  static void multiply(std::type_identity_t<double> factor, Index n, Scalar* v) {
    if (factor != 1) {
      kernel::map(
          n, v, [&](auto a) { return decltype(a)(Scalar(factor)) * a; }, static_cast<const Scalar*>(v));
    }
  }

  /// The weights of one sequence that are not learned: `scale` times the identity, or 1 / n.
  static void set_constant(Mixing mixing, Scalar scale, Index n, RowView<Scalar> weights) {
    const bool identity = mixing == Mixing::identity;
    detail::fill_rows(weights, identity ? Scalar(0) : scale / Scalar(n));
    for (Index i = 0; identity && i < weights.rows(); ++i) {
      weights(i, i) = scale;
    }
  }

  /// Rows v · r with r = 1 / √(Σ v² + 1e-6).
  static RowView<const Scalar> normalized(RowView<const Scalar> v, Buffer<Scalar>& out, Buffer<Scalar>& factor,
                                          const Exec& exec) {
    const RowView<Scalar> hat = out.matrix(v.rows(), v.cols());
    factor.resize(v.rows());
    exec.parallel_ranges(v.rows(), 64, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        factor[i] = formula::l2norm_factor(kernel::dot(v.cols(), v.row(i), v.row(i)));
        kernel::map(
            v.cols(), hat.row(i), [&](auto a) { return a * decltype(a)(factor[i]); }, v.row(i));
      }
    });
    return hat;
  }

  /// With v̂ = r v: dv += scale · r (dv̂ - ⟨dv̂, v̂⟩ v̂).
  static void add_normalized_backward(RowView<const Scalar> hat, const Buffer<Scalar>& factor, RowView<const Scalar> dhat,
                                      Scalar scale, RowView<Scalar> dv, const Exec& exec) {
    exec.parallel_ranges(hat.rows(), 64, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Scalar dot = kernel::dot(hat.cols(), hat.row(i), dhat.row(i));
        const Scalar part = scale * factor[i];
        for (Index j = 0; j < hat.cols(); ++j) {
          dv(i, j) += formula::l2norm_slope(part, hat(i, j), dhat(i, j), dot);
        }
      }
    });
  }

  static constexpr Index block = 32;  // columns of a task

  /// Calls `f(sequence, first column, columns)` for blocks of columns of the sequences that have tokens.
  template <class F>
  void for_each_block(const Sequences& sequences, const Exec& exec, F&& f) const {
    const Index blocks = (slot_count() + block - 1) / block;
    exec.parallel_for(sequences.count() * blocks, [&](Index i) {
      if (sequences.length(i / blocks) > 0) {
        const Index first = i % blocks * block;
        f(i / blocks, first, (std::min)(block, slot_count() - first));
      }
    });
  }

  /// Softmax of n columns of z (L,N) from column j on, in place. Sums from the first token to the last.
  static void softmax_columns(Index j, Index n, RowView<Scalar> z) {
    constexpr Index ahead = 16;  // rows: that only so many columns of each are read, processors do not foresee
    std::array<Scalar, block> largest;
    std::array<Scalar, block> sum{};
    std::copy_n(z.row(0) + j, n, largest.begin());
    for (Index t = 1; t < z.rows(); ++t) {
      kernel::prefetch(z.row((std::min)(t + ahead, z.rows() - 1)) + j, n);
      kernel::map(
          n, largest.data(), [](auto a, auto b) { return (kernel::max)(a, b); }, largest.data(), z.row(t) + j);
    }
    for (Index t = 0; t < z.rows(); ++t) {
      kernel::map(
          n, std::array{z.row(t) + j, sum.data()},
          [](auto v, auto most, auto so_far) {
            const auto e = kernel::exp(v - most);
            return std::array{e, so_far + e};
          },
          z.row(t) + j, largest.data(), sum.data());
    }
    kernel::map(
        n, sum.data(), [](auto all) { return decltype(all)(1) / all; }, sum.data());
    for (Index t = 0; t < z.rows(); ++t) {
      kernel::map(
          n, z.row(t) + j, [](auto v, auto share) { return v * share; }, z.row(t) + j, sum.data());
    }
  }

  /// dz_tj += d_tj (dd_tj - Σ_u dd_uj d_uj), of n columns from j on.
  static void add_softmax_columns_backward(RowView<const Scalar> d, RowView<const Scalar> dd, Index j, Index n,
                                           RowView<Scalar> dz) {
    std::array<Scalar, block> dot{};
    for (Index t = 0; t < d.rows(); ++t) {
      kernel::map(
          n, dot.data(), [](auto sum, auto a, auto b) { return sum + a * b; }, dot.data(), dd.row(t) + j, d.row(t) + j);
    }
    for (Index t = 0; t < d.rows(); ++t) {
      kernel::map(
          n, dz.row(t) + j, [](auto sum, auto a, auto da, auto all) { return sum + a * (da - all); }, dz.row(t) + j,
          d.row(t) + j, dd.row(t) + j, dot.data());
    }
  }

  Config config_;
  Layout layout_;
  static constexpr Index phi_ = 0;  // positions in the layout
  static constexpr Index scale_ = 1;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <moxie/expert/linear.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/timestep.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Options of `TimestepMoE`; the meaning of each is `TimestepRouterConfig`'s.
template <class ExpertConfig>
struct TimestepMoEConfig {
  Index model_dim = 0;
  Index condition_dim = 0;
  Index experts = 0;
  Index top_k = 1;
  ExpertConfig expert = {};
  double scale = 1;

  TimestepRouterConfig router() const { return {condition_dim, experts, top_k, scale}; }
};

/// Switch-DiT's layer: the timestep of a sequence chooses the experts, and all tokens of the sequence go to the same ones.
///
///     y_t = Σ_{i in top-K of s_b} s_bi f_i(x_t),   s_b = softmax(silu(c_b) Wᵀ + b),   b the sequence of token t
///
/// Park et al. 2024, section 3.2. `Tokens::condition` (B,C) holds c; its gradient goes to `TokensGradient::condition`:
///
///     Tokens<float> in(x, length);
///     in.condition = c;
///     layer.forward(in, y, tape);
///     layer.backward(in, dy, {dx, dc}, grads, tape);
///
/// See `TimestepRouter` for s, the bank (`LinearExperts` unless another is named) for f, `timestep_mask` for what Switch-DiT
/// does with y, and `diffusion_prior_loss` for the loss that goes with it.
template <class Scalar, class Experts = LinearExperts<Scalar>>
class TimestepMoE : public Moe<TimestepRouter<Scalar>, Experts, Scalar> {
 public:
  using Config = TimestepMoEConfig<typename Experts::Config>;

  /// Throws what `TimestepRouter` and the bank throw.
  // Braces: the router is made first, and refuses sizes before the bank names tensors.
  explicit TimestepMoE(const Config& config)
      : Moe<TimestepRouter<Scalar>, Experts, Scalar>{TimestepRouter<Scalar>(config.router()),
                                                     Experts(config.experts, config.model_dim, config.expert), std::nullopt,
                                                     "TimestepMoE"} {}
};

/// Switch-DiT's use of the layer: its output y makes the mask 1 + y of x.
///
///     r = x ⊙ (1 + y)          (T,D), overwritten
///
/// Park et al. 2024, section 3.2. A transformer block f with the condition c runs on what the mask lets through, and
/// what it holds back goes around the block:
///
///     r   = x ⊙ mask                     mask = 1 + y
///     r   = f(r, c)
///     out = r + (1 - mask) ⊙ x           which is r - x ⊙ y
///
/// So y = 0 is the block without experts, which is where Switch-DiT starts: with the experts' parameters zero. Of dout,
/// backward is dr = dout, f's own backward, `timestep_mask_backward`, then dx -= dout ⊙ y and dy -= dout ⊙ x.
///
/// Throws ShapeError if the shapes differ, ValueError if r overlaps x or y. Cost: 2TD. Backward: `timestep_mask_backward`.
template <class Scalar>
void timestep_mask(RowView<const Scalar> x, RowView<const Scalar> y, RowView<Scalar> r, const Exec& exec = {}) {
  constexpr std::string_view where = "timestep_mask";
  detail::expect_shape(where, "y", y, x.rows(), x.cols());
  detail::expect_shape(where, "r", r, x.rows(), x.cols());
  detail::expect_value(!detail::overlaps(x, r) && !detail::overlaps(y, r), where, "r overlaps x or y");
  detail::expect_value(!detail::rows_overlap(r), where, "the rows of r overlap");
  detail::for_each_row(x.rows(), exec, [&](Index t) {
    kernel::map(
        x.cols(), r.row(t), [](auto a, auto b) { return a * (decltype(b)(1) + b); }, x.row(t), y.row(t));
  });
}

/// From dr (T,D), overwrites dx = dr ⊙ (1 + y) and dy = dr ⊙ x, both (T,D). dy is what the layer's backward takes, whose dx is
/// another part of the gradient of x.
///
/// Throws ShapeError if the shapes differ, ValueError if dx or dy overlaps another argument, before anything is written.
template <class Scalar>
void timestep_mask_backward(RowView<const Scalar> x, RowView<const Scalar> y, RowView<const Scalar> dr, RowView<Scalar> dx,
                            RowView<Scalar> dy, const Exec& exec = {}) {
  constexpr std::string_view where = "timestep_mask_backward";
  detail::expect_shape(where, "y", y, x.rows(), x.cols());
  detail::expect_shape(where, "dr", dr, x.rows(), x.cols());
  detail::expect_shape(where, "dx", dx, x.rows(), x.cols());
  detail::expect_shape(where, "dy", dy, x.rows(), x.cols());
  bool apart = !detail::overlaps(dx, dy);
  for (const RowView<const Scalar>& in : {x, y, dr}) {
    apart = apart && !detail::overlaps(in, dx) && !detail::overlaps(in, dy);
  }
  detail::expect_value(apart, where, "dx or dy overlaps another argument");
  detail::expect_value(!detail::rows_overlap(dx) && !detail::rows_overlap(dy), where, "the rows of dx or dy overlap");
  detail::for_each_row(x.rows(), exec, [&](Index t) {
    kernel::map(
        x.cols(), std::array{dx.row(t), dy.row(t)},
        [](auto a, auto b, auto d) {
          return std::array{d * (decltype(b)(1) + b), d * a};
        },
        x.row(t), y.row(t), dr.row(t));
  });
}

}  // namespace moxie::inline MOXIE_NAMESPACE

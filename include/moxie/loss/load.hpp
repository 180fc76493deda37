// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/core/matrix.hpp>
#include <moxie/loss/formula.hpp>
#include <moxie/loss/importance.hpp>
#include <span>

namespace moxie::inline MOXIE_NAMESPACE {

/// The load loss of a group of n tokens: CV² of Σ_t P(expert i would win again at token t, with fresh noise), over the experts.
///
///     θ_t = the K-th largest noisy logit of token t,   P_ti = Φ((z_ti - θ_t) / σ)
///
/// A load that has a gradient, unlike the counts: Shazeer et al. 2017, equations 8 to 11, as V-MoE (Riquelme et al. 2021,
/// appendix A.2) has it. `logits` (n,E) without noise, `threshold` (n) θ_t, `deviation` σ > 0 of a logit's noise. `scratch`
/// holds E numbers. Throws ShapeError for other sizes, ValueError for a deviation that is not above 0.
template <class Scalar>
double load_loss(RowView<const Scalar> logits, std::span<const Scalar> threshold, double deviation, std::span<double> scratch) {
  constexpr std::string_view where = "load_loss";
  detail::expect_as_many(where, "threshold", threshold.size(), std::size_t(logits.rows()));
  detail::expect_as_many(where, "scratch", scratch.size(), std::size_t(logits.cols()));
  detail::expect_value(deviation > 0, where, "the deviation must be above 0");
  std::fill(scratch.begin(), scratch.end(), 0.0);
  for (Index t = 0; t < logits.rows(); ++t) {
    for (Index i = 0; i < logits.cols(); ++i) {
      const double u = (double(logits(t, i)) - double(threshold[std::size_t(t)])) / deviation;
      scratch[std::size_t(i)] += formula::normal_distribution(u);
    }
  }
  return squared_variation(scratch);
}

/// Where the gradient of the load loss goes: added to both.
template <class Scalar>
struct LoadGradient {
  RowView<Scalar> logits;       ///< (n,E)
  std::span<Scalar> threshold;  ///< n
};

/// Adds weight · ∂loss/∂z_ti to the gradient of the logits, and weight · ∂loss/∂θ_t to that of the thresholds, with the normal
/// density φ:
///
///     g_i = ∂CV²/∂load_i,   ∂/∂z_ti = g_i φ(u_ti) / σ,   ∂/∂θ_t = -Σ_i g_i φ(u_ti) / σ
///
/// Throws what `load_loss` throws, and ShapeError for other sizes of the gradients.
template <class Scalar>
void load_loss_backward(RowView<const std::type_identity_t<Scalar>> logits,
                        std::span<const std::type_identity_t<Scalar>> threshold, double deviation, double weight,
                        const LoadGradient<Scalar>& gradient, std::span<double> scratch) {
  constexpr std::string_view where = "load_loss_backward";
  const RowView<Scalar>& dlogits = gradient.logits;
  const std::span<Scalar> dthreshold = gradient.threshold;
  detail::expect_shape(where, "dlogits", dlogits, logits.rows(), logits.cols());
  detail::expect_as_many(where, "dthreshold", dthreshold.size(), std::size_t(logits.rows()));
  load_loss<Scalar>(logits, threshold, deviation, scratch);
  squared_variation_backward(scratch);
  for (Index t = 0; t < logits.rows(); ++t) {
    double sum = 0;
    for (Index i = 0; i < logits.cols(); ++i) {
      const double u = (double(logits(t, i)) - double(threshold[std::size_t(t)])) / deviation;
      const double d = scratch[std::size_t(i)] * weight / deviation * formula::normal_density(u);
      dlogits(t, i) += Scalar(d);
      sum += d;
    }
    dthreshold[std::size_t(t)] -= Scalar(sum);
  }
}

}  // namespace moxie::inline MOXIE_NAMESPACE

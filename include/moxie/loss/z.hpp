// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/loss/config.hpp>
#include <moxie/loss/formula.hpp>
#include <span>

namespace moxie::inline MOXIE_NAMESPACE {

/// ln Σ_i exp z_i, from the largest logit. Throws ShapeError for no logits.
template <class Scalar>
double log_sum_exp(std::span<const Scalar> z) {
  if (z.empty()) {
    throw ShapeError("log_sum_exp: there are no logits");
  }
  return formula::log_sum_exp(Index(z.size()), z.data());
}

/// The z-loss of one token, (ln Σ_i exp z_i)²: keeps logits small, so that rounding does not decide the softmax.
///
/// ST-MoE (Zoph et al. 2022), equation 5, which takes the mean over tokens. (ln E)² for logits of zero.
template <class Scalar>
double z_loss(std::span<const Scalar> logits) {
  const double value = log_sum_exp(logits);
  return value * value;
}

/// Adds weight · ∂loss/∂z_i = weight · 2 ln Σ exp z · softmax(z)_i to `dlogits`. Throws ShapeError if the sizes differ, or for
/// no logits.
template <class Scalar>
void z_loss_backward(std::span<const std::type_identity_t<Scalar>> logits, double weight, std::span<Scalar> dlogits) {
  detail::expect_as_many("z_loss_backward", "dlogits", dlogits.size(), logits.size());
  const double value = log_sum_exp(logits);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    dlogits[i] += Scalar(weight * formula::z_loss_slope(double(logits[i]), value));
  }
}

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/loss/config.hpp>
#include <moxie/loss/formula.hpp>
#include <span>

namespace moxie::inline MOXIE_NAMESPACE {

/// H(p) = -Σ_i p_i ln p_i in nats; 0 ln 0 = 0. ln E for a uniform p, 0 for a certain one.
template <class Scalar>
double entropy(std::span<const Scalar> p) {
  double sum = 0;
  for (const Scalar x : p) {
    sum += formula::entropy_term(double(x));
  }
  return sum;
}

/// Adds weight · ∂H/∂p_i = -weight · (ln p_i + 1) to `dp`, with the logarithm of the smallest number for p_i = 0, where the
/// derivative has no limit. Throws ShapeError if the sizes differ.
template <class Scalar>
void entropy_backward(std::span<const std::type_identity_t<Scalar>> p, double weight, std::span<Scalar> dp) {
  detail::expect_as_many("entropy_backward", "dp", dp.size(), p.size());
  for (std::size_t i = 0; i < p.size(); ++i) {
    dp[i] += Scalar(weight * formula::entropy_slope<Scalar>(double(p[i])));
  }
}

}  // namespace moxie::inline MOXIE_NAMESPACE

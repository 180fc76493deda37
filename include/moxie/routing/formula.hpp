// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/config.hpp>
#include <moxie/core/error.hpp>
#include <moxie/kernel/number.hpp>
#include <moxie/routing/config.hpp>

/// What routers compute of scores and weights, as functions of plain numbers for the host and the device.
namespace moxie::inline MOXIE_NAMESPACE::formula {

/// σ(z) e^max(0, -m), where m is the largest logit of those that are compared and s = σ(z): s itself for m >= 0. For m < 0 it
/// is e^(z-m) (1 - s), since σ(z) = e^z (1 - σ(z)). The factor is the same for all of them, so that ratios stay exact where
/// the scores are so small that they vanish.
template <class Scalar>
MOXIE_HOST_DEVICE Scalar scaled_sigmoid(Scalar z, Scalar s, Scalar largest) {
  return largest >= 0 ? s : kernel::exp(z - largest) * (1 - s);
}

/// What the scores of experts are divided by, so that they sum to 1.
template <class Scalar>
struct ShareSum {
  Scalar largest;  ///< logit
  Scalar sum;
};

/// A score relative to those of experts with the largest logit m: e^(z-m) of softmax scores, `scaled_sigmoid` of others.
template <class Scalar>
MOXIE_HOST_DEVICE Scalar relative_score(Score score, Scalar z, Scalar s, Scalar largest) {
  return score == Score::softmax ? kernel::exp(z - largest) : scaled_sigmoid(z, s, largest);
}

/// Of the K >= 1 chosen experts of a token with logits z and scores s.
template <class Scalar, class ExpertIndex>
MOXIE_HOST_DEVICE ShareSum<Scalar> share_sum(Score score, const Scalar* z, const Scalar* s, const ExpertIndex* chosen,
                                             Index k) {
  ShareSum<Scalar> all{z[chosen[0]], 0};
  for (Index j = 1; j < k; ++j) {
    all.largest = z[chosen[j]] > all.largest ? z[chosen[j]] : all.largest;
  }
  for (Index j = 0; j < k; ++j) {
    all.sum += relative_score(score, z[chosen[j]], s[chosen[j]], all.largest);
  }
  return all;
}

/// A normalized weight: the score over the sum of scores, from the logits. For softmax scores this is a softmax of the chosen
/// logits. Exactly 1 of one expert.
template <class Scalar>
MOXIE_HOST_DEVICE Scalar share(Score score, Scalar z, Scalar s, const ShareSum<Scalar>& all) {
  return relative_score(score, z, s, all.largest) / all.sum;
}

/// The adjoint of a softmax, for one element: dz = s (ds - Σ_i ds_i s_i).
template <class Scalar>
MOXIE_HOST_DEVICE Scalar softmax_slope(Scalar s, Scalar ds, Scalar dot) {
  return s * (ds - dot);
}

/// The adjoint of a share w, for one element: w (dw - Σ_i dw_i w_i), for sigmoid scores times 1 - s. Shares are a softmax of
/// the logits, or of ln σ(z), whose derivative is 1 - s.
template <class Scalar>
MOXIE_HOST_DEVICE Scalar share_slope(Score score, Scalar s, Scalar w, Scalar dw, Scalar dot) {
  return softmax_slope(w, dw, dot) * (score == Score::softmax ? Scalar(1) : 1 - s);
}

/// ∂σ/∂z = s (1 - s).
template <class Scalar>
MOXIE_HOST_DEVICE Scalar sigmoid_slope(Scalar s) {
  return s * (1 - s);
}

/// r = 1 / √(Σ v² + 1e-6): l2norm(v) = r v. NaN where the sum is not finite: such a norm is no number to divide by.
template <class Scalar>
MOXIE_HOST_DEVICE Scalar l2norm_factor(Scalar sum_of_squares) {
  const Scalar squares = sum_of_squares + Scalar(1e-6);
  return squares - squares == Scalar(0) ? Scalar(1) / std::sqrt(squares) : squares - squares;
}

/// Its adjoint, for one element of v̂ = r v: dv = r (dv̂ - ⟨dv̂, v̂⟩ v̂).
template <class Scalar>
MOXIE_HOST_DEVICE Scalar l2norm_slope(Scalar factor, Scalar hat, Scalar dhat, Scalar dot) {
  return factor * (dhat - dot * hat);
}

/// A factor of a gate's input, uniform on (1 - jitter, 1 + jitter), of u uniform on [0, 1).
MOXIE_HOST_DEVICE inline double jitter_factor(double jitter, double u) { return 1 + jitter * (2 * u - 1); }

}  // namespace moxie::inline MOXIE_NAMESPACE::formula

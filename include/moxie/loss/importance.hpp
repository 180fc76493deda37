// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/matrix.hpp>
#include <moxie/loss/config.hpp>
#include <moxie/loss/formula.hpp>
#include <span>

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

/// Mean and variance of the population of n numbers.
struct Moments {
  double mean = 0;
  double variance = 0;

  explicit Moments(std::span<const double> v) {
    const double n = double(v.size());
    for (const double x : v) {
      mean += x / n;
    }
    for (const double x : v) {
      variance += (x - mean) * (x - mean) / n;
    }
  }
};

}  // namespace detail

/// The squared coefficient of variation of n numbers, (deviation / mean)², with the population's deviation; 0 if all are zero.
inline double squared_variation(std::span<const double> v) {
  const detail::Moments m(v);
  return formula::squared_variation(m.mean, m.variance);
}

/// ∂/∂v_i = 2 / (n mean²) ((v_i - mean) - variance / mean), overwriting v.
inline void squared_variation_backward(std::span<double> v) {
  const detail::Moments m(v);
  for (double& x : v) {
    x = formula::squared_variation_slope(x, double(v.size()), m.mean, m.variance);
  }
}

/// The importance loss of a group of tokens: CV² of Σ_t p_ti over the experts i, `probabilities`
/// (n,E) without noise.
///
/// Shazeer et al. 2017, equation 7; V-MoE (Riquelme et al. 2021), appendix A.2. 0 for equal
/// importance, E - 1 if one expert has all of it. `scratch` holds E numbers; throws ShapeError if
/// it does not.
template <class Scalar>
double importance_loss(RowView<const Scalar> probabilities, std::span<double> scratch) {
  detail::expect_as_many("importance_loss", "scratch", scratch.size(), std::size_t(probabilities.cols()));
  std::fill(scratch.begin(), scratch.end(), 0.0);
  for (Index t = 0; t < probabilities.rows(); ++t) {
    for (Index i = 0; i < probabilities.cols(); ++i) {
      scratch[std::size_t(i)] += double(probabilities(t, i));
    }
  }
  return squared_variation(scratch);
}

/// Adds weight · ∂loss/∂p_ti to `dprobabilities` (n,E). Throws ShapeError for other sizes.
template <class Scalar>
void importance_loss_backward(RowView<const std::type_identity_t<Scalar>> probabilities, double weight,
                              RowView<Scalar> dprobabilities, std::span<double> scratch) {
  detail::expect_shape("importance_loss_backward", "dprobabilities", dprobabilities, probabilities.rows(),
                       probabilities.cols());
  importance_loss<Scalar>(probabilities, scratch);
  squared_variation_backward(scratch);
  for (Index t = 0; t < probabilities.rows(); ++t) {
    for (Index i = 0; i < probabilities.cols(); ++i) {
      dprobabilities(t, i) += Scalar(weight * scratch[std::size_t(i)]);
    }
  }
}

}  // namespace moxie::inline MOXIE_NAMESPACE

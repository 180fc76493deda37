// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>
#include <moxie/config.hpp>
#include <moxie/core/error.hpp>

/// What the balance losses are made of, as functions of plain numbers for the host and the device. The losses themselves, which
/// say where their equations come from, are in the other headers of this folder and in `cuda/balance.hpp`. All compute in
/// double, whatever the scores are.
namespace moxie::inline MOXIE_NAMESPACE::formula {

// Device code may read constants, and may not call the functions that they come from.
template <class T>
inline constexpr T smallest_number = (std::numeric_limits<T>::min)();

/// ln Σ_i exp z_i of n >= 1 logits, from the largest one.
template <class Scalar>
MOXIE_HOST_DEVICE double log_sum_exp(Index n, const Scalar* z) {
  double largest = double(z[0]);
  for (Index i = 1; i < n; ++i) {
    largest = double(z[i]) > largest ? double(z[i]) : largest;
  }
  double sum = 0;
  for (Index i = 0; i < n; ++i) {
    sum += std::exp(double(z[i]) - largest);
  }
  return largest + std::log(sum);
}

/// ∂/∂z_i of L², where L = ln Σ exp z: 2 L exp(z_i - L).
MOXIE_HOST_DEVICE inline double z_loss_slope(double z, double log_sum) { return 2 * log_sum * std::exp(z - log_sum); }

/// -p ln p, 0 for p = 0: what one probability adds to an entropy.
MOXIE_HOST_DEVICE inline double entropy_term(double p) { return p > 0 ? -p * std::log(p) : 0; }

/// Its derivative -(ln p + 1), with the logarithm of the smallest number of Scalar where p is smaller: it has no limit at 0.
template <class Scalar>
MOXIE_HOST_DEVICE double entropy_slope(double p) {
  const double least = double(smallest_number<Scalar>);
  return -(std::log(p > least ? p : least) + 1);
}

/// f = E count / (K T): how often an expert was chosen, 1 for an even load. `pairs` is K T, above 0.
MOXIE_HOST_DEVICE inline double frequency(double count, double experts, double pairs) { return experts * count / pairs; }

/// E / (K n²), the factor of Σ_i count_i Σ_t p_ti in a loss over n tokens of a sequence.
MOXIE_HOST_DEVICE inline double sequence_factor(double experts, double k, double tokens) {
  return experts / (k * tokens * tokens);
}

/// The squared coefficient of variation, from mean and variance: variance / mean²; 0 if all numbers are 0.
MOXIE_HOST_DEVICE inline double squared_variation(double mean, double variance) {
  return mean == 0 ? 0 : variance / (mean * mean);
}

/// Its derivative with respect to one number v of n: 2 / (n mean²) ((v - mean) - variance / mean).
MOXIE_HOST_DEVICE inline double squared_variation_slope(double v, double n, double mean, double variance) {
  return mean == 0 ? 0 : 2 / (n * mean * mean) * ((v - mean) - variance / mean);
}

/// Φ(u): the probability that fresh noise chooses an expert again, whose logit is u deviations above the threshold.
MOXIE_HOST_DEVICE inline double normal_distribution(double u) { return 0.5 * std::erfc(-u * 0.70710678118654752440); }

/// φ(u), its derivative.
MOXIE_HOST_DEVICE inline double normal_density(double u) { return 0.39894228040143267794 * std::exp(-0.5 * u * u); }

/// sign(mean load - load): the direction in which the selection bias of an expert moves. `total` is the load of all E experts.
template <class Count>
MOXIE_HOST_DEVICE double load_direction(Count load, Count total, Count experts) {
  const Count missing = total - load * experts;  // of integers: exact
  return double((missing > 0) - (missing < 0));
}

}  // namespace moxie::inline MOXIE_NAMESPACE::formula

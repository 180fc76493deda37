// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <moxie/core/matrix.hpp>

namespace moxie {

/// Weights of the balance losses of a layer; 0 switches one off.
struct Balance {
  double expert_level = 0;    ///< over all tokens of the batch (DiT-MoE, DeepSeekMoE, Switch with top-1)
  double sequence_level = 0;  ///< the same in every sequence, then the mean over sequences
};

/// The balance loss of B groups of n = T / B consecutive tokens (one group: expert level; a group a sequence: sequence level).
///
///     f_bi = E / (K n) · #{t in b : i chosen},   P_bi = 1/n Σ_{t in b} s_ti,   loss = 1/B Σ_b Σ_i f_bi P_bi
///
/// DeepSeekMoE (Dai et al. 2024), equations 12 to 14; DiT-MoE's MoEGate. It is 1 for uniform scores or balanced counts.
/// `scores` (T,E) are probabilities of each token over all experts, `counts` (B,E) integers. Summed in double, in order of
/// tokens. 0 for an empty batch.
template <class Scalar>
double balance_loss(RowView<const Scalar> scores, RowView<const std::int64_t> counts, Index top_k) {
  const Index groups = counts.rows();
  const Index experts = counts.cols();
  if (scores.rows() == 0) {
    return 0;
  }
  const Index n = scores.rows() / groups;
  double loss = 0;
  for (Index b = 0; b < groups; ++b) {
    double group = 0;
    for (Index i = 0; i < experts; ++i) {
      if (counts(b, i) == 0) {
        continue;
      }
      double sum = 0;
      for (Index t = b * n; t < (b + 1) * n; ++t) {
        sum += double(scores(t, i));
      }
      group += double(counts(b, i)) * sum;
    }
    loss += group;
  }
  return loss * double(experts) / (double(top_k) * double(n) * double(n) * double(groups));
}

/// Adds weight · ∂loss/∂s_ti = weight · f_bi / (B n) to `dscores` (T,E); counts are constants.
template <class Scalar>
void balance_loss_backward(RowView<const std::int64_t> counts, Index top_k, double weight, RowView<Scalar> dscores) {
  const Index groups = counts.rows();
  const Index experts = counts.cols();
  if (dscores.rows() == 0) {
    return;
  }
  const Index n = dscores.rows() / groups;
  const double factor = weight * double(experts) / (double(top_k) * double(n) * double(n) * double(groups));
  for (Index t = 0; t < dscores.rows(); ++t) {
    for (Index i = 0; i < experts; ++i) {
      dscores(t, i) += static_cast<Scalar>(factor * double(counts(t / n, i)));
    }
  }
}

}  // namespace moxie

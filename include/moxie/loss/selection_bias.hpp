// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <moxie/core/matrix.hpp>
#include <moxie/loss/config.hpp>
#include <moxie/loss/formula.hpp>
#include <span>

namespace moxie::inline MOXIE_NAMESPACE {

/// Balance without a loss: after an optimizer step, experts with less than the mean load become easier to choose.
///
///     b_i += γ sign(mean load - load_i),   recentred: then b_i -= mean b
///
/// Wang et al. 2024, Algorithm 1; DeepSeek-V3, section 2.1.2 (γ = 0.001). `bias` is the router's parameter
/// `gate.e_score_correction_bias` (E), `load` how often each expert was chosen in the step, over all of its micro-batches:
/// `tokens_per_expert` of the plan, or with a capacity `times_chosen` of the router's tape, which counts dropped pairs too. The
/// signs are exact: integers are compared. Throws ShapeError if the sizes differ.
template <class Scalar>
void update_selection_bias(RowView<Scalar> bias, std::span<const std::int64_t> load, double rate, bool recentre = false) {
  detail::expect_shape("update_selection_bias", "bias", bias, 1, Index(load.size()));
  detail::expect_value(std::isfinite(rate), "update_selection_bias", "the rate is not finite");
  detail::expect_in_scalar<Scalar>("update_selection_bias", "the rate", rate);
  std::int64_t total = 0;
  for (const std::int64_t n : load) {
    total += n;
  }
  for (std::size_t i = 0; i < load.size(); ++i) {
    bias(0, Index(i)) += Scalar(rate * formula::load_direction(load[i], total, std::int64_t(load.size())));
  }
  if (recentre) {
    double mean = 0;
    for (Index i = 0; i < bias.cols(); ++i) {
      mean += double(bias(0, i)) / double(bias.cols());
    }
    for (Index i = 0; i < bias.cols(); ++i) {
      bias(0, i) -= Scalar(mean);
    }
  }
}

}  // namespace moxie::inline MOXIE_NAMESPACE

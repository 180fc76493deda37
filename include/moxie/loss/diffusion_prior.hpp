// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <moxie/core/linear_sum_assignment.hpp>
#include <moxie/loss/config.hpp>
#include <span>
#include <vector>

/// The diffusion prior of Switch-DiT (Park et al. 2024, "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse
/// Mixture-of-Experts"): neighbouring timesteps should share experts, distant ones should not. A *unit* is an expert of a
/// block; a model of `blocks` blocks with E experts each has n = blocks·E, block after block. The prior says which of n units a
/// timestep is meant to use, as the masks of DTR do for channels (Park et al. 2024, "Denoising Task Routing for Diffusion
/// Models"). Which unit plays which part is not given but matched, so that any order of experts may emerge:
///
///     const auto mapping = unit_mapping(timesteps, n, double(K) / E);     once
///     mark_chosen_units(tape.choices(), E, l * E, chosen);                all timesteps, every block l
///     const auto pair = match_units(chosen, mapping);                     when the choices have changed
///     diffusion_prior_loss<float>(probabilities, timestep, {blocks, mapping, pair.column})
namespace moxie::inline MOXIE_NAMESPACE {

/// The prior (timesteps, n), 1 where a timestep uses a unit and 0 elsewhere: a window of `filled` units that moves from the
/// first ones at timestep 0 to the last ones at timestep T - 1, slowly at first.
///
///     filled = ⌊n share⌋,   s_i = round((i / (T-1))^exponent (n - filled)),   row i is 1 in [s_i, s_i + filled)
///
/// `share` is the part of its units that a timestep uses, K/E in Switch-DiT. As the reference does, n·share is truncated as the
/// floating-point number that it is (90 · 0.7 is 62.99..., so 62), i / (T-1) is i times the rounded 1 / (T-1), and halves go to
/// the even integer. A single timestep uses the first units.
///
/// Throws ValueError for sizes below 1, a share that is not in (0, 1] or leaves a timestep without units, and an exponent that
/// is not positive and finite.
inline Matrix<std::uint8_t> unit_mapping(Index timesteps, Index units, double share, double exponent = 4) {
  constexpr std::string_view where = "unit_mapping";
  detail::expect_at_least(where, "timesteps", timesteps, 1);
  detail::expect_at_least(where, "units", units, 1);
  detail::expect_value(share > 0 && share <= 1, where, "share must be above 0 and at most 1");
  detail::expect_value(exponent > 0 && std::isfinite(exponent), where, "exponent must be positive and finite");
  const auto filled = Index(double(units) * share);
  detail::expect_value(filled >= 1, where, "share times units is below 1: no timestep would use any unit");
  Matrix<std::uint8_t> mapping(timesteps, units);
  std::fill_n(mapping.data(), timesteps * units, std::uint8_t{0});
  const double step = timesteps > 1 ? 1 / double(timesteps - 1) : 0;
  for (Index i = 0; i < timesteps; ++i) {
    const double place = i > 0 && i == timesteps - 1 ? 1 : double(i) * step;
    const auto start = Index(std::nearbyint(std::pow(place, exponent) * double(units - filled)));
    std::fill_n(mapping.data() + i * units + start, filled, std::uint8_t{1});
  }
  return mapping;
}

/// Writes the choices of one block into `chosen` (timesteps, n): 1 in the columns of the K experts that each timestep chose, 0
/// in those of the block's other experts, which are columns [first_unit, first_unit + experts).
///
/// `choices` holds timesteps·K experts, as `TimestepRouter::Tape::choices()` has them after routing one sequence for each
/// timestep. Throws ShapeError if there are not K >= 1 choices for each row of `chosen` or it lacks these columns, ValueError
/// for an expert that the block has not.
inline void mark_chosen_units(std::span<const Index> choices, Index experts, Index first_unit, RowView<std::uint8_t> chosen) {
  const std::string where = "mark_chosen_units";
  const Index timesteps = chosen.rows();
  const Index k = timesteps == 0 ? 0 : Index(choices.size()) / timesteps;
  if (k < 1 || k * timesteps != Index(choices.size())) {
    throw ShapeError(where + ": there are " + std::to_string(choices.size()) + " choices for " + std::to_string(timesteps) +
                     " timesteps, expected as many for each");
  }
  if (experts < 1 || first_unit < 0 || first_unit + experts > chosen.cols()) {
    throw ShapeError(where + ": units " + std::to_string(first_unit) + " to " + std::to_string(first_unit + experts) +
                     " are not among the " + std::to_string(chosen.cols()) + " columns of chosen");
  }
  for (const Index e : choices) {
    if (e < 0 || e >= experts) {
      throw ValueError(where + ": expert " + std::to_string(e) + " was chosen, expected one of " + std::to_string(experts));
    }
  }
  for (Index t = 0; t < timesteps; ++t) {
    std::fill_n(chosen.row(t) + first_unit, experts, std::uint8_t{0});
    for (Index j = 0; j < k; ++j) {
      chosen(t, first_unit + choices[std::size_t(t * k + j)]) = 1;
    }
  }
}

/// How badly unit g of the model plays the part of unit p of the prior, (n,n): the number of timesteps in which one is used and
/// the other is not,
///
///     cost_gp = Σ_t |chosen_tg - mapping_tp|
///
/// of two matrices (timesteps, n) of 0 and 1. Throws ShapeError if they differ in shape, ValueError if they are empty or hold
/// another number. Cost: O(timesteps · n²).
inline Matrix<double> unit_costs(RowView<const std::uint8_t> chosen, RowView<const std::uint8_t> mapping) {
  constexpr std::string_view where = "unit_costs";
  detail::expect_at_least(where, "timesteps", mapping.rows(), 1);
  detail::expect_at_least(where, "units", mapping.cols(), 1);
  detail::expect_shape(where, "chosen", chosen, mapping.rows(), mapping.cols());
  const Index units = mapping.cols();
  for (Index t = 0; t < mapping.rows(); ++t) {
    const bool marks = *std::max_element(chosen.row(t), chosen.row(t) + units) <= 1 &&
                       *std::max_element(mapping.row(t), mapping.row(t) + units) <= 1;
    detail::expect_value(marks, where, "chosen and mapping must be 0 and 1");
  }
  Matrix<double> cost(units, units);
  std::fill_n(cost.data(), units * units, 0.0);
  for (Index t = 0; t < mapping.rows(); ++t) {
    for (Index g = 0; g < units; ++g) {
      for (Index p = 0; p < units; ++p) {
        cost(g, p) += chosen(t, g) != mapping(t, p) ? 1 : 0;
      }
    }
  }
  return cost;
}

/// The matching of least `unit_costs`: `column[g]` is the unit of the prior whose part unit g of the model plays.
///
/// Usually many matchings have this cost, since units that are used at the same timesteps may be swapped, and the loss differs
/// between them. Here the lexicographically smallest is taken (`linear_sum_assignment`); the reference draws one, by permuting
/// units at random at every step. Throws what `unit_costs` throws. Cost: O(timesteps · n² + n³).
inline LinearSumAssignment match_units(RowView<const std::uint8_t> chosen, RowView<const std::uint8_t> mapping) {
  return linear_sum_assignment(unit_costs(chosen, mapping));
}

/// What `diffusion_prior_loss` compares with. A view: mapping and matching stay the caller's.
struct DiffusionPrior {
  Index blocks = 1;                           ///< whose experts the n units are: each sample's probabilities sum to that
  RowView<const std::uint8_t> mapping = {};   ///< (timesteps, n): `unit_mapping`
  std::span<const Index> prior_of_unit = {};  ///< n: `match_units(...).column`, a permutation
  double epsilon = 1e-6;                      ///< inside the logarithms
};

namespace detail {

template <class Scalar>
void expect_diffusion_prior(std::string_view where, RowView<const Scalar> probabilities, std::span<const Index> timestep,
                            const DiffusionPrior& prior) {
  const Index units = prior.mapping.cols();
  expect_at_least(where, "units", units, 1);
  expect_at_least(where, "timesteps", prior.mapping.rows(), 1);
  expect_at_least(where, "samples", probabilities.rows(), 1);
  expect_shape(where, "probabilities", probabilities, -1, units, "B");
  if (Index(timestep.size()) != probabilities.rows() || Index(prior.prior_of_unit.size()) != units) {
    throw ShapeError(std::string(where) + ": there are " + std::to_string(timestep.size()) + " timesteps and " +
                     std::to_string(prior.prior_of_unit.size()) + " matched units, expected " +
                     std::to_string(probabilities.rows()) + " and " + std::to_string(units));
  }
  expect_at_least(where, "blocks", prior.blocks, 1);
  expect_value(units % prior.blocks == 0, where, "blocks must divide the number of units");
  expect_value(prior.epsilon > 0 && std::isfinite(prior.epsilon), where, "epsilon must be positive and finite");
  expect_in_scalar<double>(where, "epsilon", prior.epsilon);
  std::vector<std::uint8_t> taken(std::size_t(units), std::uint8_t{0});
  for (const Index p : prior.prior_of_unit) {
    if (p < 0 || p >= units || taken[std::size_t(p)]++ != 0) {
      throw ValueError(std::string(where) + ": prior_of_unit is not a permutation of the " + std::to_string(units) + " units");
    }
  }
  for (Index b = 0; b < probabilities.rows(); ++b) {
    const Index t = timestep[std::size_t(b)];
    if (t < 0 || t >= prior.mapping.rows()) {
      throw ValueError(std::string(where) + ": the timestep of sample " + std::to_string(b) + " is " + std::to_string(t) +
                       ", expected 0 to " + std::to_string(prior.mapping.rows() - 1));
    }
    const std::uint8_t* row = prior.mapping.row(t);
    if (*std::max_element(row, row + units) != 1) {
      throw ValueError(std::string(where) + ": the mapping of timestep " + std::to_string(t) + " is not 0 and 1, with a 1");
    }
    for (Index g = 0; g < units; ++g) {
      if (!(std::isfinite(probabilities(b, g)) && probabilities(b, g) >= 0)) {
        throw ValueError(std::string(where) + ": the probabilities of sample " + std::to_string(b) +
                         " are negative or not finite");
      }
    }
  }
}

/// Calls `f(b, g, p, q)` for every sample b and unit g, with the two distributions that are compared.
template <class Scalar, class F>
void for_each_unit(RowView<const Scalar> probabilities, std::span<const Index> timestep, const DiffusionPrior& prior, F&& f) {
  const double blocks = double(prior.blocks);
  for (Index b = 0; b < probabilities.rows(); ++b) {
    const std::uint8_t* row = prior.mapping.row(timestep[std::size_t(b)]);
    const double each = 1 / double(std::count(row, row + probabilities.cols(), std::uint8_t{1}));
    for (Index g = 0; g < probabilities.cols(); ++g) {
      const double q = row[prior.prior_of_unit[std::size_t(g)]] != 0 ? each : 0.0;
      f(b, g, double(probabilities(b, g)) / blocks, q);
    }
  }
}

}  // namespace detail

/// The Jensen-Shannon divergence between what the gates say and what the prior of the sample's timestep says, in nats, and its
/// mean over the samples:
///
///     p = probabilities_b / blocks,   q_g = mapping(t_b, pair_g) / Σ mapping(t_b),   m = (p + q) / 2
///     loss = mean_b 1/2 Σ_g [p (ln(p+ε) - ln(m+ε)) + q (ln(q+ε) - ln(m+ε))]
///
/// Switch-DiT's diffusion prior loss, with the ε of its code. `probabilities` (B,n): of each sample, the softmax scores of all
/// blocks' gates side by side, all experts' and not only the chosen ones' (`TimestepRouter::Tape::scores()`); `timestep` B rows
/// of the mapping. 0 for p = q, ln 2 for distributions without a common unit, up to ε. A sum over b with the denominator B: of
/// micro-batches, weigh each with its part of the samples.
///
/// Throws ShapeError for sizes that do not fit, ValueError for an empty batch, a timestep out of range, a matching that is not
/// a permutation, a mapping that is not 0 and 1 or has no 1 at a timestep, probabilities that are negative or not finite, and
/// options out of range. Computed in double, samples and units in order. Cost: O(B n), with 3 logarithms an element. Backward:
/// `diffusion_prior_loss_backward`.
template <class Scalar>
double diffusion_prior_loss(RowView<const Scalar> probabilities, std::span<const Index> timestep, const DiffusionPrior& prior) {
  detail::expect_diffusion_prior("diffusion_prior_loss", probabilities, timestep, prior);
  const double epsilon = prior.epsilon;
  double sum = 0;
  detail::for_each_unit(probabilities, timestep, prior, [&](Index, Index, double p, double q) {
    const double mean = std::log((p + q) / 2 + epsilon);
    sum += p * (std::log(p + epsilon) - mean) + q * (std::log(q + epsilon) - mean);
  });
  return sum / (2 * double(probabilities.rows()));
}

/// Adds weight · ∂loss/∂probabilities to `dprobabilities` (B,n):
///
///     ∂loss/∂p_g = 1/2B [ln(p+ε) - ln(m+ε) + p/(p+ε) - m/(m+ε)],   the last two together ε (p - m) / ((p+ε) (m+ε))
///
/// and ∂p/∂probability = 1/blocks. Mapping and matching are constants. Columns [lE, (l+1)E) are what block l takes in
/// `TimestepRouter::Tape::add_score_gradient`. Throws what the loss throws, and ShapeError for another shape of
/// `dprobabilities`, before anything is written.
template <class Scalar>
void diffusion_prior_loss_backward(RowView<const std::type_identity_t<Scalar>> probabilities, std::span<const Index> timestep,
                                   const DiffusionPrior& prior, double weight, RowView<Scalar> dprobabilities) {
  constexpr std::string_view where = "diffusion_prior_loss_backward";
  detail::expect_diffusion_prior<Scalar>(where, probabilities, timestep, prior);
  detail::expect_shape(where, "dprobabilities", dprobabilities, probabilities.rows(), probabilities.cols());
  const double epsilon = prior.epsilon;
  const double factor = weight / (2 * double(probabilities.rows()) * double(prior.blocks));
  detail::for_each_unit<Scalar>(probabilities, timestep, prior, [&](Index b, Index g, double p, double q) {
    const double m = (p + q) / 2;
    const double rest = epsilon * (p - m) / ((p + epsilon) * (m + epsilon));
    dprobabilities(b, g) += Scalar(factor * (std::log(p + epsilon) - std::log(m + epsilon) + rest));
  });
}

}  // namespace moxie::inline MOXIE_NAMESPACE

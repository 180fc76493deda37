// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>
#include <moxie/core/error.hpp>
#include <type_traits>

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

/// Throws ShapeError unless there are as many.
inline void expect_as_many(std::string_view where, std::string_view name, std::size_t size, std::size_t expected) {
  if (size != expected) {
    throw ShapeError(std::string(where) + ": " + std::string(name) + " has " + std::to_string(size) + " elements, expected " +
                     std::to_string(expected));
  }
}

/// Throws ValueError unless an option is 0, or as large as an ordinary number of the scalar that computes with it: between the
/// square roots of the smallest and the largest one. Then products of two options neither vanish nor become infinite.
template <class Scalar>
void expect_in_scalar(std::string_view where, std::string_view name, double value) {
  using Limits = std::numeric_limits<Scalar>;
  const double size = (std::abs)(value);
  if (size == 0 || (size >= std::sqrt(double((Limits::min)())) && size <= std::sqrt(double((Limits::max)())))) {
    return;
  }
  const std::string range = std::is_same_v<Scalar, float> ? "float (1.1e-19 to 1.8e19)" : "double (1.5e-154 to 1.3e154)";
  throw ValueError(std::string(where) + ": " + std::string(name) + " is too small, too large or not finite for " + range);
}

}  // namespace detail

/// Weights of the balance losses of a router; 0 switches one off, any combine: `{.expert_level = 0.01, .z = 1e-3}`.
///
/// s are the probabilities of a token (softmax scores, or sigmoid scores divided by their sum), f_i = E/(K T) · #{t : i chosen}
/// and P_i = mean_t s_ti. Tokens and sequences are those that are not masked; sequences without tokens do not count.
struct Balance {
  double expert_level = 0;    ///< Σ_i f_i P_i over the batch (DeepSeekMoE eq. 12 to 14, DiT-MoE, Switch with K = 1)
  double sequence_level = 0;  ///< the same in every sequence, then the mean over sequences
  double device_level = 0;    ///< Σ_d mean_{i in d} f_i · Σ_{i in d} P_i (DeepSeekMoE eq. 15 to 17)
  double gshard = 0;          ///< Σ_i f_i P_i of first choices only (K = 1), in every sequence (GShard, vmoe)
  double importance = 0;      ///< `importance_loss`, without noise, in every sequence
  double load = 0;            ///< `load_loss` in every sequence; only in training with noise on the logits
  double z = 0;               ///< mean over tokens of `z_loss`, without noise
  double mean_entropy = 0;    ///< -H(mean_t s_t): the batch uses all experts (LIMoE's global loss)
  double token_entropy = 0;   ///< mean_t H(s_t): each token is certain of its expert (LIMoE's local loss)
  Index devices = 1;          ///< device_level: equal groups of consecutive experts
  /// f counts the K best scores, as the papers' formula says; true: the experts that were chosen, which are others under a
  /// selection bias or a limit on groups. Without these there is no difference.
  bool count_chosen = false;

  bool any() const { return z > 0 || load > 0 || of_probabilities(); }
  bool of_probabilities() const {
    return expert_level > 0 || sequence_level > 0 || device_level > 0 || gshard > 0 || importance > 0 || mean_entropy > 0 ||
           token_entropy > 0;
  }
  /// All losses times a factor.
  Balance times(double factor) const {
    Balance out = *this;
    for (double* w : {&out.expert_level, &out.sequence_level, &out.device_level, &out.gshard, &out.importance, &out.load,
                      &out.z, &out.mean_entropy, &out.token_entropy}) {
      *w *= factor;
    }
    return out;
  }
  /// Throws ValueError for a weight that is negative, NaN, or no ordinary number of `Scalar`, and devices that do not divide
  /// the experts.
  template <class Scalar = double>
  void expect_valid(std::string_view where, Index experts) const {
    for (const double w :
         {expert_level, sequence_level, device_level, gshard, importance, load, z, mean_entropy, token_entropy}) {
      detail::expect_value(std::isfinite(w) && w >= 0, where, "balance weights must not be negative, infinite or NaN");
      detail::expect_in_scalar<Scalar>(where, "a balance weight", w);
    }
    detail::expect_value(devices >= 1 && experts % devices == 0, where, "balance.devices must divide the number of experts");
  }
};

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <moxie/core/sequences.hpp>
#include <moxie/core/wide_sum.hpp>
#include <moxie/core/workspace.hpp>
#include <moxie/loss/config.hpp>
#include <moxie/loss/entropy.hpp>
#include <moxie/loss/formula.hpp>
#include <moxie/loss/importance.hpp>
#include <moxie/loss/load.hpp>
#include <moxie/loss/z.hpp>
#include <span>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// What the losses of a batch are made of: sums and counts, no means, so that those of micro-batches add up to those of the
/// whole batch, and the loss of the sum is the loss of the whole. Counts are exact, sums are `WideSum`s.
struct BalanceTotals {
  std::int64_t tokens = 0;
  std::int64_t pairs = 0;                            ///< T·K
  std::int64_t sequences = 0;                        ///< that have tokens
  std::vector<std::int64_t> counts;                  ///< E: how often each expert was chosen
  std::vector<WideSum> scores;                       ///< E: Σ_t s_ti
  WideSum sequence_level, gshard, importance, load;  ///< Σ over sequences
  WideSum z, token_entropy;                          ///< Σ over tokens

  void clear(Index experts) {
    std::vector<std::int64_t> kept_counts = std::move(counts);  // their memory
    std::vector<WideSum> kept_scores = std::move(scores);
    *this = {};
    counts = std::move(kept_counts);
    scores = std::move(kept_scores);
    counts.assign(std::size_t(experts), 0);
    scores.assign(std::size_t(experts), {});
  }

  /// Adds the totals of another micro-batch. Throws ShapeError for another number of experts.
  BalanceTotals& operator+=(const BalanceTotals& other) {
    if (other.counts.empty()) {
      return *this;
    }
    if (counts.empty()) {
      return *this = other;
    }
    if (counts.size() != other.counts.size()) {
      throw ShapeError("BalanceTotals: totals of " + std::to_string(other.counts.size()) + " experts, expected " +
                       std::to_string(counts.size()));
    }
    tokens += other.tokens;
    pairs += other.pairs;
    sequences += other.sequences;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      counts[i] += other.counts[i];
      scores[i] += other.scores[i];
    }
    sequence_level += other.sequence_level;
    gshard += other.gshard;
    importance += other.importance;
    load += other.load;
    z += other.z;
    token_entropy += other.token_entropy;
    return *this;
  }

  /// f_i, 0 for no tokens.
  double frequency(std::size_t expert) const {
    return pairs == 0 ? 0 : formula::frequency(double(counts[expert]), double(counts.size()), double(pairs));
  }
  /// Calls `f(i, mean f over the experts of i's device)` for every expert i.
  template <class F>
  void for_each_device_frequency(Index devices, F&& f) const {
    const std::size_t size = counts.size() / std::size_t(devices);
    for (std::size_t first = 0; first < counts.size(); first += size) {
      double sum = 0;
      for (std::size_t i = first; i < first + size; ++i) {
        sum += frequency(i);
      }
      for (std::size_t i = first; i < first + size; ++i) {
        f(i, sum / double(size));
      }
    }
  }
  /// P_i, 0 for no tokens.
  double probability(std::size_t expert) const { return tokens == 0 ? 0 : scores[expert].value() / double(tokens); }

  /// The weighted sum of all losses.
  double loss(const Balance& weights) const {
    if (tokens == 0) {
      return 0;
    }
    const double n = double(tokens);
    const double b = double(sequences);
    double expert_level = 0;
    double device_level = 0;
    double mean_entropy = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      const double p = probability(i);
      expert_level += frequency(i) * p;
      mean_entropy += formula::entropy_term(p);
    }
    if (weights.device_level > 0) {
      for_each_device_frequency(weights.devices, [&](std::size_t i, double f) { device_level += f * probability(i); });
    }
    return weights.expert_level * expert_level + weights.device_level * device_level +
           (weights.sequence_level * sequence_level.value() + weights.gshard * gshard.value() +
            weights.importance * importance.value() + weights.load * load.value()) /
               b +
           (weights.z * z.value() + weights.token_entropy * token_entropy.value()) / n - weights.mean_entropy * mean_entropy;
  }
};

/// What the balance losses look at, of T tokens.
template <class Scalar>
struct BalanceInput {
  Sequences sequences;
  Index top_k = 1;
  RowView<const Scalar> probabilities;        ///< (T,E) of the logits that select; needed if `Balance::of_probabilities()`
  RowView<const Scalar> clean_probabilities;  ///< (T,E) of the logits without noise
  RowView<const Scalar> logits;               ///< (T,E) without noise
  RowView<const Scalar> noisy_logits;         ///< (T,E) that select
  std::span<const Index> best;                ///< T·K: the K largest noisy logits of each token, in decreasing order
  std::span<const Index> counted;             ///< T·K: what f counts; -1 is no choice
  double deviation = 0;                       ///< of the noise on a logit; 0: none, and no load loss
};

/// Where their gradient goes: added to each, all (T,E).
template <class Scalar>
struct BalanceGradient {
  RowView<Scalar> probabilities;
  RowView<Scalar> clean_probabilities;
  RowView<Scalar> logits;
  RowView<Scalar> noisy_logits;
};

namespace detail {

/// E/(K n²) Σ_i count_i Σ_t p_ti of the tokens [begin, end), and with `weight` its gradient instead: dp_ti += weight E/(K n²)
/// count_i. Counts every `stride`-th of the chosen from the first, `k` a token.
template <class Scalar>
struct FrequencyLoss {
  RowView<const Scalar> probabilities;
  std::span<const Index> chosen;
  Index k;       // counted choices of a token
  Index stride;  // choices of a token

  void count(Index begin, Index end, RowView<double> counts) const {
    std::fill_n(counts.row(0), counts.cols(), 0.0);
    for (Index t = begin; t < end; ++t) {
      for (Index j = 0; j < k; ++j) {
        if (const Index e = chosen[std::size_t(t * stride + j)]; e >= 0) {
          counts(0, e) += 1;
        }
      }
    }
  }
  double value(Index begin, Index end, RowView<double> counts) const {
    count(begin, end, counts);
    double sum = 0;
    for (Index t = begin; t < end; ++t) {
      for (Index i = 0; i < counts.cols(); ++i) {
        sum += counts(0, i) * double(probabilities(t, i));
      }
    }
    return sum * factor(begin, end, counts);
  }
  void add_gradient(Index begin, Index end, double weight, RowView<Scalar> dp, RowView<double> counts) const {
    count(begin, end, counts);
    for (Index t = begin; t < end; ++t) {
      for (Index i = 0; i < counts.cols(); ++i) {
        dp(t, i) += Scalar(weight * factor(begin, end, counts) * counts(0, i));
      }
    }
  }
  double factor(Index begin, Index end, RowView<double> counts) const {
    const double n = double(end - begin);
    return formula::sequence_factor(double(counts.cols()), double(k), n);
  }
};

template <class Scalar>
FrequencyLoss<Scalar> sequence_level_loss(const BalanceInput<Scalar>& in) {
  return {in.probabilities, in.counted, in.top_k, in.top_k};
}
template <class Scalar>
FrequencyLoss<Scalar> gshard_loss(const BalanceInput<Scalar>& in) {
  return {in.probabilities, in.best, 1, in.top_k};
}

/// θ_t of the tokens [begin, end): the K-th largest noisy logit.
template <class Scalar>
RowView<Scalar> thresholds(const BalanceInput<Scalar>& in, Index begin, Index end, Workspace& workspace) {
  const RowView<Scalar> threshold = workspace.matrix<Scalar>(1, end - begin);
  for (Index t = begin; t < end; ++t) {
    threshold(0, t - begin) = in.noisy_logits(t, in.best[std::size_t((t + 1) * in.top_k - 1)]);
  }
  return threshold;
}

template <class T>
std::span<T> row_span(RowView<T> m, Index row = 0) {
  return {m.row(row), std::size_t(m.cols())};
}

}  // namespace detail

namespace detail {

/// Throws ShapeError unless everything that the losses read has the size of the batch, ValueError for a choice that is no
/// expert; -1, no choice, is not counted.
template <class Scalar>
void expect_balance_input(std::string_view where, const Balance& weights, const BalanceInput<Scalar>& in, Index experts) {
  const Index tokens = in.sequences.tokens();
  expect_at_least(where, "top_k", in.top_k, 1);
  const auto expect_matrix = [&](bool read, std::string_view name, const RowView<const Scalar>& m) {
    if (read) {
      expect_shape(where, name, m, tokens, experts);
    }
  };
  const bool load = weights.load > 0 && in.deviation > 0;
  expect_matrix(weights.of_probabilities(), "probabilities", in.probabilities);
  expect_matrix(weights.importance > 0, "clean_probabilities", in.clean_probabilities);
  expect_matrix(weights.z > 0 || load, "logits", in.logits);
  expect_matrix(load, "noisy_logits", in.noisy_logits);
  const auto pairs = std::size_t(tokens * in.top_k);
  expect_as_many(where, "counted", in.counted.size(), pairs);
  if (weights.gshard > 0 || load) {
    expect_as_many(where, "best", in.best.size(), pairs);
  }
  for (const Index e : in.best) {
    expect_value(e >= 0 && e < experts, where, "a choice is not one of the experts");
  }
  for (const Index e : in.counted) {
    expect_value(e >= -1 && e < experts, where, "a counted choice is not one of the experts");
  }
}

}  // namespace detail

/// Adds the totals of a batch. O(T (E + K)) for each loss that is on, in order of tokens.
///
/// Throws ShapeError for sizes that do not fit the tokens and experts, and totals of other experts.
template <class Scalar>
void add_balance_totals(const Balance& weights, const BalanceInput<Scalar>& in, Index experts, BalanceTotals& totals,
                        Workspace& workspace) {
  constexpr std::string_view where = "add_balance_totals";
  detail::expect_balance_input(where, weights, in, experts);
  detail::expect_as_many(where, "counts", totals.counts.size(), std::size_t(experts));
  const Workspace::Frame frame(workspace);
  const RowView<double> scratch = workspace.matrix<double>(1, experts);
  totals.tokens += in.sequences.tokens();
  totals.pairs += in.sequences.tokens() * in.top_k;
  totals.sequences += in.sequences.nonempty();
  for (const Index e : in.counted) {
    if (e >= 0) {
      ++totals.counts[std::size_t(e)];
    }
  }
  const bool sums = weights.expert_level > 0 || weights.device_level > 0 || weights.mean_entropy > 0;
  for (Index t = 0; t < in.sequences.tokens(); ++t) {
    for (Index i = 0; sums && i < experts; ++i) {
      totals.scores[std::size_t(i)] += double(in.probabilities(t, i));
    }
    if (weights.z > 0) {
      totals.z += z_loss(detail::row_span(in.logits, t));
    }
    if (weights.token_entropy > 0) {
      totals.token_entropy += entropy(detail::row_span(in.probabilities, t));
    }
  }
  in.sequences.for_each([&](Index, Index begin, Index end) {
    if (begin == end) {
      return;
    }
    const Workspace::Frame sequence_frame(workspace);
    if (weights.sequence_level > 0) {
      totals.sequence_level += detail::sequence_level_loss(in).value(begin, end, scratch);
    }
    if (weights.gshard > 0) {
      totals.gshard += detail::gshard_loss(in).value(begin, end, scratch);
    }
    if (weights.importance > 0) {
      totals.importance +=
          importance_loss<Scalar>(in.clean_probabilities.middle_rows(begin, end - begin), detail::row_span(scratch));
    }
    if (weights.load > 0 && in.deviation > 0) {
      const RowView<const Scalar> threshold = detail::thresholds(in, begin, end, workspace);
      totals.load += load_loss<Scalar>(in.logits.middle_rows(begin, end - begin), detail::row_span(threshold), in.deviation,
                                       detail::row_span(scratch));
    }
  });
}

namespace detail {

/// ∂/∂s_ti of the losses of the whole batch, which is the same for every t, of every expert i.
inline void batch_gradient(const Balance& weights, const BalanceTotals& totals, RowView<double> of_batch) {
  const double n = double(totals.tokens);
  for (Index i = 0; i < of_batch.cols(); ++i) {
    const auto e = std::size_t(i);
    const double p = totals.probability(e);
    of_batch(0, i) = weights.expert_level * totals.frequency(e) / n;
    if (weights.mean_entropy > 0) {
      of_batch(0, i) -= weights.mean_entropy * formula::entropy_slope<double>(p) / n;
    }
  }
  if (weights.device_level > 0) {
    totals.for_each_device_frequency(weights.devices,
                                     [&](std::size_t i, double f) { of_batch(0, Index(i)) += weights.device_level * f / n; });
  }
}

}  // namespace detail

/// Adds the gradient of `totals.loss(weights)` with respect to what this batch put into the totals; counts are constants. The
/// totals may be those of several micro-batches: each then gets its part of the gradient of the whole.
///
/// Throws ShapeError for sizes that do not fit the tokens and the experts of the totals.
template <class Scalar>
void balance_backward(const Balance& weights, const BalanceInput<Scalar>& in, const BalanceTotals& totals,
                      const BalanceGradient<Scalar>& gradient, Workspace& workspace) {
  const Index experts = Index(totals.counts.size());
  detail::expect_balance_input("balance_backward", weights, in, experts);
  const Workspace::Frame frame(workspace);
  const double n = double(totals.tokens);
  const double b = double(totals.sequences);
  const RowView<double> scratch = workspace.matrix<double>(1, experts);
  const RowView<double> of_batch = workspace.matrix<double>(1, experts);
  detail::batch_gradient(weights, totals, of_batch);
  const bool sums = weights.expert_level > 0 || weights.device_level > 0 || weights.mean_entropy > 0;
  for (Index t = 0; t < in.sequences.tokens(); ++t) {
    for (Index i = 0; sums && i < experts; ++i) {
      gradient.probabilities(t, i) += Scalar(of_batch(0, i));
    }
    if (weights.z > 0) {
      z_loss_backward(detail::row_span(in.logits, t), weights.z / n, detail::row_span(gradient.logits, t));
    }
    if (weights.token_entropy > 0) {
      entropy_backward(detail::row_span(in.probabilities, t), weights.token_entropy / n,
                       detail::row_span(gradient.probabilities, t));
    }
  }
  in.sequences.for_each([&](Index, Index begin, Index end) {
    if (begin == end) {
      return;
    }
    const Workspace::Frame sequence_frame(workspace);
    const Index length = end - begin;
    if (weights.sequence_level > 0) {
      detail::sequence_level_loss(in).add_gradient(begin, end, weights.sequence_level / b, gradient.probabilities, scratch);
    }
    if (weights.gshard > 0) {
      detail::gshard_loss(in).add_gradient(begin, end, weights.gshard / b, gradient.probabilities, scratch);
    }
    if (weights.importance > 0) {
      importance_loss_backward(in.clean_probabilities.middle_rows(begin, length), weights.importance / b,
                               gradient.clean_probabilities.middle_rows(begin, length), detail::row_span(scratch));
    }
    if (weights.load > 0 && in.deviation > 0) {
      const RowView<const Scalar> threshold = detail::thresholds(in, begin, end, workspace);
      const RowView<Scalar> dthreshold = workspace.matrix<Scalar>(1, length);
      std::fill_n(dthreshold.row(0), length, Scalar(0));
      load_loss_backward<Scalar>(in.logits.middle_rows(begin, length), detail::row_span(threshold), in.deviation,
                                 weights.load / b, {gradient.logits.middle_rows(begin, length), detail::row_span(dthreshold)},
                                 detail::row_span(scratch));
      for (Index t = begin; t < end; ++t) {
        gradient.noisy_logits(t, in.best[std::size_t((t + 1) * in.top_k - 1)]) += dthreshold(0, t - begin);
      }
    }
  });
}

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <locale>
#include <moxie/routing/plan.hpp>
#include <ostream>
#include <span>
#include <sstream>
#include <string>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// How evenly a plan loads its experts, and what it leaves out.
struct RoutingStatistics {
  std::vector<double> load;  ///< share of the work of each expert, sum 1 (all 0 for an empty plan)
  /// MaxVio = max load / mean load - 1 (Wang et al. 2024). 0 is perfect. The worst is one expert for all, E - 1; K different
  /// experts a token cannot do worse than E/K - 1.
  double max_violation = 0;
  double entropy = 0;             ///< -Σ load ln load / ln E; 1 is perfect, 0 one expert for all
  double dropped = 0;             ///< share of proposed pairs that were not assigned
  double unserved = 0;            ///< share of tokens without any expert: dropped by all, or taken by none
  std::int64_t dead_experts = 0;  ///< experts without any token
  std::int64_t tokens = 0;        ///< T, without masked ones
  /// R, the rows that the experts compute. Expert choice and Soft MoE may compute more rows than a token has choices: C and
  /// slots are whole numbers in every sequence.
  std::int64_t rows = 0;
  /// Of a dense plan, means of the perplexity e^H: how many tokens a slot mixes, and how many slots a token. 1 is a choice of
  /// one, the length of the sequence or the number of slots a plain mean. 0 of a sparse plan.
  double slot_perplexity = 0;
  double token_perplexity = 0;
};

namespace detail {

inline RoutingStatistics statistics_of_load(std::vector<double> load, double dropped) {
  RoutingStatistics s;
  s.dropped = dropped;
  double total = 0;
  for (const double n : load) {
    total += n;
  }
  const double experts = double(load.size());
  if (total > 0) {
    for (double& n : load) {
      n /= total;
      s.entropy -= n > 0 ? n * std::log(n) : 0;
      s.dead_experts += n > 0 ? 0 : 1;
    }
    s.entropy = load.size() > 1 ? s.entropy / std::log(experts) : 1;
    s.max_violation = *std::max_element(load.begin(), load.end()) * experts - 1;
  } else {
    s.dead_experts = std::int64_t(load.size());
  }
  s.load = std::move(load);
  return s;
}

/// e^H of n weights `weight(i)` over their sum; 0 if all are 0.
template <class Weight>
double perplexity(Index n, Weight&& weight) {
  double sum = 0;
  for (Index i = 0; i < n; ++i) {
    sum += weight(i);
  }
  double entropy = 0;
  for (Index i = 0; i < n && sum != 0; ++i) {
    const double p = weight(i) / sum;
    entropy -= p > 0 ? p * std::log(p) : 0;
  }
  return sum != 0 ? std::exp(entropy) : 0;
}

}  // namespace detail

/// Of a sparse plan: the work of an expert is its number of rows. O(E + T).
template <class Scalar>
RoutingStatistics routing_statistics(const SparsePlan<Scalar>& plan) {
  const auto& counts = plan.tokens_per_expert();
  const Index proposed = plan.rows() + plan.dropped();
  RoutingStatistics s = detail::statistics_of_load(std::vector<double>(counts.begin(), counts.end()),
                                                   proposed == 0 ? 0.0 : double(plan.dropped()) / double(proposed));
  Index unserved = 0;
  for (Index t = 0; t < plan.tokens(); ++t) {
    unserved += plan.rows_of_token(t).empty() ? 1 : 0;
  }
  s.unserved = plan.tokens() == 0 ? 0.0 : double(unserved) / double(plan.tokens());
  s.tokens = plan.tokens();
  s.rows = plan.rows();
  return s;
}

/// Of a dense plan: slots load all experts alike, so the load of an expert is the combine weight that tokens give its slots.
/// Every token has all of them. O(T N).
template <class Scalar>
RoutingStatistics routing_statistics(const DensePlan<Scalar>& plan) {
  std::vector<double> load(std::size_t(plan.experts()), 0.0);
  for (Index t = 0; t < plan.tokens(); ++t) {
    for (Index n = 0; n < plan.slot_count(); ++n) {
      load[std::size_t(n / plan.slots_per_expert())] += (std::abs)(double(plan.combine()(t, n)));
    }
  }
  RoutingStatistics s = detail::statistics_of_load(std::move(load), 0.0);
  s.tokens = plan.tokens();
  s.rows = plan.rows();
  for (Index t = 0; t < plan.tokens(); ++t) {
    s.token_perplexity +=
        detail::perplexity(plan.slot_count(), [&](Index n) { return double(plan.combine()(t, n)); }) / double(plan.tokens());
  }
  const double columns = double(plan.sequences().nonempty() * plan.slot_count());
  plan.sequences().for_each([&](Index, Index begin, Index end) {
    for (Index n = 0; n < plan.slot_count() && begin < end; ++n) {
      s.slot_perplexity +=
          detail::perplexity(end - begin, [&](Index i) { return double(plan.dispatch()(begin + i, n)); }) / columns;
    }
  });
  return s;
}

namespace detail {

/// A stream for lines of CSV: numbers as `out` formats them, and never with the separators of a locale.
inline std::ostringstream csv_text(const std::ostream& out) {
  std::ostringstream text;
  text.copyfmt(out);
  text.exceptions(std::ios::goodbit);
  text.width(0);
  text.imbue(std::locale::classic());
  return text;
}

}  // namespace detail

/// How often each expert was chosen, by any key of a token that the caller gives: its class, patch, timestep, or one for all. A
/// matrix of counts to plot, which grows over as many batches as are recorded.
///
///     moxie::RoutingRecorder by_class(10, 8);
///     by_class.add(tape, classes);               // a key a row of x
///     by_class.shares();                         // (keys, experts)
///     by_class.write_csv(file);
class RoutingRecorder {
 public:
  /// Throws ValueError for sizes below 1.
  RoutingRecorder(Index keys, Index experts) {
    detail::expect_at_least("RoutingRecorder", "keys", keys, 1);
    detail::expect_at_least("RoutingRecorder", "experts", experts, 1);
    counts_.resize(keys, experts);
    std::fill_n(counts_.data(), keys * experts, std::int64_t{0});
  }

  /// Counts the assignments of a layer's last forward, under `key[row]` of each row of x; masked rows and dropped pairs do not
  /// count. Throws ShapeError for a plan of other experts or fewer keys than its tokens need, ValueError for a key outside
  /// [0, keys); nothing is counted then.
  template <class Tape>
  requires requires(const Tape& tape) {
    tape.row(Index{0});
    tape.plan().token(Index{0});
  }
  void add(const Tape& tape, std::span<const Index> key) {
    add(tape.plan(), key, [&](Index token) { return tape.row(token); });
  }
  /// The same of a plan, whose tokens are the rows.
  template <class Scalar>
  void add(const SparsePlan<Scalar>& plan, std::span<const Index> key) {
    add(plan, key, [](Index token) { return token; });
  }

  /// (keys, experts).
  const Matrix<std::int64_t>& counts() const { return counts_; }
  /// Each row over its sum; 0 for a key that was never seen.
  Matrix<double> shares() const {
    Matrix<double> shares(counts_.rows(), counts_.cols());
    for (Index k = 0; k < shares.rows(); ++k) {
      double total = 0;
      for (Index e = 0; e < shares.cols(); ++e) {
        total += double(counts_(k, e));
      }
      for (Index e = 0; e < shares.cols(); ++e) {
        shares(k, e) = total > 0 ? double(counts_(k, e)) / total : 0;
      }
    }
    return shares;
  }
  /// "key,expert_0,expert_1,..." and a line of counts a key. Numbers have no separators, whatever the locale of the program.
  void write_csv(std::ostream& out) const {
    std::ostringstream text = detail::csv_text(out);
    text << "key";
    for (Index e = 0; e < counts_.cols(); ++e) {
      text << ",expert_" << e;
    }
    text << '\n';
    for (Index k = 0; k < counts_.rows(); ++k) {
      text << k;
      for (Index e = 0; e < counts_.cols(); ++e) {
        text << ',' << counts_(k, e);
      }
      text << '\n';
    }
    out << text.str();
  }

 private:
  template <class Scalar, class RowOf>
  void add(const SparsePlan<Scalar>& plan, std::span<const Index> key, RowOf&& row_of) {
    if (plan.experts() != counts_.cols()) {
      throw ShapeError("RoutingRecorder::add: the plan has " + std::to_string(plan.experts()) + " experts, expected " +
                       std::to_string(counts_.cols()));
    }
    for (Index t = 0; t < plan.tokens(); ++t) {
      const Index row = row_of(t);
      if (row >= Index(key.size())) {
        throw ShapeError("RoutingRecorder::add: there are " + std::to_string(key.size()) + " keys, but row " +
                         std::to_string(row) + " has a token");
      }
      if (key[std::size_t(row)] < 0 || key[std::size_t(row)] >= counts_.rows()) {
        throw ValueError("RoutingRecorder::add: the key of row " + std::to_string(row) + " is " +
                         std::to_string(key[std::size_t(row)]) + ", expected 0 to " + std::to_string(counts_.rows() - 1));
      }
    }
    for (Index e = 0; e < plan.experts(); ++e) {
      for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e + 1)]; ++r) {
        ++counts_(key[std::size_t(row_of(plan.token(r)))], e);
      }
    }
  }

  Matrix<std::int64_t> counts_;
};

/// One line of CSV for the statistics of a step, and the header for it:
/// "step,max_violation,entropy,dropped,unserved,dead_experts,tokens,rows,slot_perplexity,token_perplexity,load_0,...". Numbers
/// have a decimal point and no separators, whatever the locale of the program.
inline void write_csv_header(std::ostream& out, const RoutingStatistics& s) {
  std::ostringstream text = detail::csv_text(out);
  text << "step,max_violation,entropy,dropped,unserved,dead_experts,tokens,rows,slot_perplexity,token_perplexity";
  for (std::size_t e = 0; e < s.load.size(); ++e) {
    text << ",load_" << e;
  }
  text << '\n';
  out << text.str();
}
inline void write_csv(std::ostream& out, std::int64_t step, const RoutingStatistics& s) {
  std::ostringstream text = detail::csv_text(out);
  text << step << ',' << s.max_violation << ',' << s.entropy << ',' << s.dropped << ',' << s.unserved << ',' << s.dead_experts
       << ',' << s.tokens << ',' << s.rows << ',' << s.slot_perplexity << ',' << s.token_perplexity;
  for (const double load : s.load) {
    text << ',' << load;
  }
  text << '\n';
  out << text.str();
}

/// How alike the weights of Soft MoE are: cosines between different vectors of one sequence.
struct Similarity {
  double mean = 0;
  double least = 0;
  double largest = 0;
};
/// Of the slots' dispatch weights (columns of D) and the tokens' combine weights (rows of C): near 1, all slots take, or all
/// tokens get, the same mixture.
struct SoftSimilarity {
  Similarity dispatch;
  Similarity combine;
};

namespace detail {

/// Cosines of all pairs of n different vectors of `size` numbers `value(vector, i)`, added to the running figures.
template <class Value>
void add_similarity(Index n, Index size, Value&& value, Similarity& s, std::int64_t& pairs) {
  std::vector<double> v(std::size_t(n * size));
  std::vector<double> norm(static_cast<std::size_t>(n));
  const auto dot = [&](Index i, Index j) {
    double sum = 0;
    for (Index k = 0; k < size; ++k) {
      sum += v[std::size_t(i * size + k)] * v[std::size_t(j * size + k)];
    }
    return sum;
  };
  for (Index i = 0; i < n; ++i) {
    for (Index k = 0; k < size; ++k) {
      v[std::size_t(i * size + k)] = double(value(i, k));
    }
    norm[std::size_t(i)] = std::sqrt(dot(i, i));
    for (Index j = 0; j < i; ++j) {
      const double norms = norm[std::size_t(i)] * norm[std::size_t(j)];
      const double cosine = norms > 0 ? dot(i, j) / norms : 0;
      s.least = pairs == 0 ? cosine : (std::min)(s.least, cosine);
      s.largest = pairs == 0 ? cosine : (std::max)(s.largest, cosine);
      ++pairs;
      s.mean += (cosine - s.mean) / double(pairs);
    }
  }
}

}  // namespace detail

/// Mean, least and largest cosine over all pairs within a sequence, and all sequences; 0 where there is no pair. vmoe's
/// similarity metrics of Soft MoE. O(T N (L + N)).
template <class Scalar>
SoftSimilarity soft_similarity(const DensePlan<Scalar>& plan) {
  SoftSimilarity s;
  std::int64_t dispatch_pairs = 0;
  std::int64_t combine_pairs = 0;
  plan.sequences().for_each([&](Index, Index begin, Index end) {
    const Index length = end - begin;
    detail::add_similarity(
        plan.slot_count(), length, [&](Index n, Index i) { return plan.dispatch()(begin + i, n); }, s.dispatch, dispatch_pairs);
    detail::add_similarity(
        length, plan.slot_count(), [&](Index i, Index n) { return plan.combine()(begin + i, n); }, s.combine, combine_pairs);
  });
  return s;
}

}  // namespace moxie::inline MOXIE_NAMESPACE

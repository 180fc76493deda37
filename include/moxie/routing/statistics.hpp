// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/routing/plan.hpp>
#include <ostream>
#include <span>
#include <vector>

namespace moxie {

/// How evenly a plan loads its experts.
struct RoutingStatistics {
  std::vector<double> load;       ///< share of the work of each expert, sum 1 (all 0 for an empty plan)
  double max_violation = 0;       ///< MaxVio = max load / mean load - 1 (Wang et al. 2024); 0 is perfect, E - 1 the worst
  double entropy = 0;             ///< -Σ load ln load / ln E; 1 is perfect, 0 one expert for all
  double dropped = 0;             ///< share of proposed pairs that were not assigned
  std::int64_t dead_experts = 0;  ///< experts without any token
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

}  // namespace detail

/// Of a sparse plan: the work of an expert is its number of rows.
template <class Scalar>
RoutingStatistics routing_statistics(const SparsePlan<Scalar>& plan) {
  const auto& counts = plan.tokens_per_expert();
  const Index proposed = plan.rows() + plan.dropped();
  return detail::statistics_of_load(std::vector<double>(counts.begin(), counts.end()),
                                    proposed == 0 ? 0.0 : double(plan.dropped()) / double(proposed));
}

/// Of a dense plan: slots load all experts alike, so the load of an expert is the combine weight that tokens give its slots.
template <class Scalar>
RoutingStatistics routing_statistics(const DensePlan<Scalar>& plan) {
  std::vector<double> load(std::size_t(plan.experts()), 0.0);
  for (Index t = 0; t < plan.tokens(); ++t) {
    for (Index n = 0; n < plan.slot_count(); ++n) {
      load[std::size_t(n / plan.slots_per_expert())] += double(plan.combine()(t, n));
    }
  }
  return detail::statistics_of_load(std::move(load), 0.0);
}

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
    counts_ = Matrix<std::int64_t>::Zero(keys, experts);
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
    Matrix<double> shares = counts_.cast<double>();
    for (Index k = 0; k < shares.rows(); ++k) {
      const double total = shares.row(k).sum();
      shares.row(k) *= total > 0 ? 1 / total : 0;
    }
    return shares;
  }
  /// "key,expert_0,expert_1,..." and a line of counts a key.
  void write_csv(std::ostream& out) const {
    out << "key";
    for (Index e = 0; e < counts_.cols(); ++e) {
      out << ",expert_" << e;
    }
    out << '\n';
    for (Index k = 0; k < counts_.rows(); ++k) {
      out << k;
      for (Index e = 0; e < counts_.cols(); ++e) {
        out << ',' << counts_(k, e);
      }
      out << '\n';
    }
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
/// "step,max_violation,entropy,dropped,dead_experts,load_0,...".
inline void write_csv_header(std::ostream& out, const RoutingStatistics& s) {
  out << "step,max_violation,entropy,dropped,dead_experts";
  for (std::size_t e = 0; e < s.load.size(); ++e) {
    out << ",load_" << e;
  }
  out << '\n';
}
inline void write_csv(std::ostream& out, std::int64_t step, const RoutingStatistics& s) {
  out << step << ',' << s.max_violation << ',' << s.entropy << ',' << s.dropped << ',' << s.dead_experts;
  for (const double load : s.load) {
    out << ',' << load;
  }
  out << '\n';
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

/// Cosines of all pairs of different rows of `v`, added to the running figures.
inline void add_similarity(const Matrix<double>& v, Similarity& s, std::int64_t& pairs) {
  for (Index i = 0; i < v.rows(); ++i) {
    for (Index j = 0; j < i; ++j) {
      const double norms = v.row(i).norm() * v.row(j).norm();
      const double cosine = norms > 0 ? v.row(i).dot(v.row(j)) / norms : 0;
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
    const auto rows = [&](const auto& m) { return m.middle_rows(begin, end - begin).eigen().template cast<double>().eval(); };
    detail::add_similarity(rows(plan.dispatch()).transpose(), s.dispatch, dispatch_pairs);
    detail::add_similarity(rows(plan.combine()), s.combine, combine_pairs);
  });
  return s;
}

}  // namespace moxie

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/routing/plan.hpp>
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
    for (Index n = 0; n < plan.slots(); ++n) {
      load[std::size_t(n / plan.slots_per_expert())] += double(plan.combine()(t, n));
    }
  }
  return detail::statistics_of_load(std::move(load), 0.0);
}

}  // namespace moxie

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/statistics.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::routing_statistics;
using moxie::RoutingStatistics;

RoutingStatistics of_choices(Index experts, const std::vector<Index>& expert) {
  moxie::SparsePlan<double> plan;
  plan.build(Index(expert.size()), experts, 1, expert, std::vector<double>(expert.size(), 1.0));
  return routing_statistics(plan);
}

TEST_CASE("statistics: of an even load are perfect") {
  const RoutingStatistics s = of_choices(3, {0, 1, 2, 2, 1, 0});
  CHECK(s.max_violation == doctest::Approx(0));
  CHECK(s.entropy == doctest::Approx(1));
  CHECK(s.dropped == 0);
  CHECK(s.dead_experts == 0);
  for (const double load : s.load) {
    CHECK(load == doctest::Approx(1.0 / 3));
  }
}

TEST_CASE("statistics: of one expert for all are the worst") {
  const RoutingStatistics s = of_choices(4, {2, 2, 2});
  CHECK(s.max_violation == doctest::Approx(3));
  CHECK(s.entropy == doctest::Approx(0));
  CHECK(s.dead_experts == 3);
  CHECK(s.load[2] == 1);
}

TEST_CASE("statistics: of a load of 1/2, 1/4, 1/4, 0 with drops") {
  const RoutingStatistics s = of_choices(4, {0, 0, 1, 2, -1});
  CHECK(s.max_violation == doctest::Approx(1));
  CHECK(s.entropy == doctest::Approx(1.5 * std::log(2.0) / std::log(4.0)));
  CHECK(s.dropped == doctest::Approx(0.2));
  CHECK(s.dead_experts == 1);
}

TEST_CASE("statistics: of an empty plan, and of one expert") {
  const RoutingStatistics none = of_choices(3, {});
  CHECK(none.load == std::vector<double>{0, 0, 0});
  CHECK(none.dead_experts == 3);
  CHECK(none.max_violation == 0);
  CHECK(none.dropped == 0);
  const RoutingStatistics all_dropped = of_choices(3, {-1, -1});
  CHECK(all_dropped.dropped == 1);
  CHECK(all_dropped.dead_experts == 3);
  const RoutingStatistics one = of_choices(1, {0, 0});
  CHECK(one.entropy == 1);
  CHECK(one.max_violation == doctest::Approx(0));
}

TEST_CASE("statistics: of a dense plan are the weights that tokens give the slots of an expert") {
  moxie::DensePlan<double> plan;
  plan.resize(moxie::Sequences().over(2), 2, 2);
  plan.combine().eigen() << 0.5, 0.25, 0.25, 0, 0.1, 0.4, 0.2, 0.3;
  const RoutingStatistics s = routing_statistics(plan);
  CHECK(s.load[0] == doctest::Approx(1.25 / 2));
  CHECK(s.load[1] == doctest::Approx(0.75 / 2));
  CHECK(s.max_violation == doctest::Approx(0.25));
  CHECK(s.dead_experts == 0);
  CHECK(s.dropped == 0);
}

}  // namespace

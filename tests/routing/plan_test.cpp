// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/routing/plan.hpp>
#include <moxie/testing/laws.hpp>
#include <set>
#include <support.hpp>

namespace {

using moxie::DensePlan;
using moxie::Index;
using moxie::SparsePlan;

struct Proposal {
  std::vector<Index> expert;
  std::vector<double> weight;
};

// T·K pairs with random experts, one in `drop` of them dropped (0: none).
Proposal propose(Index tokens, Index experts, Index choices, Index drop, std::uint64_t seed) {
  const moxie::Rng rng(seed);
  Proposal p;
  for (Index i = 0; i < tokens * choices; ++i) {
    const bool dropped = drop > 0 && rng.below(drop, std::uint64_t(2 * i + 1)) == 0;
    p.expert.push_back(dropped ? -1 : rng.below(experts, std::uint64_t(2 * i)));
    p.weight.push_back(rng.normal(std::uint64_t(i)));
  }
  return p;
}

TEST_CASE("sparse plan: keeps the laws, with and without drops, empty experts and no tokens") {
  for (const Index tokens : {0, 1, 2, 13, 70}) {
    for (const Index experts : {1, 2, 7, 100}) {
      for (const Index choices : {1, 3}) {
        for (const Index drop : {0, 1, 4}) {
          const Proposal p = propose(tokens, experts, choices, drop, 401);
          SparsePlan<double> plan;
          plan.build(tokens, experts, choices, p.expert, p.weight);
          const auto law = moxie::testing::plan_is_sorted_and_complete(plan, tokens * choices);
          INFO(law.message);
          CHECK(law.holds);
          CHECK(plan.tokens() == tokens);
          CHECK(plan.experts() == experts);
        }
      }
    }
  }
}

TEST_CASE("sparse plan: each row is the proposed pair that it names, and no pair is named twice") {
  const Proposal p = propose(40, 5, 3, 4, 402);
  SparsePlan<double> plan;
  plan.build(40, 5, 3, p.expert, p.weight);
  std::set<Index> pairs;
  for (Index e = 0; e < 5; ++e) {
    for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e + 1)]; ++r) {
      const Index pair = plan.pair(r);
      pairs.insert(pair);
      CHECK(p.expert[std::size_t(pair)] == e);
      CHECK(plan.token(r) == pair / 3);
      CHECK(plan.weight(r) == p.weight[std::size_t(pair)]);
    }
  }
  CHECK(Index(pairs.size()) == plan.rows());
  CHECK(plan.dropped() == std::count(p.expert.begin(), p.expert.end(), -1));
  CHECK(plan.dropped() > 0);
}

TEST_CASE("sparse plan: the rows of a token come in the order in which they were proposed") {
  const Index expert[] = {3, 1, 0, 2, 2, -1, 1, 3, 0};
  const double weight[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  SparsePlan<double> plan;
  plan.build(3, 4, 3, expert, weight);
  for (Index t = 0; t < 3; ++t) {
    Index last = -1;
    for (const Index r : plan.rows_of_token(t)) {
      CHECK(plan.pair(r) > last);
      last = plan.pair(r);
    }
  }
  CHECK(plan.rows_of_token(0).size() == 3);
  CHECK(plan.rows_of_token(1).size() == 2);
  CHECK(plan.tokens_per_expert() == std::vector<std::int64_t>{2, 2, 2, 2});
  CHECK(plan.token().size() == 8);
}

TEST_CASE("sparse plan: a token may choose an expert twice, and all may choose one") {
  const std::vector<Index> expert(20, 2);
  const std::vector<double> weight(20, 0.5);
  SparsePlan<double> plan;
  plan.build(10, 4, 2, expert, weight);
  CHECK(moxie::testing::plan_is_sorted_and_complete(plan, 20).holds);
  CHECK(plan.tokens_per_expert() == std::vector<std::int64_t>{0, 0, 20, 0});
}

TEST_CASE("sparse plan: pairs may be proposed by expert (expert choice)") {
  // Each of 3 experts proposes 2 tokens.
  const Index token[] = {4, 1, 1, 0, 4, 2};
  const Index expert[] = {0, 0, 1, 1, 2, 2};
  const double weight[] = {1, 2, 3, 4, 5, 6};
  SparsePlan<double> plan;
  plan.build(
      5, 3, [&](Index p) { return token[p]; }, expert, weight);
  CHECK(moxie::testing::plan_is_sorted_and_complete(plan, 6).holds);
  CHECK(plan.token(0) == 1);
  CHECK(plan.token(1) == 4);
  CHECK(plan.pair(0) == 1);
  CHECK(plan.rows_of_token(3).empty());
  CHECK(plan.rows_of_token(4).size() == 2);
}

TEST_CASE("sparse plan: experts and tokens out of range are refused, and the plan stays as it was") {
  SparsePlan<double> plan;
  const Index good[] = {0, 1};
  const double weight[] = {1, 1};
  plan.build(2, 2, 1, good, weight);
  for (const Index bad : {Index{2}, Index{-2}, Index{100}}) {
    const Index expert[] = {0, bad};
    const std::string message = moxie::test::message_of<moxie::ValueError>([&] { plan.build(2, 2, 1, expert, weight); });
    CHECK(moxie::test::contains(message, "pair 1 is (token 1, expert " + std::to_string(bad) + ")"));
  }
  for (const Index token : {Index{2}, Index{-1}}) {
    CHECK_THROWS_AS(plan.build(
                        2, 2, [&](Index p) { return p == 0 ? Index{0} : token; }, good, weight),
                    moxie::ValueError);
  }
  const double three[] = {1, 1, 1};
  CHECK_THROWS_AS(plan.build(2, 2, 1, good, three), moxie::ValueError);
  CHECK_THROWS_AS(plan.build(3, 2, 1, good, weight), moxie::ValueError);
  CHECK(plan.rows() == 2);
  CHECK(moxie::testing::plan_is_sorted_and_complete(plan, 2).holds);
}

TEST_CASE("sparse plan: built again in the same shape it allocates nothing") {
  const Proposal a = propose(50, 6, 2, 0, 403);
  const Proposal b = propose(50, 6, 2, 3, 404);
  SparsePlan<double> plan;
  plan.build(50, 6, 2, a.expert, a.weight);
  const std::size_t before = moxie::test::allocation_count;
  plan.build(50, 6, 2, b.expert, b.weight);
  plan.build(50, 6, 2, a.expert, a.weight);
  const std::size_t after = moxie::test::allocation_count;
  CHECK(after == before);
}

TEST_CASE("dense plan: slot s of expert e in sequence b is row (e B + b) S + s, each once") {
  const Index sequences = 3, experts = 4, slots = 2;
  DensePlan<double> plan;
  plan.resize(moxie::Sequences(5).over(15), experts, slots);
  CHECK(plan.sequences() == moxie::Sequences(5).over(15));
  CHECK(plan.slot_count() == 8);
  CHECK(plan.rows() == 24);
  std::set<Index> rows;
  for (Index b = 0; b < sequences; ++b) {
    for (Index e = 0; e < experts; ++e) {
      for (Index s = 0; s < slots; ++s) {
        const Index row = plan.slot_rows(b)[e * slots + s];
        CHECK(row == (e * sequences + b) * slots + s);
        CHECK(row >= plan.expert_starts()[std::size_t(e)]);
        CHECK(row < plan.expert_starts()[std::size_t(e + 1)]);
        rows.insert(row);
      }
    }
  }
  CHECK(Index(rows.size()) == plan.rows());
  CHECK(plan.dispatch().rows() == 15);
  CHECK(plan.combine().cols() == 8);
}

TEST_CASE("dense plan: without tokens there are no rows") {
  DensePlan<double> plan;
  plan.resize(moxie::Sequences(), 4, 2);
  CHECK(plan.rows() == 0);
  CHECK(plan.sequences().count() == 0);
  CHECK(plan.expert_starts().back() == 0);
}

}  // namespace

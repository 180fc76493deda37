// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <locale>
#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/routing/statistics.hpp>
#include <sstream>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
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

TEST_CASE("recorder: counts assignments by key, over batches, without masked and dropped ones") {
  const moxie::TopKMoE<double> layer({.model_dim = 3, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 2}, .capacity = {1}});
  moxie::TopKMoE<double> trained = layer;
  trained.initialize(moxie::Rng(1));
  const Matrix<double> x = moxie::test::random<double>(10, 3, 651);
  const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1, 1, 0, 1, 1, 1};
  const std::vector<Index> key{0, 1, 2, 0, 1, 2, 0, 1, 2, 0};
  moxie::Tokens<double> in(x);
  in.mask = mask;
  Matrix<double> y(10, 3);
  auto tape = trained.make_tape();
  trained.forward(in, y, tape);
  moxie::RoutingRecorder recorder(3, 4);
  recorder.add(tape, key);
  recorder.add(tape, key);
  Matrix<std::int64_t> expected = Matrix<std::int64_t>::Zero(3, 4);
  for (Index e = 0; e < 4; ++e) {
    for (Index r = tape.plan().expert_starts()[std::size_t(e)]; r < tape.plan().expert_starts()[std::size_t(e + 1)]; ++r) {
      expected(key[std::size_t(tape.row(tape.plan().token(r)))], e) += 2;
    }
  }
  CHECK(recorder.counts() == expected);
  CHECK(recorder.counts().sum() == 2 * tape.plan().rows());
  CHECK(tape.plan().dropped() > 0);
  CHECK(recorder.shares().rowwise().sum().isOnes(1e-12));
  std::ostringstream csv;
  recorder.write_csv(csv);
  CHECK(csv.str().starts_with("key,expert_0,expert_1,expert_2,expert_3\n0,"));
  CHECK(std::ranges::count(csv.str(), '\n') == 4);
}

TEST_CASE("recorder: keys and plans that do not fit are refused, and nothing is counted") {
  moxie::SparsePlan<float> plan;
  plan.build(2, 3, 1, std::vector<Index>{0, 2}, std::vector<float>{1, 1});
  moxie::RoutingRecorder recorder(2, 3);
  CHECK_THROWS_AS(recorder.add(plan, std::vector<Index>{0}), moxie::ShapeError);
  CHECK_THROWS_AS(recorder.add(plan, std::vector<Index>{0, 2}), moxie::ValueError);
  CHECK_THROWS_AS(recorder.add(plan, std::vector<Index>{-1, 0}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::RoutingRecorder(2, 4).add(plan, std::vector<Index>{0, 0}), moxie::ShapeError);
  CHECK_THROWS_AS(moxie::RoutingRecorder(0, 4), moxie::ValueError);
  CHECK(recorder.counts().isZero());
  CHECK(recorder.shares().isZero());
  recorder.add(plan, std::vector<Index>{0, 1});
  CHECK(recorder.counts()(1, 2) == 1);
}

TEST_CASE("statistics: are a line of CSV") {
  moxie::SparsePlan<float> plan;
  plan.build(2, 2, 1, std::vector<Index>{0, 0}, std::vector<float>{1, 1});
  std::ostringstream csv;
  moxie::write_csv_header(csv, moxie::routing_statistics(plan));
  moxie::write_csv(csv, 7, moxie::routing_statistics(plan));
  CHECK(csv.str() ==
        "step,max_violation,entropy,dropped,unserved,dead_experts,tokens,rows,slot_perplexity,token_perplexity,load_0,load_1\n"
        "7,1,0,0,0,1,2,2,0,0,1,0\n");
}

// Numbers as in Germany: 1.234,5.
struct GermanNumbers : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
};

TEST_CASE("statistics: CSV does not follow the locale of the program or the stream, and leaves both as they were") {
  const Index tokens = 3412;
  moxie::SparsePlan<float> plan;
  plan.build(tokens, 2, 1, std::vector<Index>(std::size_t(tokens), 1), std::vector<float>(std::size_t(tokens), 1));
  moxie::RoutingRecorder recorder(1, 2);
  recorder.add(plan, std::vector<Index>(std::size_t(tokens), 0));
  RoutingStatistics s = routing_statistics(plan);
  s.entropy = 0.25;
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new GermanNumbers));
  std::ostringstream csv;
  recorder.write_csv(csv);
  moxie::write_csv(csv, 1234567, s);
  csv << ' ' << 1234.5;
  std::locale::global(before);
  CHECK(csv.str() == "key,expert_0,expert_1\n0,0,3412\n1234567,1,0.25,0,0,1,3412,3412,0,0,0,1\n 1.234,5");
}

TEST_CASE("statistics: tokens without any expert are unserved, dropped by all or taken by none") {
  moxie::SparsePlan<double> plan;
  plan.build(4, 3, 2, std::vector<Index>{0, 1, -1, 2, -1, -1, 1, 1}, std::vector<double>(8, 1.0));
  const RoutingStatistics s = routing_statistics(plan);
  CHECK(s.unserved == 0.25);
  CHECK(s.dropped == doctest::Approx(3.0 / 8));
  CHECK(s.tokens == 4);
  CHECK(s.rows == 5);
  CHECK(s.slot_perplexity == 0);
  // Ten tokens, five experts that take two each of the two that they like best: nothing is dropped, eight have no expert.
  moxie::ExpertChoiceMoE<double> layer({.model_dim = 1, .experts = 5, .expert = {2}});
  layer.initialize(moxie::Rng(2));
  layer.parameters()["gate.weight"].eigen().setZero();  // all scores are equal: the first tokens are taken
  const Matrix<double> x = moxie::test::random<double>(10, 1, 652);
  Matrix<double> y(10, 1);
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  CHECK(tape.statistics().dropped == 0);
  CHECK(tape.statistics().unserved == doctest::Approx(0.8));
  CHECK(tape.statistics().rows == 10);
}

TEST_CASE("statistics: expert choice says how many rows it computes where tokens do not divide") {
  moxie::ExpertChoiceMoE<double> layer({.model_dim = 2, .experts = 8, .expert = {2}});
  layer.initialize(moxie::Rng(2));
  const Matrix<double> x = moxie::test::random<double>(98, 2, 653);
  Matrix<double> y(98, 2);
  auto tape = layer.make_tape();
  layer.forward({x, 49}, y, tape);
  CHECK(tape.statistics().tokens == 98);
  CHECK(tape.statistics().rows == 112);  // 8 ⌈49/8⌉ = 56 in each sequence
}

TEST_CASE("statistics: perplexity of a dense plan counts the tokens of a slot and the slots of a token") {
  moxie::DensePlan<double> plan;
  plan.resize(moxie::Sequences(4).over(8), 2, 1);
  plan.dispatch().eigen().setConstant(0.25);
  plan.combine().eigen().setConstant(0.5);
  CHECK(routing_statistics(plan).slot_perplexity == doctest::Approx(4));
  CHECK(routing_statistics(plan).token_perplexity == doctest::Approx(2));
  CHECK(routing_statistics(plan).unserved == 0);
  CHECK(routing_statistics(plan).tokens == 8);
  CHECK(routing_statistics(plan).rows == 4);
  plan.dispatch().eigen().setZero();
  plan.dispatch().eigen().row(1).setOnes();
  plan.dispatch().eigen().row(6).setConstant(0.5);
  plan.dispatch().eigen().row(7).setConstant(0.5);
  plan.combine().eigen().setZero();
  plan.combine().eigen().col(1).setConstant(-2);  // a scale changes nothing
  CHECK(routing_statistics(plan).slot_perplexity == doctest::Approx(1.5));
  CHECK(routing_statistics(plan).token_perplexity == doctest::Approx(1));
  CHECK(routing_statistics(plan).load[1] == doctest::Approx(1));
  const std::vector<Index> starts{0, 0};
  plan.resize(moxie::Sequences(starts).over(0), 2, 1);
  CHECK(routing_statistics(plan).slot_perplexity == 0);
  CHECK(routing_statistics(plan).token_perplexity == 0);
}

TEST_CASE("soft similarity: 1 for equal weights, 0 for identity, and within one sequence alone") {
  moxie::DensePlan<double> plan;
  plan.resize(moxie::Sequences(2).over(4), 2, 1);
  plan.dispatch().eigen().setConstant(0.5);
  plan.combine().eigen() << 1, 0, 0, 1, 1, 0, 0, 1;
  const moxie::SoftSimilarity s = moxie::soft_similarity(plan);
  CHECK(s.dispatch.mean == doctest::Approx(1));
  CHECK(s.dispatch.least == doctest::Approx(1));
  CHECK(s.combine.mean == 0);
  CHECK(s.combine.largest == 0);
  plan.combine().eigen() << 1, 0, 1, 1, 1, 0, 0, 1;
  CHECK(moxie::soft_similarity(plan).combine.largest == doctest::Approx(std::sqrt(0.5)));
  CHECK(moxie::soft_similarity(plan).combine.mean == doctest::Approx(std::sqrt(0.5) / 2));
  plan.resize(moxie::Sequences(), 2, 1);
  CHECK(moxie::soft_similarity(plan).dispatch.mean == 0);
}

}  // namespace

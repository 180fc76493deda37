// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/balance.hpp>
#include <moxie/routing/top_k.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::balance_loss;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using Counts = moxie::Matrix<std::int64_t>;

// Rows that sum to 1.
template <class S>
Matrix<S> random_scores(Index tokens, Index experts, std::uint64_t seed) {
  Matrix<S> s = moxie::test::random<S>(tokens, experts, seed);
  moxie::softmax_rows(RowView<S>(s), moxie::Exec{});
  return s;
}

// K different experts for every token, counted in each of `groups` groups.
Counts random_counts(Index tokens, Index experts, Index top_k, Index groups, std::uint64_t seed) {
  Counts counts = Counts::Zero(groups, experts);
  for (Index t = 0; t < tokens; ++t) {
    const Index first = moxie::Rng(seed).below(experts, std::uint64_t(t));
    for (Index k = 0; k < top_k; ++k) {
      ++counts(t / (tokens / groups), (first + k) % experts);
    }
  }
  return counts;
}

template <class S>
double loss_of(const Matrix<S>& scores, const Counts& counts, Index top_k) {
  return balance_loss<S>(scores, RowView<const std::int64_t>(counts), top_k);
}

TEST_CASE_TEMPLATE("balance loss: is 1 for uniform scores, whatever was chosen", S, float, double) {
  const Index tokens = 24, experts = 6;
  const Matrix<S> uniform = Matrix<S>::Constant(tokens, experts, S(1) / S(experts));
  for (const Index groups : {Index{1}, Index{4}}) {
    for (const Index k : {Index{1}, Index{3}}) {
      const Counts counts = random_counts(tokens, experts, k, groups, 501);
      CHECK(loss_of(uniform, counts, k) == doctest::Approx(1).epsilon(1e-6));
    }
  }
}

TEST_CASE_TEMPLATE("balance loss: is 1 for balanced counts, whatever the scores", S, float, double) {
  const Matrix<S> scores = random_scores<S>(24, 6, 502);
  CHECK(loss_of(scores, Counts::Constant(1, 6, 8), 2) == doctest::Approx(1).epsilon(1e-6));
  CHECK(loss_of(scores, Counts::Constant(4, 6, 2), 2) == doctest::Approx(1).epsilon(1e-6));
}

TEST_CASE_TEMPLATE("balance loss: is E P_i if all tokens choose expert i alone", S, float, double) {
  const Matrix<S> scores = random_scores<S>(10, 5, 503);
  Counts counts = Counts::Zero(1, 5);
  counts(0, 3) = 10;
  double mean = 0;
  for (Index t = 0; t < 10; ++t) {
    mean += double(scores(t, 3)) / 10;
  }
  CHECK(loss_of(scores, counts, 1) == doctest::Approx(5 * mean).epsilon(1e-12));
}

TEST_CASE("balance loss: is the equation, group by group, then their mean") {
  const Index tokens = 24, experts = 5, k = 2, groups = 3, n = 8;
  const Matrix<double> scores = random_scores<double>(tokens, experts, 504);
  const Counts counts = random_counts(tokens, experts, k, groups, 505);
  double expected = 0;
  for (Index b = 0; b < groups; ++b) {
    for (Index i = 0; i < experts; ++i) {
      const double f = double(experts) / double(k * n) * double(counts(b, i));
      expected += f * scores.col(i).segment(b * n, n).mean() / double(groups);
    }
  }
  CHECK(loss_of(scores, counts, k) == doctest::Approx(expected).epsilon(1e-14));
  CHECK(std::abs(expected - 1) > 1e-3);  // no special case
}

TEST_CASE("balance loss: of no tokens is 0, and has no gradient") {
  const Matrix<double> none(0, 3);
  Matrix<double> dnone(0, 3);
  CHECK(loss_of(none, Counts(0, 3), 2) == 0);
  CHECK(loss_of(none, Counts::Zero(1, 3), 2) == 0);
  moxie::balance_loss_backward(RowView<const std::int64_t>(Counts(0, 3)), 2, 1.0, RowView<double>(dnone));
}

TEST_CASE("balance loss: backward matches central differences and adds to what is there") {
  const Index tokens = 12, experts = 5;
  for (const Index groups : {Index{1}, Index{3}}) {
    for (const Index k : {Index{1}, Index{2}, Index{5}}) {
      Matrix<double> scores = random_scores<double>(tokens, experts, 506);
      const Counts counts = random_counts(tokens, experts, k, groups, 507);
      const Matrix<double> start = moxie::test::random<double>(tokens, experts, 508);
      Matrix<double> dscores = start;
      moxie::balance_loss_backward(RowView<const std::int64_t>(counts), k, 0.3, RowView<double>(dscores));
      const auto loss = [&] { return 0.3 * loss_of(scores, counts, k) + scores.cwiseProduct(start).sum(); };
      const auto report = moxie::testing::check_gradient(loss, scores, dscores);
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE("balance loss: the router weighs both losses and adds them") {
  const Index tokens = 12, dim = 4, length = 3;
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 509);
  const auto loss = [&](moxie::Balance balance) {
    const moxie::TopKRouter<double> router({.model_dim = dim, .experts = 5, .top_k = 2, .balance = balance});
    moxie::Parameters<double> p{moxie::Layout(router.layout())};
    moxie::test::randomize(p, 510);
    moxie::SparsePlan<double> plan;
    moxie::TopKRouter<double>::Tape tape;
    moxie::Workspace workspace;
    router.route(p.view(), {x, length}, plan, tape, workspace, moxie::Exec{});
    return tape.balance_loss();
  };
  const double expert_level = loss({.expert_level = 1});
  const double sequence_level = loss({.sequence_level = 1});
  CHECK(expert_level > 1);  // frequent experts have the larger scores
  CHECK(sequence_level > expert_level);
  CHECK(loss({}) == 0);
  CHECK(loss({.expert_level = 0.3, .sequence_level = 0.7}) ==
        doctest::Approx(0.3 * expert_level + 0.7 * sequence_level).epsilon(1e-14));
}

TEST_CASE("balance loss: a uniform gate gives alpha") {
  const Matrix<double> x = moxie::test::random<double>(12, 4, 511);
  const moxie::TopKRouter<double> router({.model_dim = 4, .experts = 5, .top_k = 2, .balance = {.expert_level = 0.01}});
  const moxie::Parameters<double> zero{moxie::Layout(router.layout())};
  moxie::SparsePlan<double> plan;
  moxie::TopKRouter<double>::Tape tape;
  moxie::Workspace workspace;
  router.route(zero.view(), {x}, plan, tape, workspace, moxie::Exec{});
  CHECK(tape.balance_loss() == doctest::Approx(0.01).epsilon(1e-14));
  // Equal logits: the lower indices are chosen.
  CHECK(plan.tokens_per_expert() == std::vector<std::int64_t>{12, 12, 0, 0, 0});
}

TEST_CASE("balance loss: negative and NaN weights are refused") {
  const auto build = [](moxie::Balance balance) {
    moxie::TopKRouter<float>({.model_dim = 4, .experts = 5, .top_k = 2, .balance = balance});
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(build({.expert_level = -0.1}), moxie::ValueError);
  CHECK_THROWS_AS(build({.sequence_level = -0.1}), moxie::ValueError);
  CHECK_THROWS_AS(build({.expert_level = nan}), moxie::ValueError);
  CHECK_THROWS_AS(build({.sequence_level = nan}), moxie::ValueError);
}

}  // namespace

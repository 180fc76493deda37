// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/balance.hpp>
#include <moxie/routing/top_k.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <numeric>
#include <support.hpp>

namespace {

using moxie::Balance;
using moxie::BalanceTotals;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::Sequences;

// A batch: logits with and without noise, their softmax, and K choices of every token.
template <class S>
struct Batch {
  Index tokens, experts, k;
  Sequences sequences;
  Matrix<S> logits, noisy, probabilities, clean;
  std::vector<Index> best, chosen;

  Batch(Index tokens_, Index experts_, Index k_, const Sequences& division, std::uint64_t seed)
      : tokens(tokens_), experts(experts_), k(k_), sequences(division.over(tokens_)) {
    logits = moxie::test::random<S>(tokens, experts, seed);
    noisy = logits + moxie::test::random<S>(tokens, experts, seed + 1, 0.3);
    take(true);
    for (Index t = 0; t < tokens; ++t) {
      for (Index j = 0; j < k; ++j) {
        chosen.push_back((best[std::size_t(t * k)] + 1 + j) % experts);  // other ones than the best
      }
    }
  }
  // What follows from the logits; the choices only if asked for.
  void take(bool choices) {
    probabilities = noisy;
    moxie::softmax_rows(RowView<S>(probabilities), {});
    clean = logits;
    moxie::softmax_rows(RowView<S>(clean), {});
    if (choices) {
      best.resize(std::size_t(tokens * k));
      for (Index t = 0; t < tokens; ++t) {
        moxie::select_top_k(&noisy(t, 0), experts, k, best.data() + t * k);
      }
    }
  }
  moxie::BalanceInput<S> input(bool count_chosen = false, double deviation = 0.3) const {
    return {sequences, k, probabilities, clean, logits, noisy, best, count_chosen ? chosen : best, deviation};
  }
  // The tokens [begin, end), which are whole sequences of that length.
  moxie::BalanceInput<S> part(Index begin, Index end, Index length) const {
    const Index n = end - begin;
    moxie::BalanceInput<S> in = input();
    in.sequences = Sequences(length).over(n);
    for (RowView<const S>* rows : {&in.probabilities, &in.clean_probabilities, &in.logits, &in.noisy_logits}) {
      *rows = rows->middle_rows(begin, n);
    }
    in.best = in.counted = in.best.subspan(std::size_t(begin * k), std::size_t(n * k));
    return in;
  }
  BalanceTotals totals(const Balance& weights) const {
    BalanceTotals sums;
    sums.clear(experts);
    moxie::Workspace workspace;
    moxie::add_balance_totals(weights, input(weights.count_chosen), experts, sums, workspace);
    return sums;
  }
  double loss(const Balance& weights) const { return totals(weights).loss(weights); }

  Index count(Index expert, Index begin, Index end, Index first_choices, const std::vector<Index>& of) const {
    Index n = 0;
    for (Index t = begin; t < end; ++t) {
      for (Index j = 0; j < first_choices; ++j) {
        n += of[std::size_t(t * k + j)] == expert ? 1 : 0;
      }
    }
    return n;
  }
  // E/(K n) Σ_i count_i mean_t p_ti over the tokens [begin, end).
  double frequency_loss(Index begin, Index end, Index first_choices, const std::vector<Index>& of) const {
    double sum = 0;
    const double n = double(end - begin);
    for (Index i = 0; i < experts; ++i) {
      const double f = double(experts) / (double(first_choices) * n) * double(count(i, begin, end, first_choices, of));
      double p = 0;
      for (Index t = begin; t < end; ++t) {
        p += double(probabilities(t, i)) / n;
      }
      sum += f * p;
    }
    return sum;
  }
};

const std::vector<Index> ragged{0, 5, 5, 6, 12};

double mean_over_sequences(const Sequences& sequences, const std::function<double(Index, Index)>& f) {
  double sum = 0;
  sequences.for_each([&](Index, Index begin, Index end) { sum += begin < end ? f(begin, end) : 0; });
  return sum / double(sequences.nonempty());
}

TEST_CASE_TEMPLATE("balance: every loss is its equation", S, float, double) {
  const double tolerance = sizeof(S) == 4 ? 1e-6 : 1e-13;
  for (const Sequences& division : {Sequences(), Sequences(4), Sequences(ragged)}) {
    const Batch<S> b(12, 6, 2, division, 521);
    const auto approx = [&](double x) { return doctest::Approx(x).epsilon(tolerance); };
    CHECK(b.loss({.expert_level = 0.5}) == approx(0.5 * b.frequency_loss(0, 12, 2, b.best)));
    CHECK(b.loss({.expert_level = 0.5, .count_chosen = true}) == approx(0.5 * b.frequency_loss(0, 12, 2, b.chosen)));
    CHECK(b.loss({.sequence_level = 2}) == approx(2 * mean_over_sequences(b.sequences, [&](Index begin, Index end) {
                                                    return b.frequency_loss(begin, end, 2, b.best);
                                                  })));
    CHECK(b.loss({.gshard = 3}) == approx(3 * mean_over_sequences(b.sequences, [&](Index begin, Index end) {
                                            return b.frequency_loss(begin, end, 1, b.best);
                                          })));
    double device = 0;
    for (Index d = 0; d < 3; ++d) {
      double f = 0, p = 0;
      for (Index i = 2 * d; i < 2 * d + 2; ++i) {
        f += 6.0 / (2.0 * 12) * double(b.count(i, 0, 12, 2, b.best)) / 2;
        p += b.probabilities.col(i).template cast<double>().mean();
      }
      device += f * p;
    }
    CHECK(b.loss({.device_level = 0.7, .devices = 3}) == approx(0.7 * device));
    double z = 0, h = 0;
    Eigen::VectorXd mean = Eigen::VectorXd::Zero(6);
    for (Index t = 0; t < 12; ++t) {
      const Eigen::VectorXd row = b.logits.row(t).template cast<double>();
      const Eigen::VectorXd p = b.probabilities.row(t).template cast<double>();
      z += std::pow(std::log(row.array().exp().sum()), 2) / 12;
      h -= (p.array() * p.array().log()).sum() / 12;
      mean += p / 12;
    }
    CHECK(b.loss({.z = 0.1}) == approx(0.1 * z));
    CHECK(b.loss({.token_entropy = 0.1}) == approx(0.1 * h));
    CHECK(b.loss({.mean_entropy = 0.1}) == approx(0.1 * (mean.array() * mean.array().log()).sum()));
    CHECK(b.loss({.importance = 0.1}) ==
          approx(0.1 * mean_over_sequences(b.sequences, [&](Index begin, Index end) {
                   const Eigen::VectorXd sum = b.clean.middleRows(begin, end - begin).template cast<double>().colwise().sum();
                   return (sum.array() - sum.mean()).square().mean() / (sum.mean() * sum.mean());
                 })));
    CHECK(b.loss({.load = 0.1}) ==
          approx(0.1 * mean_over_sequences(b.sequences, [&](Index begin, Index end) {
                   Eigen::VectorXd sum = Eigen::VectorXd::Zero(6);
                   for (Index t = begin; t < end; ++t) {
                     const double threshold = double(b.noisy(t, b.best[std::size_t(2 * t + 1)]));
                     for (Index i = 0; i < 6; ++i) {
                       sum(i) += 1 - 0.5 * std::erfc((double(b.logits(t, i)) - threshold) / 0.3 / std::sqrt(2.0));
                     }
                   }
                   return (sum.array() - sum.mean()).square().mean() / (sum.mean() * sum.mean());
                 })));
  }
}

TEST_CASE_TEMPLATE("balance: expert level is alpha for balanced counts, or uniform scores", S, float, double) {
  Batch<S> b(12, 6, 2, 3, 522);  // three tokens with two choices: every expert once in each sequence
  for (std::size_t i = 0; i < b.best.size(); ++i) {
    b.best[i] = Index(i) % 6;
  }
  for (const Balance& weights :
       {Balance{.expert_level = 0.01}, {.sequence_level = 0.01}, {.device_level = 0.01, .devices = 2}}) {
    CHECK(b.loss(weights) == doctest::Approx(0.01).epsilon(moxie::test::Tolerance<S>::layer));
  }
  Batch<S> uniform(12, 6, 2, 4, 523);
  uniform.probabilities.setConstant(S(1) / S(6));
  for (const Balance& weights :
       {Balance{.expert_level = 0.01}, {.sequence_level = 0.01}, {.device_level = 0.01, .devices = 3}, {.gshard = 0.01}}) {
    CHECK(uniform.loss(weights) == doctest::Approx(0.01).epsilon(moxie::test::Tolerance<S>::layer));
  }
}

TEST_CASE("balance: one expert for all tokens gives alpha E P_i at K = 1") {
  Batch<double> b(10, 5, 1, {}, 524);
  std::fill(b.best.begin(), b.best.end(), 3);
  const double p = b.probabilities.col(3).mean();
  CHECK(b.loss({.expert_level = 0.1}) == doctest::Approx(0.1 * 5 * p).epsilon(1e-13));
  CHECK(b.loss({.gshard = 0.1}) == doctest::Approx(0.1 * 5 * p).epsilon(1e-13));
}

const Balance each[] = {{.expert_level = 0.7},
                        {.sequence_level = 0.7},
                        {.device_level = 0.7, .devices = 3},
                        {.gshard = 0.7},
                        {.importance = 0.7},
                        {.load = 0.7},
                        {.z = 0.7},
                        {.mean_entropy = 0.7},
                        {.token_entropy = 0.7},
                        {.expert_level = 0.7, .count_chosen = true},
                        {.expert_level = 0.1,
                         .sequence_level = 0.2,
                         .device_level = 0.3,
                         .gshard = 0.4,
                         .importance = 0.5,
                         .load = 0.6,
                         .z = 0.7,
                         .mean_entropy = 0.8,
                         .token_entropy = 0.9,
                         .devices = 2}};

TEST_CASE("balance: backward matches central differences of every loss, and adds to what is there") {
  for (const Balance& weights : each) {
    for (const Sequences& division : {Sequences(), Sequences(ragged)}) {
      Batch<double> b(12, 6, 2, division, 525);
      CAPTURE(&weights - each);
      const Matrix<double> start = moxie::test::random<double>(12, 6, 526);
      Matrix<double> dp = start, dclean = start, dlogits = start, dnoisy = start;
      moxie::Workspace workspace;
      moxie::balance_backward<double>(weights, b.input(weights.count_chosen), b.totals(weights), {dp, dclean, dlogits, dnoisy},
                                      workspace);
      const auto check = [&](const char* name, Matrix<double>& value, const Matrix<double>& gradient) {
        const auto loss = [&] { return b.loss(weights) + value.cwiseProduct(start).sum(); };
        const auto report = moxie::testing::check_gradient(loss, value, gradient, {}, name);
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      };
      check("probabilities", b.probabilities, dp);
      check("clean probabilities", b.clean, dclean);
      check("logits", b.logits, dlogits);
      check("noisy logits", b.noisy, dnoisy);
    }
  }
}

TEST_CASE_TEMPLATE("balance: totals of micro-batches are those of the whole batch, to the last bit", S, float, double) {
  const Batch<S> whole(600, 7, 3, 10, 527);
  const Balance& weights = each[10];
  Balance no_devices = weights;
  no_devices.devices = 7;
  BalanceTotals sum;
  for (const auto& [begin, end] : {std::pair<Index, Index>{0, 10}, {10, 250}, {250, 250}, {250, 600}}) {
    const moxie::BalanceInput<S> part = whole.part(begin, end, 10);
    BalanceTotals totals;
    totals.clear(7);
    moxie::Workspace workspace;
    moxie::add_balance_totals(no_devices, part, 7, totals, workspace);
    sum += totals;
  }
  const BalanceTotals expected = whole.totals(no_devices);
  CHECK(sum.counts == expected.counts);
  CHECK(sum.tokens == 600);
  CHECK(sum.sequences == 60);
  for (std::size_t i = 0; i < 7; ++i) {
    CHECK(sum.scores[i].value() == expected.scores[i].value());
  }
  CHECK(sum.loss(no_devices) == expected.loss(no_devices));
}

TEST_CASE("balance: gradients of micro-batches under the totals of all are the parts of the whole gradient") {
  const Batch<double> whole(20, 6, 2, 5, 528);
  const Balance& weights = each[10];
  const BalanceTotals totals = whole.totals(weights);
  moxie::Workspace workspace;
  Matrix<double> dp = Matrix<double>::Zero(20, 6), dclean = dp, dlogits = dp, dnoisy = dp;
  moxie::balance_backward<double>(weights, whole.input(), totals, {dp, dclean, dlogits, dnoisy}, workspace);
  for (const auto& [begin, end] : {std::pair<Index, Index>{0, 5}, {5, 20}}) {
    const Index n = end - begin;
    const moxie::BalanceInput<double> part = whole.part(begin, end, 5);
    Matrix<double> a = Matrix<double>::Zero(n, 6), c = a, l = a, d = a;
    moxie::balance_backward<double>(weights, part, totals, {a, c, l, d}, workspace);
    CHECK(a == dp.middleRows(begin, n));
    CHECK(c == dclean.middleRows(begin, n));
    CHECK(l == dlogits.middleRows(begin, n));
    CHECK(d == dnoisy.middleRows(begin, n));
  }
}

TEST_CASE("balance: no tokens have no loss and no gradient") {
  const Batch<double> none(0, 6, 2, {}, 529);
  CHECK(none.loss(each[10]) == 0);
  Matrix<double> d(0, 6);
  moxie::Workspace workspace;
  moxie::balance_backward<double>(each[10], none.input(), none.totals(each[10]), {d, d, d, d}, workspace);
}

TEST_CASE("balance: totals of other experts do not add up") {
  BalanceTotals a, b;
  a.clear(3);
  b.clear(4);
  CHECK_THROWS_AS(a += b, moxie::ShapeError);
  BalanceTotals fresh;
  fresh += b;
  fresh += BalanceTotals{};
  CHECK(fresh.counts.size() == 4);
}

TEST_CASE("balance: what has not the size of the batch is refused, and totals stay as they were") {
  const Batch<double> b(12, 5, 2, Sequences(4), 545);
  const Balance all{.expert_level = 1, .gshard = 1, .importance = 1, .load = 1, .z = 1};
  const auto message = [&](auto&& change) {
    moxie::BalanceInput<double> in = b.input();
    BalanceTotals totals;
    totals.clear(5);
    change(in, totals);
    moxie::Workspace workspace;
    const std::string text =
        moxie::test::message_of<std::invalid_argument>([&] { moxie::add_balance_totals(all, in, 5, totals, workspace); });
    CHECK((text == "nothing was thrown") == (totals.tokens == 12));
    return text;
  };
  const Matrix<double> small = moxie::test::random<double>(12, 4, 546);
  std::vector<Index> wrong = b.best;
  wrong[3] = 5;
  std::vector<Index> none = b.best;
  none[3] = -1;
  CHECK(message([](auto&, auto&) {}) == "nothing was thrown");
  CHECK(message([&](auto& in, auto&) { in.counted = none; }) == "nothing was thrown");
  CHECK(message([](auto&, auto& totals) { totals = {}; }) == "add_balance_totals: counts has 0 elements, expected 5");
  CHECK(message([&](auto& in, auto&) { in.probabilities = small; }) ==
        "add_balance_totals: probabilities is (12,4), expected (12,5)");
  CHECK(message([](auto& in, auto&) { in.clean_probabilities = {}; }) ==
        "add_balance_totals: clean_probabilities is (0,0), expected (12,5)");
  CHECK(message([](auto& in, auto&) { in.noisy_logits = {}; }) == "add_balance_totals: noisy_logits is (0,0), expected (12,5)");
  CHECK(message([](auto& in, auto&) { in.best = in.best.first(23); }) ==
        "add_balance_totals: best has 23 elements, expected 24");
  CHECK(message([&](auto& in, auto&) { in.best = wrong; }) == "add_balance_totals: a choice is not one of the experts");
  CHECK(message([&](auto& in, auto&) { in.best = none; }) == "add_balance_totals: a choice is not one of the experts");
  CHECK(message([&](auto& in, auto&) { in.counted = wrong; }) ==
        "add_balance_totals: a counted choice is not one of the experts");
}

}  // namespace

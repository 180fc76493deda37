// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/top_k.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::Tokens;
using moxie::TopKOrder;
using moxie::TopKRouterConfig;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

constexpr Index dim = 6;
constexpr Index tokens = 12;
constexpr Index sequence_length = 4;

// A router with its parameters and all that a step needs.
template <class S>
struct Routed {
  moxie::TopKRouter<S> router;
  moxie::Parameters<S> p;
  moxie::SparsePlan<S> plan = {};
  typename moxie::TopKRouter<S>::Tape tape;
  moxie::Workspace workspace = {};

  explicit Routed(const TopKRouterConfig& config) : router(config), p(moxie::Layout(router.layout())) {
    moxie::test::randomize(p, 601);
  }
  void route(const Tokens<S>& in, const Exec& exec = {}) { router.route(p.view(), in, plan, tape, {workspace, exec}); }
  /// Gradients of Σ c(pair) weight(pair) + balance loss, from dx = start.
  moxie::Parameters<S> backward(const Tokens<S>& in, const Matrix<S>& c, Matrix<S>& dx, const Exec& exec = {}) {
    typename moxie::SparsePlan<S>::Gradient dplan;
    dplan.weight.resize(plan.rows());
    for (Index r = 0; r < plan.rows(); ++r) {
      dplan.weight[r] = c.data()[plan.pair(r)];
    }
    moxie::Parameters<S> dp = p;  // what is there is added to
    router.backward(p.view(), in, plan, {dplan, {}, {dx, dp}}, tape, {workspace, exec});
    dp.flat() -= p.flat();
    return dp;
  }
};

const TopKRouterConfig modes[] = {
    {.model_dim = dim, .experts = 4, .top_k = 1},
    {.model_dim = dim, .experts = 5, .top_k = 2},
    {.model_dim = dim, .experts = 5, .top_k = 2, .normalize = true, .scale = 2.5},
    {.model_dim = dim, .experts = 7, .top_k = 3, .order = TopKOrder::top_k_softmax, .scale = -0.5},
    {.model_dim = dim, .experts = 3, .top_k = 3, .order = TopKOrder::top_k_softmax},
    {.model_dim = dim, .experts = 3, .top_k = 3, .normalize = true},
    {.model_dim = dim, .experts = 5, .top_k = 2, .scale = 3, .balance = {.expert_level = 0.5}},
    {.model_dim = dim, .experts = 5, .top_k = 2, .normalize = true, .balance = {.sequence_level = 0.5}},
    {.model_dim = dim,
     .experts = 5,
     .top_k = 2,
     .order = TopKOrder::top_k_softmax,
     .balance = {.expert_level = 0.5, .sequence_level = 0.25}},
    {.model_dim = dim, .experts = 1, .top_k = 1, .balance = {.expert_level = 0.5}},
};

TEST_CASE_TEMPLATE("top-k router: weights are the equation's, in every mode", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 602);
  for (const TopKRouterConfig& mode : modes) {
    CAPTURE(mode.experts);
    CAPTURE(mode.top_k);
    Routed<S> routed(mode);
    routed.route({x, sequence_length});
    Matrix<S> weights = Matrix<S>::Zero(tokens, mode.experts);
    for (Index e = 0; e < mode.experts; ++e) {
      for (Index r = routed.plan.expert_starts()[std::size_t(e)]; r < routed.plan.expert_starts()[std::size_t(e + 1)]; ++r) {
        weights(routed.plan.token(r), e) = routed.plan.weight(r);
      }
    }
    const Matrix<double> expected =
        reference::top_k_weights(moxie::test::as_double(x), reference::tensor(moxie::test::as_double(routed.p), "gate.weight"),
                                 mode.top_k, mode.order == TopKOrder::top_k_softmax, mode.normalize, mode.scale);
    CHECK(moxie::test::relative_error(weights, expected) < Tolerance<S>::layer);
    const auto law = moxie::testing::plan_is_sorted_and_complete(routed.plan, tokens * mode.top_k);
    INFO(law.message);
    CHECK(law.holds);
    CHECK(routed.plan.dropped() == 0);
  }
}

TEST_CASE("top-k router: the tape has the softmax over all experts and the choices, best first") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 603);
  for (const TopKRouterConfig& mode : modes) {
    Routed<double> routed(mode);
    routed.route({x, sequence_length});
    const RowView<const double> s = routed.tape.scores();
    for (Index t = 0; t < tokens; ++t) {
      const reference::Vector expected = reference::softmax(routed.p["gate.weight"].eigen() * x.row(t).transpose());
      CHECK((s.eigen().row(t).transpose() - expected).norm() < Tolerance<double>::layer);
      const std::vector<Index> best = reference::top_k(expected, mode.top_k);
      CHECK(std::equal(best.begin(), best.end(), routed.tape.choices().begin() + t * mode.top_k));
    }
  }
}

TEST_CASE("top-k router: backward matches central differences in every mode, and adds to dx and dp") {
  const Matrix<double> start = moxie::test::random<double>(tokens, dim, 604);
  for (const TopKRouterConfig& mode : modes) {
    CAPTURE(mode.experts);
    CAPTURE(mode.top_k);
    Matrix<double> x = moxie::test::random<double>(tokens, dim, 605);
    const Matrix<double> c = moxie::test::random<double>(tokens, mode.top_k, 606);
    Routed<double> routed(mode);
    const Tokens<double> in{x, sequence_length};
    routed.route(in);
    const std::vector<Index> choices(routed.tape.choices().begin(), routed.tape.choices().end());
    Matrix<double> dx = start;
    const moxie::Parameters<double> dp = routed.backward(in, c, dx);
    const auto loss = [&] {
      routed.route(in, Exec{.threads = 1});
      if (!std::equal(choices.begin(), choices.end(), routed.tape.choices().begin())) {
        return std::numeric_limits<double>::quiet_NaN();  // another order of the choices, too: c is bound to it
      }
      double sum = routed.tape.balance_loss();
      for (Index r = 0; r < routed.plan.rows(); ++r) {
        sum += c.data()[routed.plan.pair(r)] * routed.plan.weight(r);
      }
      return sum;
    };
    if (mode.experts == 1) {  // a constant: s = 1
      CHECK(dx == start);
      CHECK((dp.flat() == 0).all());
      continue;
    }
    dx -= start;
    const auto of_x = moxie::testing::check_gradient(loss, x, dx, {}, "x");
    const auto of_gate = moxie::testing::check_gradient(loss, routed.p["gate.weight"], dp["gate.weight"], {}, "gate.weight");
    INFO(of_x.message());
    INFO(of_gate.message());
    CHECK(of_x.passes(moxie::test::gradient_tolerance));
    CHECK(of_gate.passes(moxie::test::gradient_tolerance));
  }
}

// Logits base + 2 of experts 0 and 1, base of the other six, so that both tokens choose the first two.
template <class S>
Matrix<S> set_sigmoid_gate(moxie::Parameters<S>& p, double base) {
  p["gate.weight"].eigen().setZero();
  p["gate.weight"].eigen().col(0).setConstant(S(1));
  p["gate.weight"].eigen().col(1).head(2) << S(2), S(2.125);
  Matrix<S> x(2, 2);
  x << S(base), 1, S(base - 0.5), 1;
  return x;
}
TopKRouterConfig sigmoid_router(const moxie::Balance& balance) {
  return {.model_dim = 2, .experts = 8, .top_k = 2, .normalize = true, .balance = balance, .score = moxie::Score::sigmoid};
}

TEST_CASE_TEMPLATE("top-k router: weights and losses of sigmoid scores keep their value where all scores vanish", S, float,
                   double) {
  Routed<S> routed(sigmoid_router({.expert_level = 1, .sequence_level = 1}));
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  for (const double base : {0.0, -3.0, -40.0, -50.0, -60.0, -100.0, -500.0, -1e4}) {
    CAPTURE(base);
    const Matrix<S> x = set_sigmoid_gate(routed.p, base);
    routed.route({x});
    double loss = 0;
    for (Index t = 0; t < 2; ++t) {
      // Far below 0 a sigmoid is an exponential: the ratios are those of a softmax.
      const auto score = [&](double z) { return x(t, 0) < -30 ? std::exp(z) : sigmoid(double(x(t, 0)) + z); };
      const double chosen = score(2) + score(2.125);
      loss += 2 * 4.0 * chosen / (chosen + 6 * score(0)) / 2;
      CHECK(routed.tape.choices()[std::size_t(2 * t)] == 1);
      for (const Index r : routed.plan.rows_of_token(t)) {
        const double expected = score(routed.plan.pair(r) % 2 == 0 ? 2.125 : 2) / chosen;
        CHECK(double(routed.plan.weight(r)) == doctest::Approx(expected).epsilon(Tolerance<S>::layer));
      }
    }
    CHECK(routed.tape.balance_loss() == doctest::Approx(loss).epsilon(Tolerance<S>::layer));
  }
}

TEST_CASE("top-k router: backward of sigmoid scores matches central differences where all scores vanish") {
  const Matrix<double> c = moxie::test::random<double>(2, 2, 614);
  const moxie::Balance losses[] = {
      {}, {.expert_level = 1, .sequence_level = 0.5}, {.importance = 1, .mean_entropy = 0.5, .token_entropy = 0.25}};
  for (const moxie::Balance& balance : losses) {
    for (const double base : {0.0, -3.0, -45.0, -60.0, -500.0, -1e4}) {
      CAPTURE(base);
      Routed<double> routed(sigmoid_router(balance));
      const Matrix<double> x = set_sigmoid_gate(routed.p, base);
      const Tokens<double> in(x);
      routed.route(in);
      Matrix<double> dx = Matrix<double>::Zero(2, 2);
      moxie::Parameters<double> dp = routed.backward(in, c, dx);
      const auto loss = [&] {
        routed.route(in, Exec{.threads = 1});
        double sum = routed.tape.balance_loss();
        for (Index r = 0; r < routed.plan.rows(); ++r) {
          sum += c.data()[routed.plan.pair(r)] * routed.plan.weight(r);
        }
        return sum;
      };
      // The column that does not multiply the base: a step of the other one would be as large as the logits.
      Matrix<double> gate = routed.p["gate.weight"].eigen().col(1);
      const Matrix<double> dgate = dp["gate.weight"].eigen().col(1);
      const auto report = moxie::testing::check_gradient(
          [&] {
            routed.p["gate.weight"].eigen().col(1) = gate;
            return loss();
          },
          gate, dgate);
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
      CHECK(dgate.norm() > 1e-3);
    }
  }
}

TEST_CASE("top-k router: a token's weights have a gradient to that token alone") {
  const Matrix<double> x = moxie::test::random<double>(2, dim, 607);
  Routed<double> routed(modes[1]);
  routed.route({x});
  Matrix<double> c = Matrix<double>::Zero(2, 2);
  Matrix<double> dx = Matrix<double>::Zero(2, dim);
  c(1, 0) = 1;
  routed.backward({x}, c, dx);
  CHECK((dx.row(0).array() == 0).all());
  CHECK((dx.row(1).array() != 0).any());
}

TEST_CASE_TEMPLATE("top-k router: equal logits are chosen in order of index", S, float, double) {
  for (const TopKOrder order : {TopKOrder::softmax_top_k, TopKOrder::top_k_softmax}) {
    Routed<S> routed({.model_dim = dim, .experts = 5, .top_k = 3, .order = order});
    routed.p["gate.weight"].eigen().row(3) = routed.p["gate.weight"].eigen().row(1);
    routed.p["gate.weight"].eigen().row(4) = routed.p["gate.weight"].eigen().row(1);
    const Matrix<S> x = moxie::test::random<S>(50, dim, 608);
    routed.route({x});
    for (Index t = 0; t < 50; ++t) {
      const auto chosen = routed.tape.choices().subspan(std::size_t(3 * t), 3);
      std::vector<Index> equal;
      for (const Index e : chosen) {
        if (e == 1 || e == 3 || e == 4) {
          equal.push_back(e);
        }
      }
      const std::vector<Index> in_order{1, 3, 4};
      CHECK(std::equal(equal.begin(), equal.end(), in_order.begin()));
      CHECK(!equal.empty());
    }
  }
}

TEST_CASE_TEMPLATE("top-k router: logits are compared, not scores, which may be equal by rounding", S, float, double) {
  for (const TopKOrder order : {TopKOrder::softmax_top_k, TopKOrder::top_k_softmax}) {
    Routed<S> routed({.model_dim = 1, .experts = 4, .top_k = 2, .order = order});
    routed.p["gate.weight"].eigen() << -2001, 0, -3000, -2000;  // but for the second, all scores are 0
    const Matrix<S> x = Matrix<S>::Ones(1, 1);
    routed.route({x});
    CHECK(routed.tape.scores()(0, 3) == S(0));
    CHECK(routed.tape.choices()[0] == 1);
    CHECK(routed.tape.choices()[1] == 3);
  }
}

TEST_CASE("top-k router: only the balance loss reaches experts that were not chosen, when logits are selected first") {
  const Matrix<double> x = moxie::test::random<double>(1, dim, 609);
  Routed<double> routed({.model_dim = dim, .experts = 5, .top_k = 2, .order = TopKOrder::top_k_softmax});
  routed.route({x});
  Matrix<double> dx = Matrix<double>::Zero(1, dim);
  const moxie::Parameters<double> dp = routed.backward({x}, moxie::test::random<double>(1, 2, 610), dx);
  for (Index e = 0; e < 5; ++e) {
    const bool chosen = routed.tape.choices()[0] == e || routed.tape.choices()[1] == e;
    CHECK((dp["gate.weight"].eigen().row(e).array() != 0).any() == chosen);
  }
}

TEST_CASE_TEMPLATE("top-k router: the same bits for any number of threads, forward and backward", S, float, double) {
  const Index many = 500;
  const Matrix<S> x = moxie::test::random<S>(many, dim, 611);
  for (const TopKRouterConfig& mode : {modes[2], modes[8]}) {
    const Matrix<S> c = moxie::test::random<S>(many, mode.top_k, 612);
    Routed<S> one(mode), seven(mode);
    Matrix<S> dx_one = Matrix<S>::Zero(many, dim), dx_seven = dx_one;
    const Tokens<S> in{x, 5};
    one.route(in, Exec{1});
    seven.route(in, Exec{7});
    const auto dp_one = one.backward(in, c, dx_one, Exec{1});
    const auto dp_seven = seven.backward(in, c, dx_seven, Exec{7});
    CHECK(std::ranges::equal(one.tape.choices(), seven.tape.choices()));
    CHECK(moxie::testing::detail::same_bits<S>(one.tape.scores(), seven.tape.scores()));
    CHECK(one.tape.balance_loss() == seven.tape.balance_loss());
    CHECK(moxie::test::same_bits(dx_one, dx_seven));
    CHECK((dp_one.flat() == dp_seven.flat()).all());
  }
}

TEST_CASE("top-k router: one that was refused a batch names the token; no plan is made of it") {
  Routed<float> routed(modes[1]);
  Matrix<float> x = moxie::test::random<float>(tokens, dim, 613);
  routed.route({x});
  const std::vector<Index> before(routed.plan.token().begin(), routed.plan.token().end());
  x(9, 5) = std::numeric_limits<float>::infinity();
  x(10, 0) = std::numeric_limits<float>::quiet_NaN();
  CHECK(moxie::test::message_of<moxie::ValueError>([&] { routed.route({x}); }) ==
        "TopKRouter::route: the logits of token 9 are not finite");
  CHECK(std::ranges::equal(routed.plan.token(), before));
}

TEST_CASE("top-k router: options that make no router are refused") {
  const auto message = [](const TopKRouterConfig& config) {
    return moxie::test::message_of<moxie::ValueError>([&] { moxie::TopKRouter<float>{config}; });
  };
  using moxie::test::contains;
  CHECK(contains(message({.model_dim = 0, .experts = 4}), "model_dim is 0"));
  CHECK(contains(message({.model_dim = 4, .experts = 0}), "experts is 0"));
  CHECK(contains(message({.model_dim = 4, .experts = 4, .top_k = 0}), "top_k is 0"));
  CHECK(contains(message({.model_dim = 4, .experts = 4, .top_k = 5}), "top_k is 5, expected at most the 4 experts"));
  CHECK(contains(message({.model_dim = 4, .experts = 4, .scale = std::numeric_limits<double>::infinity()}), "scale"));
  CHECK(contains(message({.model_dim = 4, .experts = 4, .scale = std::numeric_limits<double>::quiet_NaN()}), "scale"));
  CHECK(contains(message({.model_dim = 4, .experts = 4, .top_k = 1, .normalize = true}), "gets no gradient from the output"));
  CHECK(contains(message({.model_dim = 4, .experts = 4, .top_k = 1, .order = TopKOrder::top_k_softmax}),
                 "gets no gradient from the output"));
  CHECK(message({.model_dim = 4, .experts = 1, .top_k = 1, .normalize = true}) == "nothing was thrown");
  CHECK(message({.model_dim = 4, .experts = 4, .top_k = 1, .normalize = true, .allow_constant_weights = true}) ==
        "nothing was thrown");
}

TEST_CASE("top-k router: the gate starts uniform on ±1/√D") {
  const moxie::TopKRouter<double> router({.model_dim = 64, .experts = 50});
  moxie::Parameters<double> p{moxie::Layout(router.layout())};
  router.initialize(p.view(), moxie::Rng(3));
  const auto gate = p["gate.weight"].eigen();
  CHECK(gate.cwiseAbs().maxCoeff() <= 0.125);
  CHECK(gate.cwiseAbs().maxCoeff() > 0.12);
  CHECK(std::abs(gate.mean()) < 5 * 0.125 / std::sqrt(3.0 * 3200));
}

TEST_CASE_TEMPLATE("top-k router: its own choices, given back, make the same plan and losses", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 615);
  for (const TopKRouterConfig& mode : modes) {
    Routed<S> routed(mode), again(mode);
    routed.route({x, sequence_length});
    Tokens<S> in(x, sequence_length);
    in.chosen = RowView<const Index>(routed.tape.choices().data(), tokens, mode.top_k);
    again.route(in);
    CHECK(std::ranges::equal(again.plan.token(), routed.plan.token()));
    CHECK(std::ranges::equal(again.plan.expert_starts(), routed.plan.expert_starts()));
    for (Index r = 0; r < routed.plan.rows(); ++r) {
      CHECK(again.plan.weight(r) == routed.plan.weight(r));
    }
    CHECK(again.tape.balance_loss() == routed.tape.balance_loss());
  }
}

TEST_CASE("top-k router: experts chosen elsewhere have live weights with a gradient, and no choice has none") {
  Matrix<Index> chosen(4, 3);
  chosen << 4, 0, 2, 1, -1, 3, -1, -1, -1, -1, 2, -1;
  const Matrix<double> c = moxie::test::random<double>(4, 3, 616);
  for (const moxie::Score score : {moxie::Score::softmax, moxie::Score::sigmoid}) {
    for (const bool normalize : {false, true}) {
      Matrix<double> x = moxie::test::random<double>(4, dim, 617);
      Routed<double> routed({.model_dim = dim,
                             .experts = 5,
                             .top_k = 2,
                             .normalize = normalize,
                             .scale = 2,
                             .balance = {.expert_level = 0.5, .importance = 0.2, .count_chosen = true},
                             .score = score,
                             .groups = {.count = 5, .chosen = 2}});
      Tokens<double> in(x);
      in.chosen = chosen;
      routed.route(in);
      CHECK(routed.plan.rows() == 6);
      CHECK(routed.tape.top_k() == 3);
      CHECK(routed.tape.times_chosen() == std::vector<std::int64_t>{1, 1, 2, 1, 1});
      CHECK(routed.plan.rows_of_token(2).empty());
      for (const Index t : {0, 1, 3}) {
        double sum = 0;
        for (const Index r : routed.plan.rows_of_token(t)) {
          sum += routed.plan.weight(r);
        }
        CHECK((std::abs(sum - 2) < 1e-14) == normalize);  // without what was not chosen
      }
      Matrix<double> dx = Matrix<double>::Zero(4, dim);
      const moxie::Parameters<double> dp = routed.backward(in, c, dx);
      const auto loss = [&] {
        routed.route(in, Exec{.threads = 1});
        double sum = routed.tape.balance_loss();
        for (Index r = 0; r < routed.plan.rows(); ++r) {
          sum += c.data()[routed.plan.pair(r)] * routed.plan.weight(r);
        }
        return sum;
      };
      for (const auto& report :
           {moxie::testing::check_gradient(loss, x, dx, {}, "x"),
            moxie::testing::check_gradient(loss, routed.p["gate.weight"], dp["gate.weight"], {}, "gate")}) {
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      }
    }
  }
}

TEST_CASE("top-k router: choices that it could not have are refused") {
  const Matrix<double> x = moxie::test::random<double>(2, dim, 618);
  const auto message = [&](const Matrix<Index>& chosen, Index top_k, bool normalize) {
    Routed<double> routed({.model_dim = dim, .experts = 3, .top_k = 2, .normalize = normalize});
    Tokens<double> in(x);
    in.chosen = chosen;
    in.top_k = top_k;
    return moxie::test::message_of<std::invalid_argument>([&] { routed.route(in); });
  };
  const auto of = [](std::initializer_list<Index> list) {
    Matrix<Index> m(2, Index(list.size()) / 2);
    std::copy(list.begin(), list.end(), m.data());
    return m;
  };
  CHECK(message(of({0, 1, 2, -1}), 2, true) == "nothing was thrown");
  CHECK(message(of({0, 1, 2, 3}), 0, true) == "TopKRouter::route: choice 1 of token 1 is expert 3, which is none");
  CHECK(message(of({0, 0, 1, 2}), 0, true) == "TopKRouter::route: choice 1 of token 0 is expert 0, which it has chosen before");
  CHECK(message(of({0, 1, 2, 1}), 1, true) == "TopKRouter::route: top_k is not the number of columns of chosen");
  CHECK(moxie::test::contains(message(of({0, 1}), 0, true), "gets no gradient from the output"));
  CHECK(message(of({0, 1}), 0, false) == "nothing was thrown");
  CHECK(moxie::test::contains(message(of({0, 1, 2, -1, 0, 1, 2, -1}), 0, false), "top_k is 4, expected at most the 3 experts"));
}

TEST_CASE("top-k router: a capacity is of each sequence, or of all tokens of a call, and its factor may be that of a call") {
  const Matrix<double> x = Matrix<double>::Ones(12, dim);  // all choose the same expert
  const auto rows = [&](const moxie::Capacity& capacity, double factor_of_call) {
    Routed<double> routed({.model_dim = dim, .experts = 4, .capacity = capacity});
    Tokens<double> in(x, 3);
    in.capacity_factor = factor_of_call;
    routed.route(in);
    std::vector<Index> tokens_of_row(routed.plan.token().begin(), routed.plan.token().end());
    return tokens_of_row;
  };
  using Rows = std::vector<Index>;
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(rows({.factor = 1}, 0) == Rows{0, 3, 6, 9});                                       // ⌈3/4⌉ of each
  CHECK(rows({.factor = 1, .group = moxie::Grouping::call}, 0) == Rows{0, 1, 2});          // ⌈12/4⌉ of all
  CHECK(rows({.factor = 1, .group = moxie::Grouping::call}, 1.5) == Rows{0, 1, 2, 3, 4});  // ⌈18/4⌉
  CHECK(rows({.factor = 1}, 2) == Rows{0, 1, 3, 4, 6, 7, 9, 10});
  CHECK(rows({}, 1) == Rows{0, 3, 6, 9});
  CHECK(rows({.factor = 1}, infinity).size() == 12);
}

}  // namespace

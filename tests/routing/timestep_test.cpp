// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/timestep.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::TimestepRouterConfig;
using moxie::Tokens;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

constexpr Index model_dim = 3;  // the router does not look at tokens
constexpr Index condition_dim = 5;

struct Mode {
  Index experts;
  Index top_k;
};
const Mode modes[] = {{3, 1}, {5, 2}, {4, 4}, {1, 1}, {7, 3}};

TimestepRouterConfig config_of(const Mode& mode) { return {condition_dim, mode.experts, mode.top_k}; }

// Sequences of 3, 0, 1 and 4 tokens.
const std::vector<Index> ragged{0, 3, 3, 4, 8};
constexpr Index tokens = 8;
constexpr Index sequences = 4;

template <class S>
Tokens<S> tokens_of(const Matrix<S>& x, const Matrix<S>& condition, const moxie::Sequences& division) {
  Tokens<S> in(x, division);
  in.condition = condition;
  return in;
}

template <class S>
struct Routed {
  moxie::TimestepRouter<S> router;
  moxie::Parameters<S> p;
  moxie::SparsePlan<S> plan = {};
  typename moxie::TimestepRouter<S>::Tape tape;
  moxie::Workspace workspace = {};

  explicit Routed(const Mode& mode) : router(config_of(mode)), p(moxie::Layout(router.layout())) {
    moxie::test::randomize(p, 601);
  }
  void route(const Tokens<S>& in, const Exec& exec = {}) { router.route(p.view(), in, plan, tape, {workspace, exec}); }
  /// The gradient of Σ_r w_r u_pair(r), and of what was added to the scores'.
  moxie::Parameters<S> backward(const Tokens<S>& in, const Matrix<S>& u, Matrix<S>& dx, RowView<S> dcondition,
                                RowView<const S> dlogits = {}, const Exec& exec = {}) {
    typename moxie::SparsePlan<S>::Gradient dplan;
    dplan.weight.resize(plan.rows());
    for (Index r = 0; r < plan.rows(); ++r) {
      dplan.weight[r] = u.data()[plan.pair(r)];
    }
    moxie::Parameters<S> dp = p;  // what is there is added to
    router.backward(p.view(), in, plan, {dplan, dlogits, {{dx, dcondition}, dp}}, tape, {workspace, exec});
    dp.flat() -= p.flat();
    return dp;
  }
};

TEST_CASE_TEMPLATE("timestep router: the scores are the softmax of the gate, and the K largest are chosen", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 602);
  const Matrix<S> c = moxie::test::random<S>(sequences, condition_dim, 603);
  for (const Mode& mode : modes) {
    CAPTURE(mode.experts);
    Routed<S> routed(mode);
    routed.route(tokens_of(x, c, ragged));
    const moxie::Parameters<double> p = moxie::test::as_double(routed.p);
    Matrix<double> expected(sequences, mode.experts);
    for (Index b = 0; b < sequences; ++b) {
      const reference::Vector activated = c.row(b).template cast<double>().transpose().unaryExpr(&reference::silu);
      expected.row(b) = reference::softmax(reference::tensor(p, "gate.weight") * activated + reference::vector(p, "gate.bias"));
      const std::vector<Index> best = reference::top_k(expected.row(b).transpose(), mode.top_k);
      for (Index k = 0; k < mode.top_k; ++k) {
        CHECK(routed.tape.choices()[std::size_t(b * mode.top_k + k)] == best[std::size_t(k)]);
      }
    }
    CHECK(moxie::test::relative_error(Matrix<S>(routed.tape.scores().eigen()), expected) < Tolerance<S>::layer);
    CHECK(routed.tape.balance_loss() == 0);
  }
}

TEST_CASE_TEMPLATE("timestep router: all tokens of a sequence go to its experts with its scores", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 604);
  for (const Mode& mode : modes) {
    for (const moxie::Sequences& division : {moxie::Sequences(ragged), moxie::Sequences(2), moxie::Sequences()}) {
      const Index count = division.over(tokens).count();
      const Matrix<S> c = moxie::test::random<S>(count, condition_dim, 605);
      Routed<S> routed(mode);
      const Tokens<S> in = tokens_of(x, c, division);
      routed.route(in);
      const auto law = moxie::testing::plan_is_sorted_and_complete(routed.plan, tokens * mode.top_k);
      INFO(law.message);
      CHECK(law.holds);
      CHECK(routed.plan.dropped() == 0);
      in.sequences.for_each([&](Index b, Index begin, Index end) {
        for (Index t = begin; t < end; ++t) {
          Index k = 0;
          for (const Index r : routed.plan.rows_of_token(t)) {
            const Index expert = routed.tape.choices()[std::size_t(b * mode.top_k + k++)];
            CHECK(r >= routed.plan.expert_starts()[std::size_t(expert)]);
            CHECK(r < routed.plan.expert_starts()[std::size_t(expert) + 1]);
            CHECK(routed.plan.weight(r) == routed.tape.scores()(b, expert));
          }
          CHECK(k == mode.top_k);
        }
      });
    }
  }
}

TEST_CASE("timestep router: of equal scores the lower index is chosen") {
  Routed<double> routed({5, 3});
  routed.p.set_zero();
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 606);
  const Matrix<double> c = moxie::test::random<double>(sequences, condition_dim, 607);
  routed.route(tokens_of(x, c, ragged));
  const auto choices = routed.tape.choices();
  CHECK(std::vector<Index>(choices.begin(), choices.begin() + 3) == std::vector<Index>{0, 1, 2});
  CHECK(routed.plan.tokens_per_expert() == std::vector<std::int64_t>{8, 8, 8, 0, 0});
  CHECK(routed.tape.scores()(2, 4) == doctest::Approx(0.2).epsilon(1e-15));
}

TEST_CASE("timestep router: backward matches central differences, and adds to the condition's gradient and dp") {
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 608);
  for (const Mode& mode : modes) {
    for (const bool of_logits : {false, true}) {
      CAPTURE(mode.experts);
      CAPTURE(of_logits);
      Matrix<double> c = moxie::test::random<double>(sequences, condition_dim, 609);
      const Matrix<double> u = moxie::test::random<double>(tokens, mode.top_k, 610);
      const Matrix<double> v = moxie::test::random<double>(sequences, mode.experts, 611);
      const Tokens<double> in = tokens_of(x, c, ragged);
      Routed<double> routed(mode);
      routed.route(in);
      const Matrix<double> start = moxie::test::random<double>(sequences, condition_dim, 612);
      Matrix<double> dx = moxie::test::untouched<double>(tokens, model_dim);
      Matrix<double> dc = start;
      const auto dp = routed.backward(in, u, dx, dc, of_logits ? v : Matrix<double>());
      dc -= start;
      CHECK(moxie::test::is_untouched(dx));  // tokens do not decide
      const auto choices = routed.tape.choices();
      const std::vector<Index> chosen(choices.begin(), choices.end());
      const auto loss = [&] {
        routed.route(in, Exec{.threads = 1});
        REQUIRE(std::ranges::equal(chosen, routed.tape.choices()));
        double sum = of_logits ? routed.tape.logits().eigen().cwiseProduct(v).sum() : 0;
        for (Index r = 0; r < routed.plan.rows(); ++r) {
          sum += routed.plan.weight(r) * u.data()[routed.plan.pair(r)];
        }
        return sum;
      };
      std::vector<moxie::testing::GradientReport> reports{moxie::testing::check_gradient(loss, c, dc, {}, "condition")};
      moxie::zip(
          [&](const moxie::TensorInfo& info, RowView<double> value, RowView<const double> gradient) {
            reports.push_back(moxie::testing::check_gradient(loss, value, gradient, {}, info.name));
          },
          routed.p, dp);
      CHECK(reports.size() == 3);
      for (const auto& report : reports) {
        INFO(report.message());
        CHECK((report.passes(moxie::test::gradient_tolerance) || (mode.experts == 1 && !of_logits)));
      }
      if (mode.experts == 1 && !of_logits) {  // its score is always 1
        CHECK(dc.cwiseAbs().maxCoeff() < 1e-15);
        CHECK(dp.flat().abs().maxCoeff() < 1e-15);
      }
    }
  }
}

TEST_CASE("timestep router: without a place for the condition's gradient the parameters' is the same") {
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 616);
  const Matrix<double> c = moxie::test::random<double>(sequences, condition_dim, 617);
  const Matrix<double> u = moxie::test::random<double>(tokens, 2, 618);
  const Tokens<double> in = tokens_of(x, c, ragged);
  Routed<double> routed({5, 2});
  routed.route(in);
  Matrix<double> dx = Matrix<double>::Zero(tokens, model_dim);
  Matrix<double> dc = Matrix<double>::Zero(sequences, condition_dim);
  const auto with = routed.backward(in, u, dx, dc);
  const auto without = routed.backward(in, u, dx, {});
  CHECK((with.flat() == without.flat()).all());
  CHECK((with.flat() != 0).any());
}

TEST_CASE("timestep router: a call may take another K, up to E") {
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 619);
  const Matrix<float> c = moxie::test::random<float>(sequences, condition_dim, 620);
  Tokens<float> in = tokens_of(x, c, ragged);
  Routed<float> routed({5, 2});
  in.top_k = 4;
  routed.route(in);
  CHECK(routed.plan.rows() == 4 * tokens);
  CHECK(routed.tape.choices().size() == 4 * sequences);
  in.top_k = 6;
  CHECK_THROWS_AS(routed.route(in), moxie::ValueError);
}

TEST_CASE("timestep router: sequences without tokens are scored too, such as one for each timestep") {
  const Index timesteps = 20;
  const std::vector<Index> starts(std::size_t(timesteps + 1), 0);
  const Matrix<double> none(0, model_dim);
  const Matrix<double> c = moxie::test::random<double>(timesteps, condition_dim, 621);
  Routed<double> routed({5, 2});
  routed.route(tokens_of(none, c, starts));
  CHECK(routed.plan.rows() == 0);
  CHECK(routed.tape.scores().rows() == timesteps);
  const auto choices = routed.tape.choices();
  CHECK(choices.size() == 2 * timesteps);
  CHECK((routed.tape.scores().eigen().rowwise().sum().array() - 1).abs().maxCoeff() < 1e-15);
  for (Index b = 0; b < timesteps; ++b) {
    CHECK(routed.tape.scores()(b, choices[std::size_t(2 * b)]) == routed.tape.scores().eigen().row(b).maxCoeff());
  }
  Routed<double> of_nothing({5, 2});
  const Matrix<double> no_condition(0, condition_dim);
  of_nothing.route(tokens_of(none, no_condition, 4));
  CHECK(of_nothing.plan.rows() == 0);
}

TEST_CASE_TEMPLATE("timestep router: the same bits for any number of threads, forward and backward", S, float, double) {
  const Index many = 640;
  const Matrix<S> x = moxie::test::random<S>(many, model_dim, 622);
  const Matrix<S> c = moxie::test::random<S>(many / 4, condition_dim, 623);
  const Matrix<S> u = moxie::test::random<S>(many, 3, 624);
  const Tokens<S> in = tokens_of(x, c, 4);
  Routed<S> one({7, 3}), seven({7, 3});
  one.route(in, Exec{1});
  seven.route(in, Exec{7});
  Matrix<S> dx = Matrix<S>::Zero(many, model_dim);
  Matrix<S> dc_one = Matrix<S>::Zero(many / 4, condition_dim), dc_seven = dc_one;
  const auto dp_one = one.backward(in, u, dx, dc_one, {}, Exec{1});
  const auto dp_seven = seven.backward(in, u, dx, dc_seven, {}, Exec{7});
  CHECK(moxie::testing::detail::same_bits<S>(one.tape.scores(), seven.tape.scores()));
  CHECK(std::ranges::equal(one.tape.choices(), seven.tape.choices()));
  CHECK(moxie::test::same_bits(dc_one, dc_seven));
  CHECK((dp_one.flat() == dp_seven.flat()).all());
}

TEST_CASE("timestep router: conditions of other shapes, or that are not finite, are refused") {
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 625);
  Routed<float> routed({5, 2});
  const auto shape = [&](Index rows, Index cols) {
    const Matrix<float> c = Matrix<float>::Zero(rows, cols);
    return moxie::test::message_of<moxie::ShapeError>([&] { routed.route(tokens_of(x, c, ragged)); });
  };
  CHECK(shape(3, 5) == "TimestepRouter::route: condition is (3,5), expected (4,5)");
  CHECK(shape(4, 6) == "TimestepRouter::route: condition is (4,6), expected (4,5)");
  CHECK(shape(0, 0) == "TimestepRouter::route: condition is (0,0), expected (4,5)");
  Matrix<float> c = moxie::test::random<float>(sequences, condition_dim, 626);
  c(2, 3) = std::numeric_limits<float>::quiet_NaN();
  CHECK(moxie::test::message_of<moxie::ValueError>([&] { routed.route(tokens_of(x, c, ragged)); }) ==
        "TimestepRouter::route: the logits of sequence 2 are not finite");
}

TEST_CASE("timestep router: sizes that make no router are refused by name") {
  using moxie::test::contains;
  const auto build = [](Index dim, Index experts, Index k) {
    return moxie::test::message_of<moxie::ValueError>([=] { moxie::TimestepRouter<float>({dim, experts, k}); });
  };
  CHECK(contains(build(0, 3, 1), "condition_dim is 0"));
  CHECK(contains(build(4, 0, 1), "experts is 0"));
  CHECK(contains(build(4, 3, 0), "top_k is 0"));
  CHECK(contains(build(4, 3, 4), "top_k is more than there are experts"));
}

TEST_CASE("timestep router: starts with uniform weights within ±√(6 / (C + E)) and biases of zero") {
  const moxie::TimestepRouter<double> router({.condition_dim = 60, .experts = 36, .top_k = 2});
  moxie::Parameters<double> p{moxie::Layout(router.layout())};
  moxie::test::randomize(p, 629);
  router.initialize(p.view(), moxie::Rng(4));
  CHECK(p["gate.bias"].eigen().isZero(0));
  CHECK(p["gate.weight"].rows() == 36);
  CHECK(p["gate.weight"].cols() == 60);
  CHECK(p["gate.weight"].eigen().maxCoeff() < 0.25);
  CHECK(p["gate.weight"].eigen().maxCoeff() > 0.245);
  CHECK(p["gate.weight"].eigen().minCoeff() > -0.2501);
  CHECK(p["gate.weight"].eigen().minCoeff() < -0.245);
}

}  // namespace

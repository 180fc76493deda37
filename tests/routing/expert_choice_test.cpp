// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/expert_choice.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::ExpertChoiceRouterConfig;
using moxie::Index;
using moxie::Matrix;
using moxie::Tokens;
namespace reference = moxie::test::reference;

constexpr Index dim = 5;

template <class S>
struct Routed {
  moxie::ExpertChoiceRouter<S> router;
  moxie::Parameters<S> p;
  moxie::SparsePlan<S> plan = {};
  typename moxie::ExpertChoiceRouter<S>::Tape tape;
  moxie::Workspace workspace = {};

  explicit Routed(const ExpertChoiceRouterConfig& config) : router(config), p(moxie::Layout(router.layout())) {
    moxie::test::randomize(p, 681);
  }
  void route(const Tokens<S>& in, const moxie::Exec& exec = {}) { router.route(p.view(), in, plan, tape, {workspace, exec}); }
};

TEST_CASE_TEMPLATE("expert choice: every expert takes its best tokens of each sequence, and the load is even", S, float,
                   double) {
  const Matrix<S> x = moxie::test::random<S>(12, dim, 682);
  Routed<S> routed({.model_dim = dim, .experts = 3, .capacity = {.factor = 1.5}});
  routed.route({x, 6});
  CHECK(routed.router.capacity(6) == 3);
  CHECK(routed.plan.tokens_per_expert() == std::vector<std::int64_t>{6, 6, 6});
  CHECK(routed.plan.dropped() == 0);
  const auto law = moxie::testing::plan_is_sorted_and_complete(routed.plan, 18);
  INFO(law.message);
  CHECK(law.holds);
  for (Index b = 0; b < 2; ++b) {
    for (Index e = 0; e < 3; ++e) {
      reference::Vector column(6);
      for (Index i = 0; i < 6; ++i) {
        column(i) = double(routed.tape.scores()(6 * b + i, e));
      }
      const std::vector<Index> best = reference::top_k(column, 3);
      for (Index c = 0; c < 3; ++c) {
        CHECK(routed.tape.choices()[std::size_t((b * 3 + e) * 3 + c)] == 6 * b + best[std::size_t(c)]);
      }
    }
  }
}

TEST_CASE("expert choice: equal scores go to the lower token, and no expert takes more tokens than there are") {
  const Matrix<double> x = Matrix<double>::Ones(5, dim);
  Routed<double> routed({.model_dim = dim, .experts = 2, .capacity = {.factor = 1}});
  routed.route({x});
  CHECK(std::ranges::equal(routed.tape.choices(), std::vector<Index>{0, 1, 2, 0, 1, 2}));
  Routed<double> all({.model_dim = dim, .experts = 2, .capacity = {.factor = 1, .multiple_of = 8}});
  all.route({x});
  CHECK(all.plan.rows() == 10);
}

TEST_CASE("expert choice: bad options and batches are refused") {
  const auto message = [](const ExpertChoiceRouterConfig& config) {
    return moxie::test::message_of<moxie::ValueError>([&] { moxie::ExpertChoiceRouter<float>{config}; });
  };
  CHECK_THROWS_AS(moxie::ExpertChoiceRouter<float>({.model_dim = 0, .experts = 2}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::ExpertChoiceRouter<float>({.model_dim = 2, .experts = 0}), moxie::ValueError);
  CHECK(moxie::test::contains(message({.model_dim = 2, .experts = 2, .capacity = {.factor = 0}}), "above 0"));
  CHECK(moxie::test::contains(
      message({.model_dim = 2, .experts = 2, .capacity = {.factor = 1, .priority = moxie::Priority::weight}}), "priority"));
  Matrix<double> x = moxie::test::random<double>(6, dim, 683);
  Routed<double> routed({.model_dim = dim, .experts = 4, .capacity = {.factor = 1, .rounding = moxie::Rounding::round}});
  CHECK_THROWS_AS(routed.route({x, 1}), moxie::ValueError);  // 0.25 tokens
  Tokens<double> in(x);
  in.top_k = 2;
  CHECK_THROWS_AS(routed.route(in), moxie::ValueError);
  x(2, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ValueError>([&] { routed.route({x}); }), "token 2"));
}

TEST_CASE("expert choice: experts choose from each sequence or from all tokens of a call, as many as the call says") {
  const Matrix<double> x = Matrix<double>::Ones(6, dim);  // ties: the lower tokens
  const auto taken = [&](const moxie::Capacity& capacity, double factor_of_call) {
    Routed<double> routed({.model_dim = dim, .experts = 2, .capacity = capacity, .scale = 3});
    Tokens<double> in(x, 3);
    in.capacity_factor = factor_of_call;
    routed.route(in);
    CHECK(routed.plan.weight(0) == doctest::Approx(3 * routed.tape.scores()(0, 0)));
    const auto of_first = routed.plan.token().first(std::size_t(routed.plan.expert_starts()[1]));
    return std::vector<Index>(of_first.begin(), of_first.end());
  };
  using List = std::vector<Index>;
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(taken({.factor = 1}, 0) == List{0, 1, 3, 4});  // ⌈3/2⌉ of each
  CHECK(taken({.factor = 1, .group = moxie::Grouping::call}, 0) == List{0, 1, 2});
  CHECK(taken({.factor = 1, .group = moxie::Grouping::call}, 0.3) == List{0});
  CHECK(taken({.factor = 1}, 0.5) == List{0, 3});
  CHECK(taken({.factor = 1}, infinity).size() == 6);
}

}  // namespace

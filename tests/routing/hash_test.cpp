// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/hash.hpp>
#include <support.hpp>

namespace {

using moxie::HashRouter;
using moxie::Index;
using moxie::Matrix;
using moxie::Tokens;

template <class S>
moxie::SparsePlan<S> plan_of(const HashRouter<S>& router, const Tokens<S>& in) {
  moxie::SparsePlan<S> plan;
  typename HashRouter<S>::Tape tape;
  moxie::Workspace workspace;
  router.route({}, in, plan, tape, workspace);
  return plan;
}

TEST_CASE("hash router: the expert depends on the id and the seed alone, and ids are spread evenly") {
  const HashRouter<float> router({.experts = 8, .seed = 3});
  std::vector<std::int64_t> count(8, 0);
  int other = 0;
  for (std::int64_t id = -5000; id < 5000; ++id) {
    const Index e = router.expert_of(id);
    CHECK(e == router.expert_of(id));
    ++count[std::size_t(e)];
    other += e == HashRouter<float>({.experts = 8, .seed = 4}).expert_of(id) ? 0 : 1;
  }
  for (const std::int64_t n : count) {
    CHECK(std::abs(double(n) - 1250) < 5 * std::sqrt(1250.0));
  }
  CHECK(other > 8000);  // seven in eight
}

TEST_CASE_TEMPLATE("hash router: every token has one assignment of weight 1", S, float, double) {
  const HashRouter<S> router({.experts = 3});
  const Matrix<S> x = moxie::test::random<S>(4, 2, 691);
  const std::vector<std::int64_t> ids{7, 7, -1, 12};
  Tokens<S> in(x);
  in.ids = ids;
  const auto plan = plan_of(router, in);
  CHECK(plan.rows() == 4);
  for (Index e = 0; e < 3; ++e) {
    for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e + 1)]; ++r) {
      CHECK(router.expert_of(ids[std::size_t(plan.token(r))]) == e);
      CHECK(plan.weight(r) == S(1));
    }
  }
}

TEST_CASE("hash router: tokens without ids, more than one choice and no experts are refused") {
  const HashRouter<float> router({.experts = 3});
  const Matrix<float> x = moxie::test::random<float>(4, 2, 692);
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ValueError>([&] { plan_of<float>(router, {x}); }), "ids"));
  const std::vector<std::int64_t> ids{7, 7, -1, 12};
  Tokens<float> in(x);
  in.ids = ids;
  in.top_k = 2;
  CHECK_THROWS_AS(plan_of<float>(router, in), moxie::ValueError);
  CHECK_THROWS_AS(HashRouter<float>({.experts = 0}), moxie::ValueError);
}

}  // namespace

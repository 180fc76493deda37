// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/matrix.hpp>
#include <moxie/routing/gradients.hpp>

namespace {

using moxie::Gradients;
using moxie::Matrix;
using moxie::Parameters;
using moxie::RouterGradient;
using Plan = moxie::SparsePlan<float>;

TEST_CASE("Gradients: made of a matrix and a block, as calls write it") {
  moxie::Layout layout;
  layout.add("w", {2, 3});
  Parameters<float> grads(layout);
  Matrix<float> dx(4, 5), dcondition(2, 3);
  const auto see = [](const Gradients<float>& into) { return into; };
  const Gradients<float> both = see({dx, grads});
  CHECK(both.tokens.x.data() == dx.data());
  CHECK(both.parameters["w"].data() == grads["w"].data());
  CHECK(both.tokens.loss_factor == 1);
  const Gradients<float> conditioned = see({{dx, dcondition}, grads});
  CHECK(conditioned.tokens.condition.data() == dcondition.data());
  CHECK(see({dx}).parameters.empty());
}

TEST_CASE("RouterGradient: refers to the plan's gradient, and has no gradient of the logits unless there is one") {
  Plan::Gradient dplan;
  dplan.weight.assign(3, 0.5F);
  Matrix<float> dx(4, 5), dlogits(4, 2);
  const RouterGradient<Plan> without{dplan, {}, {dx}};
  CHECK(&without.plan == &dplan);
  CHECK(without.logits.size() == 0);
  const RouterGradient<Plan> with{dplan, dlogits, {dx}};
  CHECK(with.logits.data() == dlogits.data());
  CHECK(with.into.tokens.x.data() == dx.data());
}

}  // namespace

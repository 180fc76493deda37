// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/expert/linear.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/soft.hpp>
#include <moxie/routing/top_k.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Moe;
using moxie::ParameterView;
using moxie::Tokens;

constexpr Index model_dim = 5;
constexpr Index tokens = 12;

// A router of a user's own: token t goes to experts t mod E and (t + 1) mod E, every fifth choice is dropped.
template <class S>
struct HashRouter : moxie::FixedRouter<S> {
  Index count = 3;

  Index experts() const { return count; }
  void route(ParameterView<const S> /*p*/, const Tokens<S>& in, moxie::SparsePlan<S>& plan,
             typename moxie::FixedRouter<S>::Tape& /*tape*/, const moxie::Context& /*context*/) const {
    std::vector<Index> expert;
    std::vector<S> weight;
    for (Index p = 0; p < 2 * in.count(); ++p) {
      expert.push_back(p % 5 == 4 ? -1 : (p / 2 + p % 2) % count);
      weight.push_back(p % 2 == 0 ? S(0.75) : S(-0.5));
    }
    plan.build(in.count(), count, 2, expert, weight);
  }
};

static_assert(moxie::Router<HashRouter<float>>);
static_assert(moxie::Router<moxie::TopKRouter<double>>);
static_assert(moxie::Router<moxie::SoftRouter<double>>);
static_assert(!moxie::Router<moxie::LinearExperts<float>>);
static_assert(!moxie::Router<int>);

template <class S>
Moe<HashRouter<S>, moxie::LinearExperts<S>> hash_layer() {
  Moe<HashRouter<S>, moxie::LinearExperts<S>> layer(HashRouter<S>{}, moxie::LinearExperts<S>(3, model_dim));
  moxie::test::randomize(layer.parameters(), 71);
  return layer;
}

TEST_CASE("router: a fixed one has no parameters, no gradient, no loss, and takes any width") {
  const HashRouter<float> router;
  CHECK(router.layout().size() == 0);
  CHECK(router.model_dim() == -1);
  CHECK(HashRouter<float>::Tape{}.balance_loss() == 0);
  CHECK(hash_layer<float>().model_dim() == model_dim);
}

TEST_CASE_TEMPLATE("router: a fixed one of a user's own keeps the laws of a layer", S, float, double) {
  moxie::testing::LawOptions options;
  options.permute_tokens = false;  // this one looks at a token's position
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 76);
  const auto laws = moxie::testing::check_layer_laws(hash_layer<S>(), Tokens<S>{x}, options);
  CHECK(laws.size() == 11);
  for (const auto& law : laws) {
    INFO(law.message);
    CHECK(law.holds);
  }
}

TEST_CASE("router: a fixed one of a user's own gives the right gradients, dropped choices included") {
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 77);
  const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 78);
  const auto layer = hash_layer<double>();
  for (const auto& report : moxie::testing::check_layer_gradients(layer, Tokens<double>{x}, dy, Exec{.threads = 1})) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
  auto tape = layer.make_tape();
  Matrix<double> y(tokens, model_dim);
  layer.forward(x, y, tape);
  CHECK(tape.plan().dropped() == 4);
  CHECK(tape.statistics().dropped == doctest::Approx(4.0 / 24));
}

// Every odd token goes to the one expert, the others nowhere.
struct OddRouter : moxie::FixedRouter<double> {
  Index experts() const { return 1; }
  void route(ParameterView<const double> /*p*/, const Tokens<double>& in, Plan& plan, Tape& /*tape*/,
             const moxie::Context& /*context*/) const {
    std::vector<Index> expert;
    for (Index t = 0; t < in.count(); ++t) {
      expert.push_back(t % 2 == 1 ? 0 : -1);
    }
    plan.build(in.count(), 1, 1, expert, std::vector<double>(expert.size(), 1.0));
  }
};

TEST_CASE("router: a token whose every choice is dropped gets zero, forward and backward") {
  Moe<OddRouter, moxie::LinearExperts<double>> layer(OddRouter{}, moxie::LinearExperts<double>(1, model_dim));
  moxie::test::randomize(layer.parameters(), 79);
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 80);
  Matrix<double> y = moxie::test::untouched<double>(tokens, model_dim);
  Matrix<double> dx = y;
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(x, y, tape);
  layer.backward(x, x, dx, grads, tape);
  for (Index t = 0; t < tokens; ++t) {
    CHECK((y.row(t).array() == 0).all() == (t % 2 == 0));
    CHECK((dx.row(t).array() == 0).all() == (t % 2 == 0));
  }
}

// Plans other tokens or experts than it is asked for.
struct WrongRouter : moxie::FixedRouter<float> {
  Index planned_tokens = 0;
  Index planned_experts = 0;
  Index experts() const { return 3; }
  void route(ParameterView<const float> /*p*/, const Tokens<float>& /*in*/, Plan& plan, Tape& /*tape*/,
             const moxie::Context& /*context*/) const {
    const std::vector<Index> expert(std::size_t(planned_tokens), 0);
    const std::vector<float> weight(std::size_t(planned_tokens), 1.0F);
    plan.build(planned_tokens, planned_experts, 1, expert, weight);
  }
};

TEST_CASE("router: a plan for other tokens or experts than asked for is refused") {
  const Matrix<float> x = moxie::test::random<float>(4, model_dim, 87);
  for (const auto& [t, e] : {std::pair<Index, Index>{3, 3}, {5, 3}, {4, 2}, {4, 4}}) {
    WrongRouter router;
    router.planned_tokens = t;
    router.planned_experts = e;
    const Moe<WrongRouter, moxie::LinearExperts<float>> layer(router, moxie::LinearExperts<float>(3, model_dim));
    Matrix<float> y = moxie::test::untouched<float>(4, model_dim);
    auto tape = layer.make_tape();
    const std::string message = moxie::test::message_of<moxie::ValueError>([&] { layer.forward(x, y, tape); });
    CHECK(moxie::test::contains(message, "the router planned"));
    CHECK(moxie::test::is_untouched(y));
  }
}

}  // namespace

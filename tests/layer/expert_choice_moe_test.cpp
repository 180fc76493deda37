// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/expert_choice_moe.hpp>
#include <support.hpp>

namespace {

using moxie::ExpertChoiceMoE;
using moxie::Index;
using moxie::Matrix;
using moxie::Tokens;
namespace reference = moxie::test::reference;

constexpr Index dim = 5, experts = 3, hidden = 4, tokens = 12, length = 6;

// The laws and the gradients are every_router_test's; here is what is particular to this layer.

TEST_CASE_TEMPLATE("expert choice layer: y is the sum of the experts that took the token, by their scores", S, float, double) {
  ExpertChoiceMoE<S> layer(
      {.model_dim = dim, .experts = experts, .expert = {.hidden_dim = hidden}, .capacity = {.factor = 1.5}});
  moxie::test::randomize(layer.parameters(), 801);
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 802);
  Matrix<S> y(tokens, dim);
  auto tape = layer.make_tape();
  layer.forward({x, length}, y, tape);

  const Matrix<double> x64 = moxie::test::as_double(x);
  const moxie::Parameters<double> p = moxie::test::as_double(layer.parameters());
  Matrix<double> scores(tokens, experts);
  for (Index t = 0; t < tokens; ++t) {
    scores.row(t) = reference::softmax(reference::tensor(p, "gate.weight") * x64.row(t).transpose()).transpose();
  }
  Matrix<double> weights = Matrix<double>::Zero(tokens, experts);
  for (Index first = 0; first < tokens; first += length) {
    for (Index e = 0; e < experts; ++e) {
      for (const Index i : reference::top_k(scores.col(e).segment(first, length), 3)) {  // ⌈6 · 1.5 / 3⌉
        weights(first + i, e) = scores(first + i, e);
      }
    }
  }
  const Matrix<double> expected = reference::mixture(x64, weights, [&](Index e, const reference::Vector& v) {
    return reference::swiglu(p, "experts." + std::to_string(e) + ".", v);
  });
  CHECK(moxie::test::relative_error(y, expected) < moxie::test::Tolerance<S>::layer);
}

TEST_CASE("expert choice layer: a token that no expert took has output 0") {
  ExpertChoiceMoE<double> layer(
      {.model_dim = dim, .experts = experts, .expert = {.hidden_dim = hidden}, .capacity = {.factor = 0.5}});
  moxie::test::randomize(layer.parameters(), 803);
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 804);
  Matrix<double> y = moxie::test::untouched<double>(tokens, dim);
  auto tape = layer.make_tape();
  layer.forward({x, length}, y, tape);
  Index untaken = 0;
  for (Index t = 0; t < tokens; ++t) {
    const bool taken = !tape.plan().rows_of_token(t).empty();
    CHECK((y.row(t).array() != 0).any() == taken);
    untaken += taken ? 0 : 1;
  }
  CHECK(untaken >= tokens / 2);  // six rows in all
  CHECK(tape.balance_loss() == 0);
}

TEST_CASE("expert choice layer: errors name the layer or its router, and nothing is written") {
  const ExpertChoiceMoE<float> layer({.model_dim = dim, .experts = experts, .expert = {.hidden_dim = hidden}});
  auto tape = layer.make_tape();
  Matrix<float> y = moxie::test::untouched<float>(tokens, dim);
  const Matrix<float> narrow = moxie::test::random<float>(tokens, dim - 1, 805);
  CHECK(moxie::test::message_of<moxie::ShapeError>([&] { layer.forward(narrow, y, tape); }) ==
        "ExpertChoiceMoE::forward: x is (12,4), expected (T,5)");
  const Matrix<float> x = moxie::test::random<float>(tokens, dim, 806);
  Tokens<float> in(x);
  in.top_k = 2;
  CHECK_THROWS_AS(layer.forward(in, y, tape), moxie::ValueError);
  CHECK(moxie::test::is_untouched(y));
  CHECK_THROWS_AS(ExpertChoiceMoE<float>({.model_dim = dim, .experts = experts}), moxie::ValueError);  // no hidden width
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/top_k_moe.hpp>
#include <moxie/routing/given.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::Tokens;
using Layer = moxie::Moe<moxie::GivenRouter<double>, moxie::SwiGluExperts<double>>;

constexpr Index dim = 4;

Layer make_layer() {
  Layer layer(moxie::GivenRouter<double>({.experts = 3}), moxie::SwiGluExperts<double>(3, dim, {3}));
  moxie::test::randomize(layer.parameters(), 641);
  return layer;
}

Matrix<Index> choices() {
  Matrix<Index> chosen(6, 2);
  chosen << 0, 1, 2, -1, -1, -1, 1, 0, 2, 1, -1, 2;
  return chosen;
}

TEST_CASE("given router: the plan is what was given, without the choices that are none") {
  const Layer layer = make_layer();
  const Matrix<double> x = moxie::test::random<double>(6, dim, 642), weight = moxie::test::random<double>(6, 2, 643);
  const Matrix<Index> chosen = choices();
  Tokens<double> in(x);
  in.chosen = chosen;
  in.weight = weight;
  Matrix<double> y(6, dim);
  auto tape = layer.make_tape();
  layer.forward(in, y, tape);
  CHECK(tape.plan().tokens_per_expert() == std::vector<std::int64_t>{2, 3, 3});
  for (Index t = 0; t < 6; ++t) {
    for (const Index r : tape.plan().rows_of_token(t)) {
      CHECK(tape.plan().weight(r) == weight.data()[tape.plan().pair(r)]);
    }
  }
  CHECK(y.row(2).isZero(0));
  CHECK(tape.statistics().unserved == doctest::Approx(1.0 / 6));
}

TEST_CASE("given router: keeps the laws, and its weights have a gradient, with masks") {
  const Layer layer = make_layer();
  const Matrix<double> x = moxie::test::random<double>(6, dim, 644), weight = moxie::test::random<double>(6, 2, 645);
  const Matrix<double> dy = moxie::test::random<double>(6, dim, 646);
  const Matrix<Index> chosen = choices();
  const std::vector<std::uint8_t> mask{1, 1, 1, 0, 1, 1};
  for (const bool masked : {false, true}) {
    Tokens<double> in(x, 3);
    in.chosen = chosen;
    in.weight = weight;
    if (masked) {
      in.mask = mask;
    }
    for (const auto& law : moxie::testing::check_layer_laws(layer, in)) {
      INFO(law.message);
      CHECK(law.holds);
    }
    const auto reports = moxie::testing::check_layer_gradients(layer, in, dy);
    CHECK(moxie::test::contains(reports[1].message(), "weight("));
    for (const auto& report : reports) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
    Matrix<double> y(6, dim), dx(6, dim), dweight = moxie::test::untouched<double>(6, 2);
    auto grads = layer.parameters().zeros_like();
    auto tape = layer.make_tape();
    layer.forward(in, y, tape);
    moxie::TokensGradient<double> din(dx);
    din.weight = dweight;
    layer.backward(in, dy, din, grads, tape);
    CHECK(dweight(1, 1) == 0);  // no choice
    CHECK((dweight(3, 0) == 0) == masked);
  }
}

TEST_CASE("given router: the choices and weights of top-k give the bits of top-k") {
  moxie::TopKMoE<double> top_k({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {3}});
  moxie::test::randomize(top_k.parameters(), 647);
  Layer layer = make_layer();
  for (const auto& tensor : layer.layout().tensors()) {
    layer.parameters()[tensor.name].eigen() = top_k.parameters()[tensor.name].eigen();
  }
  const Matrix<double> x = moxie::test::random<double>(6, dim, 648);
  Matrix<double> y(6, dim), expected(6, dim);
  auto tape = top_k.make_tape();
  top_k.forward(x, expected, tape);
  Matrix<double> weight(6, 2);
  for (Index r = 0; r < tape.plan().rows(); ++r) {
    weight.data()[tape.plan().pair(r)] = tape.plan().weight(r);
  }
  Tokens<double> in(x);
  in.chosen = moxie::RowView<const Index>(tape.router().choices().data(), 6, 2);
  in.weight = weight;
  auto given = layer.make_tape();
  layer.forward(in, y, given);
  CHECK(moxie::test::same_bits(y, expected));
}

TEST_CASE("given router: what makes no plan is refused") {
  const Layer layer = make_layer();
  const Matrix<double> x = moxie::test::random<double>(6, dim, 649);
  const auto message = [&](auto&& change) {
    Matrix<Index> chosen = choices();
    Matrix<double> weight = moxie::test::random<double>(6, 2, 650);
    Tokens<double> in(x);
    in.chosen = chosen;
    in.weight = weight;
    change(in, chosen, weight);
    Matrix<double> y = moxie::test::untouched<double>(6, dim);
    auto tape = layer.make_tape();
    const std::string text = moxie::test::message_of<std::invalid_argument>([&] { layer.forward(in, y, tape); });
    CHECK(moxie::test::is_untouched(y) == (text != "nothing was thrown"));
    return text;
  };
  CHECK(message([](auto&, auto&, auto&) {}) == "nothing was thrown");
  CHECK(message([](auto& in, auto&, auto&) { in.chosen = {}, in.weight = {}; }) ==
        "GivenRouter::route: chosen is (0,0), expected (6,1)");
  CHECK(message([](auto& in, auto&, auto&) { in.weight = {}; }) == "GivenRouter::route: weight is (0,0), expected (6,2)");
  CHECK(message([](auto&, auto& chosen, auto&) { chosen(4, 1) = 3; }) ==
        "GivenRouter::route: choice 1 of token 4 is expert 3, which is none");
  CHECK(message([](auto&, auto& chosen, auto&) { chosen(4, 1) = -2; }) ==
        "GivenRouter::route: choice 1 of token 4 is expert -2, which is none");
  CHECK(message([](auto&, auto& chosen, auto&) { chosen(4, 1) = 2; }) ==
        "GivenRouter::route: choice 1 of token 4 is expert 2, which it has chosen before");
  CHECK(message([](auto&, auto&, auto& weight) { weight(0, 0) = std::nan(""); }) ==
        "GivenRouter::route: a weight is not finite");
  CHECK(message([](auto&, auto&, auto& weight) { weight(2, 0) = std::nan(""); }) == "nothing was thrown");  // of no choice
  CHECK(message([](auto& in, auto&, auto&) { in.top_k = 1; }) ==
        "GivenRouter::route: top_k is not the number of columns of chosen");
  CHECK(message([](auto& in, auto&, auto&) { in.capacity_factor = 1; }) ==
        "GivenRouter::route: Tokens::capacity_factor is set, and this router does not read it");
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/routing/hash.hpp>
#include <moxie/routing/timestep.hpp>
#include <moxie/routing/tokens.hpp>
#include <moxie/routing/top_p.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Matrix;
using moxie::Tokens;

static_assert(std::is_convertible_v<Matrix<float>&, Tokens<float>>);
static_assert(std::is_convertible_v<const Matrix<float>&, Tokens<float>>);
static_assert(std::is_convertible_v<moxie::RowView<float>, Tokens<float>>);
static_assert(!std::is_convertible_v<Matrix<double>&, Tokens<float>>);

// A view of a temporary that owns its numbers would dangle; one of a temporary view does not.
static_assert(!std::is_convertible_v<Matrix<float>, Tokens<float>>);
static_assert(!std::is_constructible_v<Tokens<float>, Matrix<float>, moxie::Index>);
static_assert(!std::is_constructible_v<Tokens<float>, const Matrix<float>, moxie::Index>);
static_assert(!std::is_convertible_v<Eigen::Matrix<float, 4, 3, Eigen::RowMajor>, Tokens<float>>);
static_assert(std::is_convertible_v<decltype(std::declval<Matrix<float>&>().topRows(2)), Tokens<float>>);
static_assert(std::is_convertible_v<Eigen::Map<const Matrix<float>>, Tokens<float>>);
static_assert(std::is_constructible_v<Tokens<float>, moxie::RowView<const float>, moxie::Index>);
static_assert(!std::is_convertible_v<Matrix<float>, moxie::TokensGradient<float>>);
static_assert(std::is_convertible_v<Matrix<float>&, moxie::TokensGradient<float>>);
static_assert(std::is_convertible_v<decltype(std::declval<Matrix<float>&>().topRows(2)), moxie::TokensGradient<float>>);
// What is not row-major is refused by name.
static_assert(!std::is_convertible_v<Eigen::MatrixXf&, Tokens<float>>);
static_assert(!std::is_convertible_v<Eigen::MatrixXf&, moxie::TokensGradient<float>>);
static_assert(moxie::detail::NotARowMajorMatrixOfThisScalar<Eigen::MatrixXf&, const float>);
static_assert(!moxie::detail::NotARowMajorMatrixOfThisScalar<Matrix<float>&, const float>);

TEST_CASE("tokens: a plain matrix is one sequence") {
  const Matrix<float> x(6, 3);
  const Tokens<float> in = x;
  CHECK(in.x.data() == x.data());
  CHECK(in.count() == 6);
  CHECK(in.sequences.count() == 1);
  CHECK(in.sequences.length(0) == 6);
}

TEST_CASE("tokens: divide into sequences of a length") {
  const Matrix<float> x(6, 3);
  const Tokens<float> in{x, 2};
  CHECK(in.sequences.count() == 3);
  CHECK(in.sequences.begin(2) == 4);
  CHECK(in.sequences.length(2) == 2);
}

TEST_CASE("tokens: none make no sequence") {
  const Matrix<float> x(0, 3);
  CHECK(Tokens<float>{x}.sequences.count() == 0);
  CHECK(Tokens<float>{x, 4}.sequences.count() == 0);
  CHECK(Tokens<float>{}.count() == 0);
}

TEST_CASE("tokens: another width and lengths that do not divide are refused") {
  const Matrix<float> x(6, 3);
  const auto check = [&](moxie::Index length, moxie::Index dim) {
    return moxie::test::message_of<moxie::ShapeError>([&] {
      moxie::detail::expect_tokens("f", Tokens<float>{x, length}, dim);
    });
  };
  CHECK(check(0, 3) == "nothing was thrown");
  CHECK(check(6, 3) == "nothing was thrown");
  CHECK(check(3, 3) == "nothing was thrown");
  CHECK(check(0, 4) == "f: x is (6,3), expected (T,4)");
  CHECK(check(4, 3) == "f: 6 tokens do not divide into sequences of 4");
  CHECK(check(7, 3) == "f: 6 tokens do not divide into sequences of 7");
  CHECK(check(-2, 3) == "f: 6 tokens do not divide into sequences of -2");
}

TEST_CASE("tokens: what is known of them has to fit their number") {
  const Matrix<float> x(6, 3);
  const auto check = [&](auto&& change) {
    Tokens<float> in{x, 3};
    change(in);
    return moxie::test::message_of<std::invalid_argument>([&] { moxie::detail::expect_tokens("f", in, 3); });
  };
  const std::vector<std::uint8_t> mask(5, 1);
  const std::vector<std::int64_t> ids(7);
  const Matrix<float> three(3, 4);
  CHECK(check([&](auto& in) { in.mask = mask; }) == "f: there are 5 elements of the mask, expected one for each of 6 tokens");
  CHECK(check([&](auto& in) { in.ids = ids; }) == "f: there are 7 ids, expected one for each of 6 tokens");
  CHECK(check([&](auto& in) { in.condition = three; }) == "f: condition is (3,4), expected (2,C)");
  CHECK(check([&](auto& in) { in.noise = three; }) == "f: noise is (3,4), expected (6,E)");
  const Matrix<moxie::Index> chosen(6, 2);
  const Matrix<float> six(6, 3);
  CHECK(check([&](auto& in) { in.gate_x = three; }) == "f: gate_x is (3,4), expected (6,G)");
  CHECK(check([&](auto& in) { in.weight = three; }) == "f: weight is (3,4), expected (6,K)");
  CHECK(check([&](auto& in) { in.chosen = chosen, in.weight = six; }) == "f: weight is (6,3), expected (6,2)");
  CHECK(check([&](auto& in) { in.labels = ids; }) == "f: there are 7 labels, expected one for each of 2 sequences");
  CHECK(check([&](auto& in) { in.first = -1; }) == "f: first must not be negative");
  CHECK(check([&](auto& in) { in.capacity_factor = -1; }) == "f: capacity_factor must not be negative or NaN");
  CHECK(check([&](auto& in) { in.capacity_factor = std::nan(""); }) == "f: capacity_factor must not be negative or NaN");
  CHECK(check([&](auto& in) { in.top_k = -1; }) == "f: top_k must not be negative");
  CHECK(check([&](auto& in) { in.x = three; }) == "f: x is (3,4), expected (T,3)");
  CHECK(check([](auto&) {}) == "nothing was thrown");
}

TEST_CASE("tokens: a part of them has its rows of every field, absent ones stay absent") {
  const Matrix<double> x = moxie::test::random<double>(4, 3, 691), gate_x = moxie::test::random<double>(4, 2, 692);
  const Matrix<double> noise = moxie::test::random<double>(4, 5, 693), weight = moxie::test::random<double>(4, 2, 694);
  Matrix<moxie::Index> chosen(4, 2);
  chosen << 0, 1, 2, 3, 4, -1, 1, 0;
  const std::vector<std::int64_t> ids{7, 8, 9, 10};
  Tokens<double> in(x);
  in.gate_x = gate_x;
  in.noise = noise;
  in.weight = weight;
  in.chosen = chosen;
  in.ids = ids;
  moxie::detail::TokenCopies copies;
  const std::vector<moxie::Index> rows{3, 1};
  copies.copy(in, rows);
  Tokens<double> part = in;
  copies.view(part, 2);
  CHECK(part.x.eigen() == x(rows, Eigen::all));
  CHECK(part.gate_x.eigen() == gate_x(rows, Eigen::all));
  CHECK(part.noise.eigen() == noise(rows, Eigen::all));
  CHECK(part.weight.eigen() == weight(rows, Eigen::all));
  CHECK(part.chosen(0, 1) == 0);
  CHECK(part.chosen(1, 0) == 2);
  CHECK(std::ranges::equal(part.ids, std::vector<std::int64_t>{10, 8}));
  const Tokens<double> plain(x);
  Tokens<double> other = plain;
  copies.copy(plain, rows);
  copies.view(other, 2);
  CHECK(other.x.eigen() == x(rows, Eigen::all));
  CHECK(!other.has_gate_x());
  CHECK(!other.has_chosen());
  CHECK(other.ids.empty());
  copies.copy(in, {});
  copies.view(part, 0);
  CHECK(part.count() == 0);
  CHECK(part.has_gate_x());
}

TEST_CASE("tokens: the gate's own input has the gate's gradient, with masks, for every router with a gate") {
  const Matrix<double> x = moxie::test::random<double>(12, 4, 695), gate_x = moxie::test::random<double>(12, 3, 696);
  const Matrix<double> dy = moxie::test::random<double>(12, 4, 697);
  const std::vector<std::uint8_t> mask{1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1};
  const moxie::SwiGluExperts<double> bank(4, 4, {3});
  const auto check = [&](auto layer) {
    moxie::test::randomize(layer.parameters(), 698);
    for (const bool masked : {false, true}) {
      CAPTURE(masked);
      Tokens<double> in(x, 4);
      in.gate_x = gate_x;
      if (masked) {
        in.mask = mask;
      }
      for (const auto& report : moxie::testing::check_layer_gradients(layer, in, dy)) {
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      }
      for (const auto& law : moxie::testing::check_layer_laws(layer, in)) {
        INFO(law.message);
        CHECK(law.holds);
      }
      // Nobody who wants it: the rest is the same. And x has no part of the gate's gradient.
      Matrix<double> y(12, 4), dx(12, 4), again(12, 4), dgate_x = moxie::test::untouched<double>(12, 3);
      auto grads = layer.parameters().zeros_like(), grads_again = layer.parameters().zeros_like();
      auto tape = layer.make_tape();
      layer.forward(in, y, tape);
      moxie::TokensGradient<double> din(dx);
      din.gate_x = dgate_x;
      layer.backward(in, dy, din, grads, tape);
      layer.backward(in, dy, again, grads_again, tape);
      CHECK(moxie::test::same_bits(dx, again));
      CHECK((grads.flat() == grads_again.flat()).all());
      CHECK(dgate_x.allFinite());
      CHECK(dgate_x.row(1).isZero(0) == masked);
    }
  };
  const moxie::TopKRouterConfig top_k{
      .model_dim = 4, .experts = 4, .top_k = 2, .normalize = true, .balance = {.expert_level = 0.5, .z = 0.1}, .gate_dim = 3};
  check(moxie::Moe<moxie::TopKRouter<double>, moxie::SwiGluExperts<double>>(moxie::TopKRouter<double>(top_k), bank));
  check(moxie::Moe<moxie::ExpertChoiceRouter<double>, moxie::SwiGluExperts<double>>(
      moxie::ExpertChoiceRouter<double>({.model_dim = 4, .experts = 4, .scale = 1.5, .gate_dim = 3}), bank));
  check(moxie::Moe<moxie::TopPRouter<double>, moxie::SwiGluExperts<double>>(
      moxie::TopPRouter<double>({.model_dim = 4, .experts = 4, .top_p = 0.5, .token_entropy = 0.1, .scale = -2, .gate_dim = 3}),
      bank));
  for (const bool normalize : {true, false}) {
    check(moxie::Moe<moxie::SoftRouter<double>, moxie::SwiGluExperts<double>>(
        moxie::SoftRouter<double>({.model_dim = 4, .experts = 4, .normalize = normalize, .gate_dim = 3}), bank));
  }
}

TEST_CASE("tokens: an input of the gate of another width is refused, and one that a router does not read") {
  using moxie::test::contains;
  const Matrix<double> x = moxie::test::random<double>(6, 4, 699), gate_x = moxie::test::random<double>(6, 3, 699);
  Matrix<moxie::Index> chosen = Matrix<moxie::Index>::Zero(6, 1);
  const Matrix<double> condition = moxie::test::random<double>(1, 3, 699);
  const std::vector<std::int64_t> ids(6, 0);
  const moxie::SwiGluExperts<double> bank(2, 4, {3});
  const auto message = [&](auto router, auto&& change) {
    const moxie::Moe<decltype(router), moxie::SwiGluExperts<double>> layer(router, bank);
    Tokens<double> in(x);
    in.condition = condition;
    in.ids = ids;
    change(in);
    Matrix<double> y = moxie::test::untouched<double>(6, 4);
    auto tape = layer.make_tape();
    const std::string text = moxie::test::message_of<std::invalid_argument>([&] { layer.forward(in, y, tape); });
    CHECK(moxie::test::is_untouched(y) == (text != "nothing was thrown"));
    return text;
  };
  const auto with_gate_x = [&](Tokens<double>& in) { in.gate_x = gate_x; };
  const auto with_chosen = [&](Tokens<double>& in) { in.chosen = chosen; };
  const auto with_factor = [&](Tokens<double>& in) { in.capacity_factor = 1; };
  const moxie::TopKRouter<double> top_k({.model_dim = 4, .experts = 2});
  const moxie::TopKRouter<double> own({.model_dim = 4, .experts = 2, .gate_dim = 3});
  const moxie::ExpertChoiceRouter<double> expert_choice({.model_dim = 4, .experts = 2});
  const moxie::SoftRouter<double> soft({.model_dim = 4, .experts = 2});
  const moxie::TopPRouter<double> top_p({.model_dim = 4, .experts = 2});
  const moxie::HashRouter<double> hash({.experts = 2});
  const moxie::TimestepRouter<double> timestep({.condition_dim = 3, .experts = 2});
  CHECK(message(top_k, with_gate_x) == "TopKRouter::route: gate_x is (6,3), expected (6,4)");
  CHECK(message(own, with_gate_x) == "nothing was thrown");
  CHECK(message(own, [](auto&) {}) == "TopKRouter::route: the input of the gate, x, is (6,4), expected (6,3)");
  CHECK(message(soft, with_gate_x) == "SoftRouter::route: gate_x is (6,3), expected (6,4)");
  CHECK(message(hash, with_gate_x) == "HashRouter::route: Tokens::gate_x is set, and this router does not read it");
  CHECK(message(timestep, with_gate_x) == "TimestepRouter::route: Tokens::gate_x is set, and this router does not read it");
  for (const std::string& text : {message(expert_choice, with_chosen), message(soft, with_chosen), message(top_p, with_chosen),
                                  message(hash, with_chosen), message(timestep, with_chosen)}) {
    CHECK(contains(text, "Tokens::chosen is set, and this router does not read it"));
  }
  CHECK(message(top_k, with_chosen) == "nothing was thrown");
  CHECK(message(top_k, with_factor) == "nothing was thrown");
  CHECK(message(expert_choice, with_factor) == "nothing was thrown");
  for (const std::string& text :
       {message(soft, with_factor), message(top_p, with_factor), message(hash, with_factor), message(timestep, with_factor)}) {
    CHECK(contains(text, "Tokens::capacity_factor is set, and this router does not read it"));
  }
  const Matrix<double> weight = moxie::test::random<double>(6, 1, 699);
  CHECK(contains(message(top_k,
                         [&](Tokens<double>& in) {
                           in.chosen = chosen;
                           in.weight = weight;
                         }),
                 "Tokens::weight is set, and this router does not read it"));
}

}  // namespace

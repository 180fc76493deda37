// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/dense_feed_forward.hpp>
#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/outputs.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/timestep_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::Tokens;
using moxie::test::message_of;

constexpr Index tokens = 12, dim = 5, experts = 4, sequences = 3;

// Logits as an output: their values, with 0 for masked tokens, and the gradient of a loss of one's own on them and on y.
template <class Layer>
void check_logits(Layer layer, const Tokens<double>& in, const Matrix<double>& expected) {
  const Matrix<double> dy = moxie::test::random<double>(in.count(), layer.model_dim(), 741);
  const Matrix<double> c = moxie::test::random<double>(expected.rows(), expected.cols(), 742);
  Matrix<double> y(in.count(), layer.model_dim()), dx = y, x = in.x.eigen();
  Matrix<double> z = moxie::test::untouched<double>(expected.rows(), expected.cols());
  Tokens<double> moved = in;
  moved.x = x;
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(moved, {y, z}, tape);
  CHECK(moxie::test::relative_error(z, expected) < 1e-14);
  Matrix<double> dcondition(in.condition.rows(), in.condition.cols());
  layer.backward(moved, {dy, c}, {dx, dcondition}, grads, tape);
  const auto loss = [&] {
    layer.forward(moved, {y, z}, tape);
    return y.cwiseProduct(dy).sum() + z.cwiseProduct(c).sum() + tape.balance_loss();
  };
  const moxie::RowView<double> gate = layer.parameters()["gate.weight"];
  for (const auto& report : {moxie::testing::check_gradient(loss, gate, grads["gate.weight"], {}, "gate"),
                             moxie::testing::check_gradient(loss, x, dx, {}, "x")}) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
  // Another shape, and another's memory.
  Matrix<double> narrow(expected.rows(), expected.cols() - 1);
  CHECK_THROWS_AS(layer.forward(moved, {y, narrow}, tape), moxie::ShapeError);
  CHECK_THROWS_AS(layer.forward(moved, {y, moxie::RowView<double>(y.data(), expected.rows(), expected.cols())}, tape),
                  moxie::ValueError);
  layer.forward(moved, y, tape);
  CHECK_THROWS_AS(layer.backward(moved, {dy, narrow}, {dx, dcondition}, grads, tape), moxie::ShapeError);
}

TEST_CASE("logits are an output of every layer with a gate, and have a gradient") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 731);
  for (const bool masked : {false, true}) {
    Tokens<double> in(x, 4);
    std::vector<std::uint8_t> mask(std::size_t(in.count()), 1);
    mask[1] = mask[7] = 0;
    in.mask = masked ? std::span<const std::uint8_t>(mask) : std::span<const std::uint8_t>();
    const auto check = [&](auto layer) {
      moxie::test::randomize(layer.parameters(), 740);
      Matrix<double> z = in.x.eigen() * layer.parameters()["gate.weight"].eigen().transpose();
      for (Index t = 0; masked && t < z.rows(); ++t) {
        z.row(t) *= double(mask[std::size_t(t)]);
      }
      check_logits(std::move(layer), in, z);
    };
    check(moxie::TopKMoE<double>({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {.hidden_dim = 3}}));
    check(moxie::TopKMoE<double>({.model_dim = dim,
                                  .experts = experts,
                                  .top_k = 2,
                                  .expert = {.hidden_dim = 3},
                                  .normalize = true,
                                  .balance = {.expert_level = 0.1, .z = 0.1},
                                  .score = moxie::Score::sigmoid}));
    check(moxie::ExpertChoiceMoE<double>(
        {.model_dim = dim, .experts = experts, .expert = {.hidden_dim = 3}, .capacity = {.factor = 2}}));
  }
}

TEST_CASE("logits of a router that has none are refused by name") {
  moxie::SoftMoE<double> layer({.model_dim = dim, .experts = 2, .slots_per_expert = 1, .expert = {.hidden_dim = 3}});
  moxie::test::randomize(layer.parameters(), 743);
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 731);
  const Tokens<double> in(x);
  Matrix<double> y = moxie::test::untouched<double>(in.count(), dim), z(in.count(), 2), dx = y;
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  CHECK(moxie::test::message_of<moxie::ValueError>([&] {
          layer.forward(in, {y, z}, tape);
        }) == "SoftMoE::forward: logits are wanted, and the router of this layer has none");
  CHECK(moxie::test::is_untouched(y));
  layer.forward(in, y, tape);
  CHECK(moxie::test::message_of<moxie::ValueError>([&] {
          layer.backward(in, {y, z}, dx, grads, tape);
        }) == "SoftMoE::backward: there is a gradient of the logits, and the router of this layer has none");
}

TEST_CASE("logits of a timestep router are those of sequences, with a mask too") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 731);
  const Matrix<double> condition = moxie::test::random<double>(sequences, 3, 732);
  moxie::TimestepMoE<double> layer({.model_dim = dim, .condition_dim = 3, .experts = experts, .top_k = 2});
  moxie::test::randomize(layer.parameters(), 744);
  Matrix<double> z = condition.unaryExpr([](double c) { return c / (1 + std::exp(-c)); }) *
                     layer.parameters()["gate.weight"].eigen().transpose();
  z.rowwise() += layer.parameters()["gate.bias"].eigen().row(0);
  std::vector<std::uint8_t> mask(std::size_t(tokens), 1);
  mask[0] = mask[1] = mask[2] = mask[3] = 0;  // all of sequence 0
  for (const bool masked : {false, true}) {
    Tokens<double> in(x, tokens / sequences);
    in.condition = condition;
    in.mask = masked ? std::span<const std::uint8_t>(mask) : std::span<const std::uint8_t>();
    check_logits(layer, in, z);
  }
}

TEST_CASE("a dense feed-forward has no logits") {
  moxie::DenseFeedForward<moxie::SwiGluExperts<double>> layer({.model_dim = dim, .expert = {.hidden_dim = 3}});
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 745);
  Matrix<double> y(tokens, dim), z(tokens, 1), dx(tokens, dim);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  CHECK_THROWS_AS(layer.forward(x, {y, z}, tape), moxie::ValueError);
  layer.forward(x, y, tape);
  CHECK_THROWS_AS(layer.backward(x, {y, z}, dx, grads, tape), moxie::ValueError);
}

TEST_CASE("nothing that a call reads may be written by it, and errors say which") {
  moxie::TopKMoE<double> layer({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {.hidden_dim = 3}});
  moxie::test::randomize(layer.parameters(), 746);
  const Matrix<double> dy = moxie::test::random<double>(tokens, dim, 747);
  Matrix<double> x = moxie::test::random<double>(tokens, dim, 748), y(tokens, dim), dx(tokens, dim), wide(tokens, dim);
  const RowView<double> z(wide.data(), tokens, experts);
  Matrix<double> condition(1, tokens * dim), noise(tokens, experts);
  std::vector<std::uint8_t> mask(std::size_t(tokens) * dim * sizeof(double), 1);
  std::vector<std::int64_t> ids(std::size_t(tokens) * dim, 0);
  Tokens<double> in(x);
  in.condition = condition;
  in.noise = noise;
  in.mask = std::span<const std::uint8_t>(mask).first(std::size_t(tokens));
  in.ids = std::span<const std::int64_t>(ids).first(std::size_t(tokens));
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  const auto over = [](auto* memory, Index cols) { return RowView<double>(reinterpret_cast<double*>(memory), tokens, cols); };
  const auto forward = [&](const moxie::Outputs<double>& out) {
    return message_of<moxie::ValueError>([&] { layer.forward(in, out, tape); });
  };
  CHECK(forward(over(x.data(), dim)) == "TopKMoE::forward: y overlaps x");
  CHECK(forward(over(condition.data(), dim)) == "TopKMoE::forward: y overlaps the condition");
  CHECK(forward(over(mask.data(), dim)) == "TopKMoE::forward: y overlaps the mask");
  CHECK(forward(over(ids.data(), dim)) == "TopKMoE::forward: y overlaps ids");
  CHECK(forward(over(layer.parameters().flat().data(), dim)) == "TopKMoE::forward: y overlaps the parameters");
  CHECK(forward({y, over(noise.data(), experts)}) == "TopKMoE::forward: logits overlaps noise");
  CHECK(forward({y, over(y.data(), experts)}) == "TopKMoE::forward: logits overlaps y");
  layer.forward(in, y, tape);
  const auto backward = [&](const moxie::TokensGradient<double>& din) {
    return message_of<moxie::ValueError>([&] { layer.backward(in, {dy, z}, din, grads, tape); });
  };
  CHECK(backward(over(x.data(), dim)) == "TopKMoE::backward: dx overlaps x");
  CHECK(backward(over(z.data(), dim)) == "TopKMoE::backward: dx overlaps dlogits");
  CHECK(backward(over(mask.data(), dim)) == "TopKMoE::backward: dx overlaps the mask");
  CHECK(backward(over(grads.flat().data(), dim)) == "TopKMoE::backward: dx overlaps the block of gradients");
  CHECK(backward({dx, RowView<double>(dx.data(), 1, tokens * dim)}) == "TopKMoE::backward: dcondition overlaps dx");
  CHECK((grads.flat() == 0).all());
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/moxie.hpp>
#include <support.hpp>

/// The compositions that the pages of docs/layers show, as a user writes them.
namespace {

using moxie::Index;
using moxie::Matrix;

constexpr Index T = 24, D = 16, E = 8, L = 12;

template <class Layer>
Matrix<float> output(Layer& layer, const moxie::Tokens<float>& in, typename Layer::Tape& tape) {
  layer.initialize(moxie::Rng{1});
  Matrix<float> y(in.count(), D), dx(in.count(), D);
  auto grads = layer.parameters().zeros_like();
  layer.forward(in, y, tape);
  layer.backward(in, y, dx, grads, tape);
  CHECK(dx.allFinite());
  return y;
}

TEST_CASE("composition: V-MoE, with capacity, batch priority and noise in training") {
  const Matrix<float> x = moxie::test::random<float>(T, D, 781);
  // [v-moe]
  moxie::TopKMoE<float, moxie::GeluTanhExperts<float>> layer(
      {.model_dim = D,
       .experts = E,
       .top_k = 2,
       .expert = {.hidden_dim = 32},
       .balance = {.importance = 0.005, .load = 0.005},
       .capacity = {.factor = 1.05, .multiple_of = 4, .priority = moxie::Priority::weight},
       .noise = {.logits = 1}});
  moxie::Tokens<float> in(x, L);     // T / L sequences, each with its own capacity
  in.training = true;                // draws the noise, takes the load loss
  in.rng = moxie::Rng{7}.split(42);  // a stream for this step
  // [v-moe]
  auto tape = layer.make_tape();
  CHECK(output(layer, in, tape).allFinite());
  CHECK(tape.plan().rows() + tape.plan().dropped() == 2 * T);
  CHECK(tape.balance_loss() > 0);
}

TEST_CASE("composition: DeepSeek-V3's block, and its bias update after a step") {
  const Matrix<float> x = moxie::test::random<float>(T, D, 782);
  // [deepseek]
  moxie::SharedExpertMoE<float> layer({.model_dim = D,
                                       .experts = E,
                                       .top_k = 3,
                                       .expert = {.hidden_dim = 8},
                                       .shared = {.hidden_dim = 8},
                                       .normalize = true,
                                       .scale = 2.5,
                                       .balance = {.sequence_level = 1e-4},
                                       .score = moxie::Score::sigmoid,
                                       .groups = {.count = 4, .chosen = 2},
                                       .selection_bias = true});
  // [deepseek]
  auto tape = layer.make_tape();
  output(layer, {x, L}, tape);
  // [bias]
  auto bias = layer.parameters()["gate.e_score_correction_bias"];
  moxie::update_selection_bias(bias, tape.plan().tokens_per_expert(), 0.001);  // after the optimizer's step
  // [bias]
  CHECK(bias.eigen().cwiseAbs().maxCoeff() == doctest::Approx(0.001));
  for (Index t = 0; t < T; ++t) {  // two groups of two experts each, at most
    std::vector<bool> group(4, false);
    for (Index j = 0; j < 3; ++j) {
      group[std::size_t(tape.router().choices()[std::size_t(3 * t + j)] / 2)] = true;
    }
    CHECK(std::count(group.begin(), group.end(), true) <= 2);
  }
}

TEST_CASE("composition: expert choice") {
  const Matrix<float> x = moxie::test::random<float>(T, D, 783);
  // [expert choice]
  moxie::ExpertChoiceMoE<float> layer({.model_dim = D,
                                       .experts = E,
                                       .expert = {.hidden_dim = 32},
                                       .capacity = {.factor = 2}});  // two experts a token on average
  // [expert choice]
  auto tape = layer.make_tape();
  output(layer, {x, L}, tape);
  CHECK(tape.plan().tokens_per_expert() == std::vector<std::int64_t>(E, 6));
}

TEST_CASE("composition: hash routing") {
  const Matrix<float> x = moxie::test::random<float>(T, D, 784);
  std::vector<std::int64_t> ids;
  for (std::int64_t t = 0; t < T; ++t) {
    ids.push_back(t % 5);
  }
  // [hash]
  using Experts = moxie::SwiGluExperts<float>;
  moxie::Moe layer(moxie::HashRouter<float>({.experts = E}), Experts(E, D, {.hidden_dim = 32}));
  moxie::Tokens<float> in(x);
  in.ids = ids;
  // [hash]
  auto tape = layer.make_tape();
  output(layer, in, tape);
  CHECK(tape.plan().rows() == T);
}

TEST_CASE("composition: clusters, fitted to features of sequences") {
  const Matrix<float> x = moxie::test::random<float>(T, D, 785);
  const Matrix<float> corpus = moxie::test::random<float>(200, 6, 786);
  const Matrix<float> features = moxie::test::random<float>(T / L, 6, 787);
  // [cluster]
  using Experts = moxie::SwiGluExperts<float>;
  moxie::Moe layer(moxie::ClusterRouter<float>({.feature_dim = 6, .experts = E, .top_k = 2, .temperature = 0.1}),
                   Experts(E, D, {.hidden_dim = 32}));
  layer.initialize(moxie::Rng{1});
  const auto clusters = moxie::balanced_k_means<float>(corpus, E, moxie::Rng{2});  // (N,F) features of the training data
  layer.parameters()["centroids"].eigen() = clusters.centroids;
  moxie::Tokens<float> in(x, L);
  in.condition = features;  // (B,F)
  // [cluster]
  auto tape = layer.make_tape();
  Matrix<float> y(T, D);
  layer.forward(in, y, tape);
  std::vector<Index> size(std::size_t(E), 0);
  for (const Index c : clusters.assignment) {
    ++size[std::size_t(c)];
  }
  CHECK(size == std::vector<Index>(E, 25));
  CHECK(tape.plan().rows() == 2 * T);
}

TEST_CASE("composition: a mask and ragged sequences") {
  moxie::TopKMoE<float> layer({.model_dim = D, .experts = E, .top_k = 2, .expert = {.hidden_dim = 32}});
  layer.initialize(moxie::Rng{1});
  const Matrix<float> x = moxie::test::random<float>(T, D, 788);
  Matrix<float> y(T, D);
  auto tape = layer.make_tape();
  // [mask]
  const std::vector<Index> starts{0, 7, 7, 24};  // three sequences, one without tokens
  std::vector<std::uint8_t> mask(24, 1);
  mask[3] = 0;  // padding
  moxie::Tokens<float> in(x, starts);
  in.mask = mask;
  layer.forward(in, y, tape);  // row 3 of y is 0
  // [mask]
  CHECK((y.row(3).array() == 0).all());
  CHECK(tape.plan().tokens() == 23);
}

TEST_CASE("composition: micro-batches with the loss of the whole batch") {
  moxie::TopKMoE<float> layer(
      {.model_dim = D, .experts = E, .top_k = 2, .expert = {.hidden_dim = 32}, .balance = {.expert_level = 0.01}});
  layer.initialize(moxie::Rng{1});
  const std::vector<Matrix<float>> x{moxie::test::random<float>(T, D, 789), moxie::test::random<float>(T, D, 790)};
  std::vector<Matrix<float>> y(2, Matrix<float>(T, D)), dx = y;
  const auto& dy = x;
  auto grads = layer.parameters().zeros_like();
  // [micro-batches]
  std::vector<moxie::TopKMoE<float>::Tape> tapes(x.size());
  moxie::BalanceTotals totals;
  for (std::size_t i = 0; i < x.size(); ++i) {
    layer.forward(x[i], y[i], tapes[i]);
    totals += tapes[i].router().balance_totals();
  }
  for (std::size_t i = 0; i < x.size(); ++i) {
    tapes[i].router().set_balance_totals(totals);
    layer.backward(x[i], dy[i], dx[i], grads, tapes[i]);
  }
  // [micro-batches]
  CHECK(totals.tokens == 2 * T);
  CHECK(tapes[0].balance_loss() == tapes[1].balance_loss());
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/moxie.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <numeric>
#include <support.hpp>

/// The laws and the gradients of every router of the library, on equal, ragged and masked sequences.
namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::Moe;
using moxie::Priority;
using moxie::Sequences;
using moxie::Tokens;

constexpr Index dim = 5, experts = 4, condition_dim = 3;
const std::vector<Index> ragged{0, 5, 5, 6, 12};

/// A batch with all that a router may look at.
template <class S>
struct Batch {
  Matrix<S> x = moxie::test::random<S>(12, dim, 731);
  Matrix<S> condition;
  std::vector<std::int64_t> ids;
  std::vector<std::uint8_t> mask;

  Tokens<S> tokens(const Sequences& division, bool masked) {
    Tokens<S> in(x, division);
    condition = moxie::test::random<S>(in.sequences.count(), condition_dim, 732);
    ids.clear();
    mask.clear();
    for (Index t = 0; t < 12; ++t) {
      ids.push_back(7 * t % 5);
      mask.push_back(t % 4 == 1 ? 0 : 1);
    }
    in.condition = condition;
    in.ids = ids;
    in.training = true;
    in.rng = moxie::Rng(733);
    if (masked) {
      in.mask = mask;
    }
    return in;
  }
};

/// Calls `f(name, layer, looks at positions)` for every router.
template <class S, class F>
void for_every_router(F&& f) {
  using Experts = moxie::SwiGluExperts<S>;
  const Experts bank(experts, dim, {3});
  const auto top_k = [&](const char* name, moxie::TopKRouterConfig config, bool positions = false) {
    config.model_dim = dim;
    config.experts = experts;
    f(name, Moe<moxie::TopKRouter<S>, Experts>(moxie::TopKRouter<S>(config), bank), positions);
  };
  top_k("V-MoE",
        {.top_k = 2,
         .balance = {.importance = 0.3, .load = 0.3},
         .capacity = {.factor = 0.7, .priority = Priority::weight},
         .noise = {.logits = 1}},
        true);
  top_k("GShard", {.top_k = 2, .normalize = true, .balance = {.gshard = 0.2}, .capacity = {.factor = 1}}, true);
  top_k("Switch", {.top_k = 1, .balance = {.expert_level = 0.1}, .capacity = {.factor = 0.8}, .noise = {.jitter = 0.1}}, true);
  top_k("Mixtral", {.top_k = 2, .order = moxie::TopKOrder::top_k_softmax, .balance = {.z = 0.1}});
  top_k("DeepSeekMoE", {.top_k = 2, .balance = {.expert_level = 0.1, .device_level = 0.2, .devices = 2}});
  top_k("DeepSeek-V3", {.top_k = 2,
                        .normalize = true,
                        .scale = 2.5,
                        .balance = {.sequence_level = 0.3},
                        .score = moxie::Score::sigmoid,
                        .groups = {.count = 2, .chosen = 1},
                        .selection_bias = true});
  top_k("sigmoid, all losses", {.top_k = 3,
                                .balance = {.expert_level = 0.1,
                                            .sequence_level = 0.2,
                                            .device_level = 0.3,
                                            .gshard = 0.4,
                                            .importance = 0.5,
                                            .z = 0.6,
                                            .mean_entropy = 0.7,
                                            .token_entropy = 0.8,
                                            .devices = 2},
                                .score = moxie::Score::sigmoid});
  f("expert choice",
    Moe<moxie::ExpertChoiceRouter<S>, Experts>(
        moxie::ExpertChoiceRouter<S>({.model_dim = dim, .experts = experts, .capacity = {.factor = 1.5}}), bank),
    false);
  f("hash", Moe<moxie::HashRouter<S>, Experts>(moxie::HashRouter<S>({.experts = experts}), bank), false);
  f("cluster",
    Moe<moxie::ClusterRouter<S>, Experts>(
        moxie::ClusterRouter<S>({.feature_dim = condition_dim, .experts = experts, .top_k = 2}), bank),
    false);
  f("timestep",
    Moe<moxie::TimestepRouter<S>, Experts>(
        moxie::TimestepRouter<S>({.condition_dim = condition_dim, .experts = experts, .top_k = 2}), bank),
    false);
  for (const bool normalize : {true, false}) {
    f("soft",
      Moe<moxie::SoftRouter<S>, Experts>(
          moxie::SoftRouter<S>({.model_dim = dim, .experts = experts, .slots_per_expert = 2, .normalize = normalize}), bank),
      false);
  }
  f("soft, uniform dispatch",
    Moe<moxie::SoftRouter<S>, Experts>(
        moxie::SoftRouter<S>({.model_dim = dim, .experts = experts, .dispatch = moxie::Mixing::uniform}), bank),
    false);
  f("soft, uniform combine",
    Moe<moxie::SoftRouter<S>, Experts>(
        moxie::SoftRouter<S>({.model_dim = dim, .experts = experts, .combine = moxie::Mixing::uniform}), bank),
    false);
}

TEST_CASE_TEMPLATE("every router: keeps the laws on equal, ragged and masked sequences", S, float, double) {
  for (const Sequences& division : {Sequences(), Sequences(4), Sequences(ragged)}) {
    for (const bool masked : {false, true}) {
      Batch<S> batch;
      const Tokens<S> in = batch.tokens(division, masked);
      for_every_router<S>([&](const std::string& name, auto layer, bool positions) {
        CAPTURE(name);
        CAPTURE(masked);
        moxie::test::randomize(layer.parameters(), 734);
        moxie::testing::LawOptions options;
        options.permute_tokens = !positions;
        options.allocations = [] { return moxie::test::allocation_count.load(); };
        for (const auto& law : moxie::testing::check_layer_laws(layer, in, options)) {
          INFO(law.message);
          CHECK(law.holds);
        }
      });
    }
  }
}

TEST_CASE("every router: gradients match central differences on equal, ragged and masked sequences") {
  const Matrix<double> dy = moxie::test::random<double>(12, dim, 735);
  for (const Sequences& division : {Sequences(4), Sequences(ragged)}) {
    for (const bool masked : {false, true}) {
      Batch<double> batch;
      const Tokens<double> in = batch.tokens(division, masked);
      for_every_router<double>([&](const std::string& name, auto layer, bool /*positions*/) {
        CAPTURE(name);
        CAPTURE(masked);
        moxie::test::randomize(layer.parameters(), 736);
        for (const auto& report :
             moxie::testing::check_layer_gradients(layer, in, dy, moxie::Exec{.threads = 1}, {.step = 2e-5})) {
          INFO(report.message());
          if (name == "cluster" && report.tensor == "condition") {
            CHECK(report.analytic == 0);  // a fixed feature, whatever the output does
            continue;
          }
          CHECK(report.passes(moxie::test::gradient_tolerance));
        }
      });
    }
  }
}

TEST_CASE("every router: no tokens are legal, equal or ragged") {
  const std::vector<Index> empty{0, 0, 0};
  for (const Sequences& division : {Sequences(), Sequences(4), Sequences(empty)}) {
    const Matrix<double> none(0, dim);
    Tokens<double> in(none, division);
    const Matrix<double> condition = moxie::test::random<double>(in.sequences.count(), condition_dim, 737);
    in.condition = condition;
    for_every_router<double>([&](const std::string& name, auto layer, bool /*positions*/) {
      CAPTURE(name);
      moxie::test::randomize(layer.parameters(), 738);
      Matrix<double> y(0, dim), dx(0, dim);
      auto grads = layer.parameters().zeros_like();
      auto tape = layer.make_tape();
      layer.forward(in, y, tape);
      layer.backward(in, none, dx, grads, tape);
      CHECK((grads.flat() == 0).all());
      CHECK(tape.balance_loss() == 0);
    });
  }
}

TEST_CASE("top-k: with fewer experts for a call, the choices are the first of the layer's own") {
  moxie::TopKMoE<double> layer({.model_dim = dim, .experts = experts, .top_k = 3, .expert = {.hidden_dim = 3}});
  moxie::test::randomize(layer.parameters(), 739);
  Batch<double> batch;
  Tokens<double> in = batch.tokens({}, false);
  Matrix<double> y(12, dim);
  auto tape = layer.make_tape();
  layer.forward(in, y, tape);
  const std::vector<Index> three(tape.router().choices().begin(), tape.router().choices().end());
  in.top_k = 1;
  layer.forward(in, y, tape);
  CHECK(tape.plan().rows() == 12);
  for (Index t = 0; t < 12; ++t) {
    CHECK(tape.router().choices()[std::size_t(t)] == three[std::size_t(3 * t)]);
  }
  in.top_k = experts + 1;
  CHECK_THROWS_AS(layer.forward(in, y, tape), moxie::ValueError);
}

TEST_CASE_TEMPLATE("top-k: normalized weights sum to 1 where a bias chose experts that have no score left", S, float, double) {
  for (const moxie::TopKOrder order : {moxie::TopKOrder::softmax_top_k, moxie::TopKOrder::top_k_softmax}) {
    for (const double gap : {10.0, 45.0, 120.0, 900.0}) {
      moxie::TopKMoE<S> layer({.model_dim = 2,
                               .experts = 4,
                               .top_k = 2,
                               .expert = {.hidden_dim = 3},
                               .order = order,
                               .normalize = true,
                               .selection_bias = true});
      moxie::test::randomize(layer.parameters(), 745, 0.1);
      layer.parameters()["gate.weight"](0, 0) = S(gap);  // expert 0 has nearly all of the softmax
      layer.parameters()["gate.e_score_correction_bias"].eigen() << S(-5), S(5), S(5), S(-5);
      const Matrix<S> x = moxie::test::random<S>(6, 2, 746, 0.1).array() + S(1);
      Matrix<S> y(6, 2);
      auto tape = layer.make_tape();
      layer.forward(x, y, tape);
      for (Index t = 0; t < 6; ++t) {
        const auto rows = tape.plan().rows_of_token(t);
        CHECK(double(tape.plan().weight(rows[0]) + tape.plan().weight(rows[1])) ==
              doctest::Approx(1).epsilon(moxie::test::Tolerance<S>::layer));
      }
      if constexpr (std::is_same_v<S, double>) {
        const Matrix<double> dy = moxie::test::random<double>(6, 2, 747);
        for (const auto& report : moxie::testing::check_layer_gradients(layer, Tokens<double>(x), dy, {.threads = 1})) {
          INFO(report.message());
          CHECK(report.passes(moxie::test::gradient_tolerance));
        }
      }
    }
  }
}

TEST_CASE("top-k: totals of other experts are refused; loads are counted before drops") {
  moxie::TopKMoE<double> layer({.model_dim = dim,
                                .experts = experts,
                                .top_k = 2,
                                .expert = {.hidden_dim = 3},
                                .balance = {.sequence_level = 0.4},
                                .capacity = {.factor = 0.5}});
  moxie::test::randomize(layer.parameters(), 748);
  const Matrix<double> x = moxie::test::random<double>(12, dim, 749);
  Matrix<double> y(12, dim);
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  moxie::BalanceTotals other;
  CHECK_THROWS_AS(tape.router().set_balance_totals(other), moxie::ShapeError);
  other.clear(64);
  CHECK_THROWS_AS(tape.router().set_balance_totals(other), moxie::ShapeError);
  const auto chosen = tape.router().times_chosen();
  CHECK(std::accumulate(chosen.begin(), chosen.end(), std::int64_t{0}) == 24);
  CHECK(tape.plan().rows() + tape.plan().dropped() == 24);
  CHECK(tape.plan().dropped() > 0);
  CHECK(chosen == tape.router().balance_totals().counts);
}

TEST_CASE("top-k: micro-batches under the totals of all have the loss and the gradients of the whole batch") {
  moxie::TopKMoE<double> layer({.model_dim = dim,
                                .experts = experts,
                                .top_k = 2,
                                .expert = {.hidden_dim = 3},
                                .balance = {.expert_level = 0.5, .sequence_level = 0.4, .z = 0.3, .mean_entropy = 0.2}});
  moxie::test::randomize(layer.parameters(), 742);
  const Matrix<double> x = moxie::test::random<double>(12, dim, 743);
  const Matrix<double> dy = moxie::test::random<double>(12, dim, 744);
  const moxie::testing::detail::Step<double> whole = moxie::testing::detail::step(layer, Tokens<double>(x, 3), dy, {});
  const std::vector<std::pair<Index, Index>> parts{{0, 3}, {3, 9}};
  std::vector<moxie::TopKMoE<double>::Tape> tapes(2);
  Matrix<double> y(12, dim), dx(12, dim);
  moxie::BalanceTotals totals;
  const auto rows = [](auto& m, std::pair<Index, Index> part) { return m.middleRows(part.first, part.second); };
  for (std::size_t i = 0; i < 2; ++i) {
    layer.forward({rows(x, parts[i]), 3}, rows(y, parts[i]), tapes[i]);
    totals += tapes[i].router().balance_totals();
  }
  auto grads = layer.parameters().zeros_like();
  for (std::size_t i = 0; i < 2; ++i) {
    tapes[i].router().set_balance_totals(totals);
    layer.backward({rows(x, parts[i]), 3}, rows(dy, parts[i]), rows(dx, parts[i]), grads, tapes[i]);
  }
  CHECK(tapes[0].balance_loss() == whole.balance_loss);  // to the last bit
  CHECK(moxie::test::relative_error(dx, whole.dx) < 1e-14);
  CHECK((grads.flat() - whole.grads.flat()).abs().maxCoeff() < 1e-14 * whole.grads.flat().abs().maxCoeff() * 10);
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <cmath>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Tokens;
using moxie::TopKMoE;
using moxie::TopKOrder;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

struct Mode {
  std::string name;
  Index experts;
  Index top_k;
  TopKOrder order;
  bool normalize;
  double scale;
  moxie::Balance balance;
};

// Both orders, normalized or not, scaled, K = 1 ... E, with and without each balance loss, E = 1.
const Mode modes[] = {
    {"top 1", 4, 1, TopKOrder::softmax_top_k, false, 1, {}},
    {"top 2", 5, 2, TopKOrder::softmax_top_k, false, 1, {}},
    {"top 2, normalized and scaled", 5, 2, TopKOrder::softmax_top_k, true, 2.5, {}},
    {"top 3 of the logits, scaled", 7, 3, TopKOrder::top_k_softmax, false, 0.75, {}},
    {"top 2 of the logits, normalized anyway", 3, 2, TopKOrder::top_k_softmax, true, 1, {}},
    {"all experts", 4, 4, TopKOrder::softmax_top_k, false, 1, {}},
    {"all experts of the logits", 4, 4, TopKOrder::top_k_softmax, false, 1, {}},
    {"balanced over the batch", 5, 2, TopKOrder::softmax_top_k, false, 1, {.expert_level = 0.3}},
    {"balanced in sequences", 5, 2, TopKOrder::softmax_top_k, true, 1, {.sequence_level = 0.7}},
    {"both losses", 4, 2, TopKOrder::top_k_softmax, false, 1, {.expert_level = 0.3, .sequence_level = 0.7}},
    {"balanced, top 1", 6, 1, TopKOrder::softmax_top_k, false, 3, {.expert_level = 0.5}},
    {"one expert", 1, 1, TopKOrder::softmax_top_k, false, 1, {.expert_level = 0.1}},
    {"negative scale", 4, 2, TopKOrder::top_k_softmax, false, -1.5, {}},
};

constexpr Index model_dim = 5;  // no multiple of a vector register
constexpr Index hidden_dim = 7;
constexpr Index tokens = 12;
constexpr Index sequence_length = 4;
const Exec one_thread{.threads = 1};

template <class S>
TopKMoE<S> make(const Mode& mode) {
  TopKMoE<S> layer({.model_dim = model_dim,
                    .experts = mode.experts,
                    .top_k = mode.top_k,
                    .expert = {hidden_dim},
                    .order = mode.order,
                    .normalize = mode.normalize,
                    .scale = mode.scale,
                    .balance = mode.balance});
  moxie::test::randomize(layer.parameters(), 11);
  return layer;
}

template <class S, class Layer>
Matrix<S> forward(const Layer& layer, const Tokens<S>& in, const Exec& exec = {}) {
  Matrix<S> y = moxie::test::untouched<S>(in.x.rows(), in.x.cols());
  auto tape = layer.make_tape(in.count());
  layer.forward(in, y, tape, exec);
  return y;
}

TEST_CASE_TEMPLATE("top-k layer: y is the weighted sum of the chosen experts", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 21);
  const Matrix<double> x64 = moxie::test::as_double(x);
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const auto layer = make<S>(mode);
    const moxie::Parameters<double> p = moxie::test::as_double(layer.parameters());
    const Matrix<double> weights = reference::top_k_weights(x64, reference::tensor(p, "gate.weight"), mode.top_k,
                                                            mode.order == TopKOrder::top_k_softmax, mode.normalize, mode.scale);
    const Matrix<double> expected = reference::mixture(x64, weights, [&](Index e, const reference::Vector& v) {
      return reference::swiglu(p, "experts." + std::to_string(e) + ".", v);
    });
    CHECK(moxie::test::relative_error(forward<S>(layer, {x, sequence_length}), expected) < Tolerance<S>::layer);
  }
}

TEST_CASE("top-k layer: all gradients match central differences in every mode") {
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 22);
  const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 23);
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const auto reports =
        moxie::testing::check_layer_gradients(make<double>(mode), Tokens<double>{x, sequence_length}, dy, one_thread);
    for (const auto& report : reports) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE_TEMPLATE("top-k layer: keeps the laws in every mode", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 26);
  moxie::testing::LawOptions options;
  options.allocations = [] { return moxie::test::allocation_count.load(); };
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const Tokens<S> in{x, mode.balance.sequence_level > 0 ? sequence_length : 0};
    for (const auto& law : moxie::testing::check_layer_laws(make<S>(mode), in, options)) {
      INFO(law.message);
      CHECK(law.holds);
    }
  }
}

TEST_CASE_TEMPLATE("top-k layer: the same bits for any number of threads in a batch of many blocks", S, float, double) {
  TopKMoE<S> layer({.model_dim = 37, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 70}, .balance = {.expert_level = 0.1}});
  moxie::test::randomize(layer.parameters(), 12, 0.2);
  const Matrix<S> x = moxie::test::random<S>(301, 37, 27);
  const Matrix<S> dy = moxie::test::random<S>(301, 37, 28);
  const auto law = moxie::testing::bits_do_not_depend_on_threads(layer, Tokens<S>{x}, dy);
  INFO(law.message);
  CHECK(law.holds);
}

TEST_CASE_TEMPLATE("top-k layer: with E = K = 1 it is the plain feed-forward, bit by bit", S, float, double) {
  const auto layer = make<S>({"", 1, 1, TopKOrder::softmax_top_k, false, 1, {}});
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 29);
  const moxie::SwiGluExperts<S> feed_forward(1, model_dim, {hidden_dim});
  moxie::Parameters<S> p{moxie::Layout(feed_forward.layout())};
  moxie::zip([&](const moxie::TensorInfo& info, auto w) { w.eigen() = layer.parameters()[info.name].eigen(); }, p);
  const Index starts[] = {0, tokens};
  Matrix<S> y(tokens, model_dim);
  moxie::Workspace workspace;
  feed_forward.forward(p.view(), moxie::GroupedRows<S>{starts, x, nullptr}, y, nullptr, workspace);
  CHECK(moxie::test::same_bits(forward<S>(layer, {x}), y));
}

TEST_CASE("top-k layer: with K = E it is the dense mixture") {
  const Mode& mode = modes[5];
  const auto layer = make<double>(mode);
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 30);
  Matrix<double> weights(tokens, mode.experts);
  for (Index t = 0; t < tokens; ++t) {
    weights.row(t) = reference::softmax(layer.parameters()["gate.weight"].eigen() * x.row(t).transpose()).transpose();
  }
  const Matrix<double> expected = reference::mixture(x, weights, [&](Index e, const reference::Vector& v) {
    return reference::swiglu(layer.parameters(), "experts." + std::to_string(e) + ".", v);
  });
  CHECK(moxie::test::relative_error(forward<double>(layer, {x}), expected) < Tolerance<double>::layer);
}

TEST_CASE_TEMPLATE("top-k layer: permuting experts with their weights changes nothing", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 31);
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const auto layer = make<S>(mode);
    auto permuted = layer;
    const auto from = [&](Index e) { return (e + 1) % mode.experts; };
    for (Index e = 0; e < mode.experts; ++e) {
      permuted.parameters()["gate.weight"].eigen().row(e) = layer.parameters()["gate.weight"].eigen().row(from(e));
      for (const char* name : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
        permuted.parameters()["experts." + std::to_string(e) + "." + name].eigen() =
            layer.parameters()["experts." + std::to_string(from(e)) + "." + name].eigen();
      }
    }
    const Tokens<S> in{x, sequence_length};
    CHECK(moxie::test::relative_error(forward<S>(permuted, in), forward<S>(layer, in)) < Tolerance<S>::layer);
    auto a = layer.make_tape();
    auto b = layer.make_tape();
    Matrix<S> y(tokens, model_dim);
    layer.forward(in, y, a);
    permuted.forward(in, y, b);
    CHECK(b.balance_loss() == doctest::Approx(a.balance_loss()).epsilon(1e-6));
  }
}

TEST_CASE("top-k layer: an expert that no token chose has exactly zero gradient") {
  TopKMoE<double> layer({.model_dim = 4, .experts = 3, .top_k = 1, .expert = {.hidden_dim = 5}});
  moxie::test::randomize(layer.parameters(), 13);
  Matrix<double> x = moxie::test::random<double>(6, 4, 32).cwiseAbs();
  layer.parameters()["gate.weight"].eigen().row(1).setConstant(-10);  // nobody's choice
  Matrix<double> y(6, 4), dx(6, 4);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(x, y, tape);
  layer.backward(x, moxie::test::random<double>(6, 4, 33), dx, grads, tape);
  REQUIRE(tape.plan().tokens_per_expert()[1] == 0);
  CHECK(tape.statistics().dead_experts >= 1);
  for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
    CHECK((grads["experts.1." + std::string(name) + ".weight"].eigen().array() == 0).all());
  }
  CHECK((grads["gate.weight"].eigen().row(1).array() != 0).all());  // the softmax still sees its logit
}

TEST_CASE("top-k layer: T = 0 and T = 1 are batches too") {
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const auto layer = make<double>(mode);
    auto tape = layer.make_tape();
    auto grads = layer.parameters().zeros_like();
    Matrix<double> none(0, model_dim), y(0, model_dim), dx(0, model_dim);
    layer.forward(none, y, tape);
    layer.backward(none, none, dx, grads, tape);
    CHECK((grads.flat() == 0).all());
    CHECK(tape.balance_loss() == 0);
    CHECK(tape.plan().rows() == 0);
    CHECK(tape.statistics().dead_experts == mode.experts);

    const Matrix<double> one = moxie::test::random<double>(1, model_dim, 34);
    const Matrix<double> dy = moxie::test::random<double>(1, model_dim, 35);
    for (const auto& report : moxie::testing::check_layer_gradients(layer, Tokens<double>{one}, dy, one_thread)) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE("top-k layer: constant weights are refused for K = 1 and the message says why") {
  const auto build = [](TopKOrder order, bool normalize, bool allow) {
    return [=] {
      TopKMoE<float>({.model_dim = 4,
                      .experts = 3,
                      .top_k = 1,
                      .expert = {.hidden_dim = 2},
                      .order = order,
                      .normalize = normalize,
                      .allow_constant_weights = allow});
    };
  };
  using moxie::test::contains;
  using moxie::test::message_of;
  const std::string why = "the gate gets no gradient from the output";
  CHECK(contains(message_of<moxie::ValueError>(build(TopKOrder::softmax_top_k, true, false)), why));
  CHECK(contains(message_of<moxie::ValueError>(build(TopKOrder::top_k_softmax, false, false)), why));
  CHECK_NOTHROW(build(TopKOrder::softmax_top_k, false, false)());
  CHECK_NOTHROW(build(TopKOrder::softmax_top_k, true, true)());
}

TEST_CASE("top-k layer: the allowed constant weights are 1, and the gate learns from the balance loss alone") {
  TopKMoE<double> layer({.model_dim = 4,
                         .experts = 3,
                         .top_k = 1,
                         .expert = {.hidden_dim = 2},
                         .normalize = true,
                         .allow_constant_weights = true});
  moxie::test::randomize(layer.parameters(), 14);
  const Matrix<double> x = moxie::test::random<double>(6, 4, 36);
  Matrix<double> y(6, 4), dx(6, 4);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(x, y, tape);
  for (Index r = 0; r < tape.plan().rows(); ++r) {
    CHECK(tape.plan().weight(r) == doctest::Approx(1).epsilon(1e-15));
  }
  layer.backward(x, moxie::test::random<double>(6, 4, 37), dx, grads, tape);
  CHECK(grads["gate.weight"].eigen().cwiseAbs().maxCoeff() < 1e-15);
}

TEST_CASE("top-k layer: experts, K and sizes that make no layer are refused by name") {
  using moxie::test::contains;
  using moxie::test::message_of;
  const auto build = [](Index dim, Index experts, Index k, Index hidden) {
    return message_of<moxie::ValueError>(
        [=] { TopKMoE<float>({.model_dim = dim, .experts = experts, .top_k = k, .expert = {.hidden_dim = hidden}}); });
  };
  CHECK(contains(build(4, 3, 4, 2), "top_k is 4, expected at most the 3 experts"));
  CHECK(contains(build(4, 0, 1, 2), "experts is 0"));
  CHECK(contains(build(4, -1, 1, 2), "experts is -1"));
  CHECK(contains(build(4, 3, 0, 2), "top_k is 0"));
  CHECK(contains(build(0, 3, 1, 2), "model_dim is 0"));
  CHECK(contains(build(4, 3, 1, 0), "hidden_dim is 0"));
}

TEST_CASE("top-k layer: a logit that is not finite is refused with the token's index, and y stays as it was") {
  auto layer = make<float>(modes[1]);
  layer.parameters()["gate.weight"].eigen().col(2).setConstant(10);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::max()}) {
    Matrix<float> x = moxie::test::random<float>(9, model_dim, 38);
    x(5, 2) = bad;  // the largest float is finite, ten times as much is not
    x(7, 2) = bad;
    Matrix<float> y = moxie::test::untouched<float>(9, model_dim);
    auto tape = layer.make_tape();
    const std::string message = moxie::test::message_of<moxie::ValueError>([&] { layer.forward(x, y, tape); });
    CAPTURE(message);
    CHECK(moxie::test::contains(message, "token 5 "));
    CHECK(moxie::test::is_untouched(y));
  }
}

// With dy = 0 all gradients are those of the balance losses.
TEST_CASE("top-k moe: the gradient of the balance losses has the caller's factor, masked or not") {
  for (const moxie::Score score : {moxie::Score::softmax, moxie::Score::sigmoid}) {
    TopKMoE<double> layer({.model_dim = 6,
                           .experts = 4,
                           .top_k = 2,
                           .expert = {.hidden_dim = 8},
                           .balance = {.expert_level = 0.3, .sequence_level = 0.2, .importance = 0.1, .z = 0.4},
                           .score = score});
    layer.initialize(moxie::Rng{5});
    const Matrix<double> x = moxie::test::random<double>(12, 6, 771);
    const Matrix<double> dy = Matrix<double>::Zero(12, 6);
    std::vector<std::uint8_t> mask(12, 1);
    for (const bool masked : {false, true}) {
      mask[3] = masked ? 0 : 1;
      Tokens<double> in(x, 4);
      in.mask = mask;
      auto tape = layer.make_tape();
      Matrix<double> y(12, 6);
      layer.forward(in, y, tape);
      const auto gradient = [&](double factor) {
        auto grads = layer.parameters().zeros_like();
        Matrix<double> dx(12, 6);
        moxie::TokensGradient<double> din(dx);
        din.loss_factor = factor;
        layer.backward(in, dy, din, grads, tape);
        return std::pair(dx, grads);
      };
      const auto [dx, grads] = gradient(1);
      const auto [scaled_dx, scaled_grads] = gradient(1024);
      const auto [none_dx, none_grads] = gradient(0);
      CHECK(dx.norm() > 1e-3);
      CHECK(moxie::test::same_bits(scaled_dx, Matrix<double>(1024 * dx)));  // a power of two rounds nothing
      CHECK((scaled_grads.flat() == 1024 * grads.flat()).all());
      CHECK(none_dx.norm() == 0);
      CHECK((none_grads.flat() == 0).all());
    }
    moxie::TokensGradient<double> din;
    Matrix<double> y(12, 6), dx(12, 6);
    auto tape = layer.make_tape();
    layer.forward({x, 4}, y, tape);
    auto grads = layer.parameters().zeros_like();
    din.x = dx;
    din.loss_factor = std::nan("");
    CHECK_THROWS_AS(layer.backward({x, 4}, dy, din, grads, tape), moxie::ValueError);
    CHECK((grads.flat() == 0).all());
  }
}

}  // namespace

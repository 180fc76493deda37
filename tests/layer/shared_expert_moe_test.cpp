// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/layer/shared_expert_moe.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::SharedExpertMoE;
using moxie::Tokens;
using moxie::TopKOrder;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

constexpr Index model_dim = 5;
constexpr Index tokens = 12;
constexpr Index sequence_length = 3;

struct Mode {
  std::string name;
  TopKOrder order;
  bool normalize;
  double scale;
  moxie::Balance balance;
};
// The four variants of DiT-MoE's block, and the other order.
const Mode modes[] = {
    {"batch loss", TopKOrder::softmax_top_k, false, 1, {.expert_level = 0.01}},
    {"batch loss, normalized", TopKOrder::softmax_top_k, true, 1, {.expert_level = 0.01}},
    {"sequence loss", TopKOrder::softmax_top_k, false, 1, {.sequence_level = 0.01}},
    {"sequence loss, normalized", TopKOrder::softmax_top_k, true, 2, {.sequence_level = 0.01}},
    {"logits first", TopKOrder::top_k_softmax, false, 1, {}},
};

template <class S>
SharedExpertMoE<S> make(const Mode& mode) {
  SharedExpertMoE<S> layer({.model_dim = model_dim,
                            .experts = 5,
                            .top_k = 2,
                            .expert = {.hidden_dim = 6},
                            .shared = {.hidden_dim = 9},
                            .order = mode.order,
                            .normalize = mode.normalize,
                            .scale = mode.scale,
                            .balance = mode.balance});
  moxie::test::randomize(layer.parameters(), 41);
  return layer;
}

TEST_CASE_TEMPLATE("shared-expert layer: y is the mixture and the shared feed-forward", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 42);
  const Matrix<double> x64 = moxie::test::as_double(x);
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const auto layer = make<S>(mode);
    const moxie::Parameters<double> p = moxie::test::as_double(layer.parameters());
    const Matrix<double> weights = reference::top_k_weights(x64, reference::tensor(p, "gate.weight"), 2,
                                                            mode.order == TopKOrder::top_k_softmax, mode.normalize, mode.scale);
    Matrix<double> expected = reference::mixture(x64, weights, [&](Index e, const reference::Vector& v) {
      return reference::swiglu(p, "experts." + std::to_string(e) + ".", v);
    });
    for (Index t = 0; t < tokens; ++t) {
      expected.row(t) += reference::swiglu(p, "shared_experts.", x64.row(t).transpose()).transpose();
    }
    Matrix<S> y(tokens, model_dim);
    auto tape = layer.make_tape();
    layer.forward(Tokens<S>{x, sequence_length}, y, tape);
    CHECK(moxie::test::relative_error(y, expected) < Tolerance<S>::layer);
  }
}

TEST_CASE("shared-expert layer: all gradients match central differences in every mode") {
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 43);
  const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 44);
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    for (const auto& report : moxie::testing::check_layer_gradients(make<double>(mode), Tokens<double>{x, sequence_length}, dy,
                                                                    Exec{.threads = 1})) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE_TEMPLATE("shared-expert layer: keeps the laws in every mode", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 45);
  moxie::testing::LawOptions options;
  options.allocations = [] { return moxie::test::allocation_count.load(); };
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    for (const auto& law : moxie::testing::check_layer_laws(make<S>(mode), Tokens<S>{x, sequence_length}, options)) {
      INFO(law.message);
      CHECK(law.holds);
    }
  }
}

TEST_CASE_TEMPLATE("shared-expert layer: shared only is a plain feed-forward, forward and backward, bit by bit", S, float,
                   double) {
  auto layer = make<S>({"", TopKOrder::softmax_top_k, false, 1, {}});
  for (Index e = 0; e < 5; ++e) {  // then the routed experts are zero, and so are their gradients but that of down_proj
    layer.parameters()["experts." + std::to_string(e) + ".down_proj.weight"].eigen().setZero();
  }
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 46);
  const Matrix<S> dy = moxie::test::random<S>(tokens, model_dim, 47);
  Matrix<S> y(tokens, model_dim), dx(tokens, model_dim);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(x, y, tape);
  layer.backward(x, dy, dx, grads, tape);

  const moxie::SwiGluExperts<S> plain(1, model_dim, {9}, moxie::BankNames{"shared_experts", false});
  moxie::Parameters<S> p{moxie::Layout(plain.layout())};
  moxie::zip([&](const moxie::TensorInfo& info, auto w) { w.eigen() = layer.parameters()[info.name].eigen(); }, p);
  moxie::Parameters<S> plain_grads = p.zeros_like();
  const Index starts[] = {0, tokens};
  const moxie::GroupedRows<S> rows{starts, x, nullptr};
  Matrix<S> plain_y(tokens, model_dim), plain_dx(tokens, model_dim);
  typename moxie::SwiGluExperts<S>::Tape kept;
  moxie::Workspace workspace;
  plain.forward(p.view(), rows, plain_y, &kept, workspace);
  plain.backward(p.view(), rows, dy, {plain_dx, plain_grads}, kept, workspace);
  CHECK(moxie::test::same_bits(y, plain_y));
  CHECK(moxie::test::same_bits(dx, plain_dx));
  moxie::zip(
      [&](const moxie::TensorInfo& info, auto g) { CHECK((g.eigen().array() == grads[info.name].eigen().array()).all()); },
      plain_grads);
}

TEST_CASE("shared-expert layer: a scale of 0 switches the routed experts off, and the gate's gradient is zero") {
  for (const TopKOrder order : {TopKOrder::softmax_top_k, TopKOrder::top_k_softmax}) {
    const auto layer = make<double>({"", order, false, 0, {}});
    const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 48);
    const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 49);
    for (const auto& report : moxie::testing::check_layer_gradients(layer, Tokens<double>{x}, dy, Exec{.threads = 1})) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE("shared-expert layer: T = 0 is a batch too") {
  const auto layer = make<float>(modes[2]);
  Matrix<float> none(0, model_dim), y(0, model_dim), dx(0, model_dim);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(Tokens<float>{none, sequence_length}, y, tape);
  layer.backward(Tokens<float>{none, sequence_length}, none, dx, grads, tape);
  CHECK((grads.flat() == 0).all());
}

TEST_CASE("shared-expert layer: tensors have the names of the reference") {
  const auto layer = make<float>(modes[0]);
  for (const char* name :
       {"gate.weight", "experts.0.gate_proj.weight", "experts.4.down_proj.weight", "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"}) {
    CAPTURE(std::string(name));
    CHECK(layer.layout().find(name) >= 0);
  }
  CHECK(layer.layout().tensors().size() == 1 + 5 * 3 + 3);
  CHECK(layer.parameters()["shared_experts.down_proj.weight"].cols() == 9);
}

TEST_CASE("shared-expert layer: a shared feed-forward without width is refused") {
  CHECK_THROWS_AS(SharedExpertMoE<float>({.model_dim = 4, .experts = 2, .top_k = 1, .expert = {.hidden_dim = 3}}),
                  moxie::ValueError);
}

}  // namespace

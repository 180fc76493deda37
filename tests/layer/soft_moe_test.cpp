// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::SoftMoE;
using moxie::Tokens;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

constexpr Index model_dim = 5;
constexpr Index tokens = 12;
constexpr Index sequence_length = 4;
const Exec one_thread{.threads = 1};

struct Mode {
  std::string name;
  Index experts;
  Index slots;
  bool normalize;
};
const Mode modes[] = {
    {"normalized, one slot", 3, 1, true},   {"normalized, three slots", 3, 3, true},
    {"normalized, one expert", 1, 2, true}, {"normalized, one slot in all", 1, 1, true},
    {"plain, one slot", 4, 1, false},       {"plain, two slots", 3, 2, false},
    {"more slots than tokens", 5, 3, true},
};

template <class S>
SoftMoE<S> make(const Mode& mode) {
  SoftMoE<S> layer({.model_dim = model_dim,
                    .experts = mode.experts,
                    .slots_per_expert = mode.slots,
                    .expert = {.hidden_dim = 7},
                    .normalize = mode.normalize});
  moxie::test::randomize(layer.parameters(), 51);
  if (mode.normalize) {
    layer.parameters()["scale"](0, 0) = S(1.7);
  }
  return layer;
}

// One sequence after the other.
Matrix<double> expected_output(const Mode& mode, const moxie::Parameters<double>& p, const Matrix<double>& x, Index length) {
  Matrix<double> y(x.rows(), x.cols());
  const Matrix<double> phi = reference::tensor(p, "phi.weight");
  for (Index first = 0; first < x.rows(); first += length) {
    const Matrix<double> part = x.middleRows(first, length);
    const Matrix<double> logits =
        mode.normalize ? Matrix<double>(reference::l2norm(part) * (p["scale"](0, 0) * reference::l2norm(phi)).transpose())
                       : Matrix<double>(part * phi.transpose());
    y.middleRows(first, length) = reference::soft_mixture(part, logits, mode.slots, [&](Index e, const reference::Vector& v) {
      return reference::mlp(p, "experts." + std::to_string(e) + ".", v, &reference::gelu_tanh);
    });
  }
  return y;
}

TEST_CASE_TEMPLATE("soft layer: y is the mixture of slots, sequence by sequence", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 52);
  for (const Mode& mode : modes) {
    for (const Index length : {Index{0}, sequence_length, Index{1}}) {
      CAPTURE(mode.name);
      CAPTURE(length);
      const auto layer = make<S>(mode);
      Matrix<S> y(tokens, model_dim);
      auto tape = layer.make_tape();
      layer.forward(Tokens<S>{x, length}, y, tape);
      const Matrix<double> expected = expected_output(mode, moxie::test::as_double(layer.parameters()),
                                                      moxie::test::as_double(x), length == 0 ? tokens : length);
      CHECK(moxie::test::relative_error(y, expected) < Tolerance<S>::layer);
    }
  }
}

TEST_CASE("soft layer: all gradients match central differences in every mode") {
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 53);
  const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 54);
  for (const Mode& mode : modes) {
    for (const Index length : {Index{0}, sequence_length}) {
      CAPTURE(mode.name);
      CAPTURE(length);
      for (const auto& report :
           moxie::testing::check_layer_gradients(make<double>(mode), Tokens<double>{x, length}, dy, one_thread)) {
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      }
    }
  }
}

TEST_CASE_TEMPLATE("soft layer: keeps the laws in every mode", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 55);
  moxie::testing::LawOptions options;
  options.allocations = [] { return moxie::test::allocation_count.load(); };
  for (const Mode& mode : modes) {
    for (const Index length : {Index{0}, sequence_length}) {
      CAPTURE(mode.name);
      CAPTURE(length);
      for (const auto& law : moxie::testing::check_layer_laws(make<S>(mode), Tokens<S>{x, length}, options)) {
        INFO(law.message);
        CHECK(law.holds);
      }
    }
  }
}

TEST_CASE("soft layer: tiny and zero tokens are routed by the ε inside the root, forward and backward") {
  const Mode mode = modes[1];
  const auto layer = make<double>(mode);
  for (const double norm : {1e-8, 1e-3, 0.0}) {
    CAPTURE(norm);
    Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 56);
    x *= norm;
    Matrix<double> y(tokens, model_dim);
    auto tape = layer.make_tape();
    layer.forward(Tokens<double>{x, sequence_length}, y, tape);
    const Matrix<double> expected = expected_output(mode, layer.parameters(), x, sequence_length);
    CHECK(moxie::test::relative_error(y, expected) < Tolerance<double>::layer);
    // The normalization bends over lengths of √ε = 1e-3: the step has to be far below.
    const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 57);
    const auto reports =
        moxie::testing::check_layer_gradients(layer, Tokens<double>{x, sequence_length}, dy, one_thread, {.step = 1e-5});
    INFO(reports.front().message());
    CHECK(reports.front().passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE("soft layer: tiny tokens of one norm give finite outputs in float too") {
  const auto layer = make<float>(modes[1]);
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 58, 1e-8);
  Matrix<float> y(tokens, model_dim), dx(tokens, model_dim);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(x, y, tape);
  layer.backward(x, y, dx, grads, tape);
  const Matrix<double> expected =
      expected_output(modes[1], moxie::test::as_double(layer.parameters()), moxie::test::as_double(x), tokens);
  CHECK(moxie::test::relative_error(y, expected) < Tolerance<float>::layer);
  CHECK(dx.allFinite());
  CHECK(grads.flat().isFinite().all());
}

TEST_CASE_TEMPLATE("soft layer: permuting experts with their weights and slots changes nothing", S, float, double) {
  const Mode mode = modes[1];  // 3 experts with 3 slots
  const auto layer = make<S>(mode);
  auto permuted = layer;
  for (Index e = 0; e < 3; ++e) {
    const Index from = (e + 1) % 3;
    permuted.parameters()["phi.weight"].middle_rows(3 * e, 3).eigen() =
        layer.parameters()["phi.weight"].middle_rows(3 * from, 3).eigen();
    for (const char* name : {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}) {
      permuted.parameters()["experts." + std::to_string(e) + "." + name].eigen() =
          layer.parameters()["experts." + std::to_string(from) + "." + name].eigen();
    }
  }
  const Matrix<S> x = moxie::test::random<S>(tokens, model_dim, 59);
  Matrix<S> a(tokens, model_dim), b(tokens, model_dim);
  auto tape = layer.make_tape();
  layer.forward(Tokens<S>{x, sequence_length}, a, tape);
  permuted.forward(Tokens<S>{x, sequence_length}, b, tape);
  CHECK(moxie::test::relative_error(b, a) < Tolerance<S>::layer);
}

TEST_CASE("soft layer: sequences do not see each other, bit by bit") {
  const auto layer = make<double>(modes[1]);
  Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 60);
  Matrix<double> before(tokens, model_dim), after(tokens, model_dim);
  auto tape = layer.make_tape();
  layer.forward(Tokens<double>{x, sequence_length}, before, tape);
  x.topRows(sequence_length) *= 2;
  layer.forward(Tokens<double>{x, sequence_length}, after, tape);
  const Index rest = tokens - sequence_length;
  CHECK(moxie::test::same_bits<double>(before.bottomRows(rest), after.bottomRows(rest)));
  CHECK_FALSE(moxie::test::same_bits<double>(before.topRows(sequence_length), after.topRows(sequence_length)));
}

TEST_CASE("soft layer: with one slot in all, every token gets the same output") {
  const auto layer = make<double>(modes[3]);
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 61);
  Matrix<double> y(tokens, model_dim);
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  for (Index t = 1; t < tokens; ++t) {
    CHECK(y.row(t) == y.row(0));
  }
}

TEST_CASE("soft layer: T = 0 and T = 1 are batches too") {
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const auto layer = make<double>(mode);
    auto tape = layer.make_tape();
    auto grads = layer.parameters().zeros_like();
    Matrix<double> none(0, model_dim), y(0, model_dim), dx(0, model_dim);
    layer.forward(none, y, tape);
    layer.backward(none, none, dx, grads, tape);
    CHECK((grads.flat() == 0).all());

    const Matrix<double> one = moxie::test::random<double>(1, model_dim, 62);
    Matrix<double> y1(1, model_dim);
    layer.forward(one, y1, tape);
    CHECK(moxie::test::relative_error(y1, expected_output(mode, layer.parameters(), one, 1)) < Tolerance<double>::layer);
  }
}

TEST_CASE("soft layer: a token that is not finite is refused with its index, and y stays as it was") {
  for (const Mode& mode : {modes[1], modes[5]}) {
    const auto layer = make<float>(mode);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 63);
      x(6, 1) = bad;
      Matrix<float> y = moxie::test::untouched<float>(tokens, model_dim);
      auto tape = layer.make_tape();
      const std::string message = moxie::test::message_of<moxie::ValueError>([&] {
        layer.forward(Tokens<float>{x, sequence_length}, y, tape);
      });
      CAPTURE(message);
      CHECK(moxie::test::contains(message, "token 6 "));
      CHECK(moxie::test::is_untouched(y));
    }
  }
}

TEST_CASE("soft layer: sizes that make no layer are refused by name") {
  using moxie::test::contains;
  const auto build = [](Index dim, Index experts, Index slots) {
    return moxie::test::message_of<moxie::ValueError>([=] {
      SoftMoE<float>({.model_dim = dim, .experts = experts, .slots_per_expert = slots, .expert = {.hidden_dim = 2}});
    });
  };
  CHECK(contains(build(0, 2, 1), "model_dim is 0"));
  CHECK(contains(build(4, 0, 1), "experts is 0"));
  CHECK(contains(build(4, 2, 0), "slots_per_expert is 0"));
}

}  // namespace

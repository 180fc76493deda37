// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/layer/dense_feed_forward.hpp>
#include <moxie/moxie.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::DenseFeedForward;
using moxie::Index;
using moxie::Keep;
using moxie::Matrix;
using moxie::Tokens;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

constexpr Index dim = 5, tokens = 12, hidden = 7;

template <class Experts>
DenseFeedForward<Experts> make(std::uint64_t seed = 1) {
  DenseFeedForward<Experts> layer({.model_dim = dim, .expert = {.hidden_dim = hidden}});
  moxie::test::randomize(layer.parameters(), seed);
  return layer;
}
std::vector<std::uint8_t> mask_of(Index n) {
  std::vector<std::uint8_t> mask;
  for (Index t = 0; t < n; ++t) {
    mask.push_back(t % 4 == 1 ? 0 : 1);
  }
  return mask;
}
/// All tokens to one expert, with weight 1.
template <class S>
class OneExpert : public moxie::FixedRouter<S> {
 public:
  using typename moxie::FixedRouter<S>::Tape;
  Index experts() const { return 1; }
  void route(moxie::ParameterView<const S> /*p*/, const Tokens<S>& in, moxie::SparsePlan<S>& plan, Tape& /*tape*/,
             const moxie::Context& /*context*/) const {
    plan.build(in.count(), 1, 1, std::vector<Index>(std::size_t(in.count()), 0), std::vector<S>(std::size_t(in.count()), S(1)));
  }
};

TEST_CASE_TEMPLATE("dense feed-forward: y is the function of the expert, token by token", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 2);
  const Matrix<double> x64 = moxie::test::as_double(x);
  Matrix<S> y(tokens, dim);
  Matrix<double> expected(tokens, dim);
  const auto check = [&](const auto& layer, auto&& f) {
    const auto p = moxie::test::as_double(layer.parameters());
    for (Index t = 0; t < tokens; ++t) {
      expected.row(t) = f(p, reference::Vector(x64.row(t).transpose())).transpose();
    }
    auto tape = layer.make_tape();
    layer.forward(x, y, tape);
    CHECK(moxie::test::relative_error(y, expected) < Tolerance<S>::layer);
  };
  check(make<moxie::SwiGluExperts<S>>(), [](const auto& p, const auto& v) { return reference::swiglu(p, "feed_forward.", v); });
  check(make<moxie::GeluErfExperts<S>>(),
        [](const auto& p, const auto& v) { return reference::mlp(p, "feed_forward.", v, reference::gelu_erf); });
}

TEST_CASE("dense feed-forward: all gradients match central differences, masked or not") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 3);
  const Matrix<double> dy = moxie::test::random<double>(tokens, dim, 4);
  const std::vector<std::uint8_t> mask = mask_of(tokens);
  for (const bool masked : {false, true}) {
    Tokens<double> in(x);
    if (masked) {
      in.mask = mask;
    }
    const auto check = [&](const auto& layer) {
      for (const auto& report : moxie::testing::check_layer_gradients(layer, in, dy, moxie::Exec{.threads = 1})) {
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      }
    };
    check(make<moxie::SwiGluExperts<double>>());
    check(make<moxie::GeluTanhExperts<double>>());
    check(DenseFeedForward<moxie::LinearExperts<double>>({.model_dim = dim}));
  }
}

TEST_CASE_TEMPLATE("dense feed-forward: keeps the laws of layers", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 5);
  const std::vector<std::uint8_t> mask = mask_of(tokens);
  const Matrix<S> condition = moxie::test::random<S>(3, 2, 6);  // is not read; its gradient is 0
  for (const bool masked : {false, true}) {
    Tokens<S> in(x, 4);
    in.condition = condition;
    if (masked) {
      in.mask = mask;
    }
    moxie::testing::LawOptions options;
    options.allocations = [] { return moxie::test::allocation_count.load(); };
    const auto check = [&](const auto& layer) {
      for (const auto& law : moxie::testing::check_layer_laws(layer, in, options)) {
        INFO(law.message);
        CHECK(law.holds);
      }
    };
    check(make<moxie::SwiGluExperts<S>>());
    check(make<moxie::GeluTanhExperts<S>>());
    check(DenseFeedForward<moxie::LinearExperts<S>>({.model_dim = dim}));
    check(DenseFeedForward(moxie::ExpertBank<moxie::IdentityExpert<S>>(1, dim, {})));
  }
}

TEST_CASE_TEMPLATE("dense feed-forward: the bits of a mixture with one expert of weight 1", Experts,
                   moxie::SwiGluExperts<float>, moxie::SwiGluExperts<double>, moxie::SwiGluExperts<float, moxie::BFloat16>,
                   moxie::GeluTanhExperts<float, moxie::BFloat16>) {
  using S = typename Experts::Scalar;
  const auto layer = make<Experts>();
  moxie::Moe<OneExpert<S>, Experts> mixture(OneExpert<S>{}, Experts(1, dim, {.hidden_dim = hidden}));
  moxie::copy_tensors(layer.parameters().view(), mixture.parameters().view());
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 7);
  const Matrix<S> dy = moxie::test::random<S>(tokens, dim, 8);
  const std::vector<std::uint8_t> mask = mask_of(tokens);
  for (const Keep keep : {Keep::activations, Keep::inputs}) {
    for (const bool masked : {false, true}) {
      Tokens<S> in(x);
      if (masked) {
        in.mask = mask;
      }
      const auto step = [&](const auto& l, Matrix<S>& y, Matrix<S>& dx) {
        auto tape = l.make_tape(0, keep);
        auto grads = l.parameters().zeros_like();
        l.forward(in, y, tape);
        l.backward(in, dy, dx, grads, tape);
        return grads;
      };
      Matrix<S> y(tokens, dim), dx(tokens, dim), y2(tokens, dim), dx2(tokens, dim);
      const auto grads = step(layer, y, dx);
      const auto grads2 = step(mixture, y2, dx2);
      CHECK(moxie::test::same_bits(y, y2));
      CHECK(moxie::test::same_bits(dx, dx2));
      CHECK((grads.flat() == grads2.flat()).all());
    }
  }
}

TEST_CASE("dense feed-forward: masked rows are 0 and never read") {
  const auto layer = make<moxie::SwiGluExperts<float>>();
  Matrix<float> x = moxie::test::random<float>(tokens, dim, 9);
  Matrix<float> dy = moxie::test::random<float>(tokens, dim, 10);
  x.row(1).setConstant(std::numeric_limits<float>::quiet_NaN());
  dy.row(1).setConstant(std::numeric_limits<float>::quiet_NaN());
  std::vector<std::uint8_t> mask(std::size_t(tokens), 1);
  mask[1] = 0;
  Tokens<float> in(x);
  in.mask = mask;
  Matrix<float> y = moxie::test::untouched<float>(tokens, dim), dx = y;
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  layer.forward(in, y, tape);
  layer.backward(in, dy, dx, grads, tape);
  CHECK((y.row(1).array() == 0).all());
  CHECK((dx.row(1).array() == 0).all());
  CHECK(y.allFinite());
  CHECK(dx.allFinite());
  CHECK(grads.flat().allFinite());
  CHECK(tape.statistics().tokens == tokens - 1);
  CHECK(tape.statistics().rows == tokens - 1);

  in.mask = std::span<const std::uint8_t>(mask).first(0);
  CHECK_THROWS_AS(layer.backward(in, dy, dx, grads, tape), moxie::ValueError);  // another mask
}

TEST_CASE("dense feed-forward: statistics and cost are those of one expert with all tokens") {
  const auto layer = make<moxie::SwiGluExperts<double>>();
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 11);
  Matrix<double> y(tokens, dim);
  auto tape = layer.make_tape();
  CHECK(tape.statistics().rows == 0);
  layer.forward(x, y, tape);
  const moxie::RoutingStatistics s = tape.statistics();
  CHECK(s.load == std::vector<double>{1});
  CHECK(s.max_violation == 0);
  CHECK(s.entropy == 1);
  CHECK(s.dropped == 0);
  CHECK(s.unserved == 0);
  CHECK(s.dead_experts == 0);
  CHECK(s.tokens == tokens);
  CHECK(s.rows == tokens);
  CHECK(tape.balance_loss() == 0);
  CHECK(layer.multiply_adds(tape) == moxie::Cost{3. * tokens * dim * hidden, 6. * tokens * dim * hidden});
  CHECK(layer.multiply_adds(tokens, 4) == layer.multiply_adds(tape));
}

TEST_CASE("dense feed-forward: T = 0 is legal") {
  const auto layer = make<moxie::GeluTanhExperts<double>>();
  Matrix<double> none(0, dim), y(0, dim), dx(0, dim);
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  layer.forward(none, y, tape);
  layer.backward(none, none, dx, grads, tape);
  CHECK((grads.flat() == 0).all());
  CHECK(layer.multiply_adds(tape) == moxie::Cost{});
}

TEST_CASE("dense feed-forward: refuses what does not fit, before anything is written") {
  auto layer = make<moxie::SwiGluExperts<float>>();
  const Matrix<float> x = moxie::test::random<float>(tokens, dim, 12);
  Matrix<float> y = moxie::test::untouched<float>(tokens, dim), dx = y;
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  using moxie::ShapeError;
  using moxie::ValueError;

  CHECK_THROWS_AS(layer.backward(x, x, dx, grads, tape), ValueError);  // no forward
  Matrix<float> narrow = moxie::test::untouched<float>(tokens, dim - 1);
  CHECK_THROWS_AS(layer.forward(x, narrow, tape), ShapeError);
  CHECK_THROWS_AS(layer.forward(narrow, y, tape), ShapeError);
  Matrix<float> in_place = x;
  CHECK_THROWS_AS(layer.forward(in_place, in_place, tape), ValueError);
  Tokens<float> in(x);
  in.top_k = 2;
  CHECK_THROWS_AS(layer.forward(in, y, tape), ValueError);
  in.top_k = 1;
  in.gate_x = x;
  CHECK_THROWS_AS(layer.forward(in, y, tape), ValueError);
  CHECK_THROWS_AS(layer.forward(make<moxie::SwiGluExperts<float>>().freeze(), x, y, tape), ValueError);
  CHECK(moxie::test::is_untouched(y));

  layer.forward(x, y, tape);
  const Matrix<float> more = moxie::test::random<float>(tokens + 1, dim, 13);
  Matrix<float> dmore = moxie::test::untouched<float>(tokens + 1, dim);
  CHECK_THROWS_AS(layer.backward(more, more, dmore, grads, tape), ValueError);
  CHECK_THROWS_AS(layer.backward(x, more, dx, grads, tape), ShapeError);
  CHECK_THROWS_AS(layer.backward(x, x, in_place, layer.parameters(), tape), ValueError);  // gradients are the parameters
  CHECK_THROWS_AS(layer.backward(x, in_place, in_place, grads, tape), ValueError);        // dx is dy
  CHECK_THROWS_AS(make<moxie::SwiGluExperts<float>>(2).backward(x, x, dx, grads, tape), ValueError);
  auto inference = layer.make_tape(0, Keep::nothing);
  layer.forward(x, y, inference);
  CHECK_THROWS_AS(layer.backward(x, x, dx, grads, inference), ValueError);
  layer.forward(layer.freeze(), x, y, tape);
  CHECK_THROWS_AS(layer.backward(x, x, dx, grads, tape), ValueError);
  CHECK(moxie::test::is_untouched(dx));
  CHECK(moxie::test::is_untouched(dmore));
  CHECK((grads.flat() == 0).all());

  CHECK_THROWS_AS(DenseFeedForward(moxie::SwiGluExperts<float>(2, dim, {.hidden_dim = 3})), ValueError);
  CHECK_THROWS_AS(layer.multiply_adds(10, 4), ShapeError);
}

}  // namespace

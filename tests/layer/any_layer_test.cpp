// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <functional>
#include <map>
#include <moxie/layer/any_layer.hpp>
#include <moxie/moxie.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::AnyLayer;
using moxie::Context;
using moxie::Exec;
using moxie::Gradients;
using moxie::Index;
using moxie::Keep;
using moxie::Matrix;
using moxie::Outputs;
using moxie::OutputsGradient;
using moxie::ParameterView;
using moxie::RowView;
using moxie::Tokens;
using moxie::TokensGradient;
using moxie::ValueError;
using moxie::Workspace;

constexpr Index dim = 5, experts = 4, hidden = 3, tokens = 12, condition_dim = 3;

/// A block of a user's own: y = x + f(n), n_t = g ⊙ x_t / √(mean of x_t² + 1e-6), f any layer.
template <moxie::Layer Inner>
class NormedBlock {
 public:
  using Scalar = typename Inner::Scalar;

  class Tape {
   public:
    double balance_loss() const { return inner_.balance_loss(); }
    moxie::RoutingStatistics statistics() const { return inner_.statistics(); }

   private:
    friend class NormedBlock;
    typename Inner::Tape inner_;
    moxie::Buffer<Scalar> normed_;
    Workspace workspace_;
  };

  explicit NormedBlock(Inner inner) : inner_(std::move(inner)) {
    layout_.add("norm.weight", {inner_.model_dim()}, {.role = moxie::Role::norm});
    inner_first_ = layout_.add_part("feed_forward.", inner_.layout());
    parameters_ = moxie::Parameters<Scalar>(moxie::Layout(layout_));
  }

  Index model_dim() const { return inner_.model_dim(); }
  const moxie::Layout& layout() const { return layout_; }
  moxie::Parameters<Scalar>& parameters() { return parameters_; }
  const moxie::Parameters<Scalar>& parameters() const { return parameters_; }
  void initialize(ParameterView<Scalar> p, const moxie::Rng& rng) const {
    p[0].eigen().setOnes();
    inner_.initialize(of_inner(p), rng);
  }
  Tape make_tape(Index max_tokens = 0, Keep keep = Keep::activations, std::pmr::memory_resource* resource = nullptr) const {
    Tape tape;
    tape.inner_ = inner_.make_tape(max_tokens, keep, resource);
    return tape;
  }
  moxie::Cost multiply_adds(Index n, const moxie::Sequences& division = {}) const { return inner_.multiply_adds(n, division); }
  moxie::Cost multiply_adds(const Tape& tape) const { return inner_.multiply_adds(tape.inner_); }

  void forward(const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape, const Exec& exec = {}) const {
    forward(parameters_.view(), in, out, tape, {tape.workspace_, exec});
  }
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Context& context) const {
    const RowView<Scalar> n = tape.normed_.matrix(in.count(), model_dim());
    for (Index t = 0; t < in.count(); ++t) {
      for (Index d = 0; d < model_dim(); ++d) {
        n(t, d) = p[0](0, d) * in.x(t, d) * factor(in, t);
      }
    }
    Tokens<Scalar> normed = in;
    normed.x = n;
    inner_.forward(of_inner(p), normed, out, tape.inner_, context);
    for (Index t = 0; t < in.count(); ++t) {
      for (Index d = 0; d < model_dim() && takes_part(in, t); ++d) {
        out.y(t, d) += in.x(t, d);
      }
    }
  }

  void backward(const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout, const TokensGradient<Scalar>& din,
                ParameterView<Scalar> grads, Tape& tape, const Exec& exec = {}) const {
    backward(parameters_.view(), in, dout, {din, grads}, tape, {tape.workspace_, exec});
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, Tape& tape, const Context& context) const {
    const TokensGradient<Scalar>& din = into.tokens;
    const ParameterView<Scalar> grads = into.parameters;
    const Workspace::Frame frame(context.workspace);
    Tokens<Scalar> normed = in;
    normed.x = std::as_const(tape.normed_).view(in.count(), model_dim());
    TokensGradient<Scalar> dnormed = din;
    dnormed.x = context.workspace.matrix<Scalar>(in.count(), model_dim());
    inner_.backward(of_inner(p), normed, dout, {dnormed, of_inner(grads)}, tape.inner_, context);
    for (Index t = 0; t < in.count(); ++t) {
      if (!takes_part(in, t)) {
        std::fill_n(din.x.row(t), model_dim(), Scalar(0));
        continue;
      }
      const Scalar r = factor(in, t);
      Scalar dot = 0;
      for (Index d = 0; d < model_dim(); ++d) {
        grads[0](0, d) += dnormed.x(t, d) * in.x(t, d) * r;
        dot += dnormed.x(t, d) * p[0](0, d) * in.x(t, d);
      }
      for (Index d = 0; d < model_dim(); ++d) {
        din.x(t, d) = dout.y(t, d) + r * dnormed.x(t, d) * p[0](0, d) - r * r * r / Scalar(model_dim()) * dot * in.x(t, d);
      }
    }
  }

 private:
  static bool takes_part(const Tokens<Scalar>& in, Index t) { return in.mask.empty() || in.mask[std::size_t(t)] != 0; }
  static Scalar factor(const Tokens<Scalar>& in, Index t) {
    Scalar squares = 0;
    for (Index d = 0; d < in.x.cols(); ++d) {
      squares += in.x(t, d) * in.x(t, d);
    }
    return 1 / std::sqrt(squares / Scalar(in.x.cols()) + Scalar(1e-6));
  }
  template <class T>
  ParameterView<T> of_inner(ParameterView<T> p) const {
    return p.part(inner_first_, inner_.layout());
  }

  Inner inner_;
  moxie::Layout layout_;
  Index inner_first_ = 0;
  moxie::Parameters<Scalar> parameters_;
};

static_assert(moxie::Layer<NormedBlock<moxie::TopKMoE<float>>>);
static_assert(moxie::Layer<NormedBlock<AnyLayer<double>>>);

/// All that layers look at.
template <class S>
struct Batch {
  Matrix<S> x = moxie::test::random<S>(tokens, dim, 1);
  Matrix<S> dy = moxie::test::random<S>(tokens, dim, 2);
  Matrix<S> condition = moxie::test::random<S>(3, condition_dim, 3);
  std::vector<std::uint8_t> mask;

  explicit Batch() {
    for (Index t = 0; t < tokens; ++t) {
      mask.push_back(t % 5 == 1 ? 0 : 1);
    }
  }
  Tokens<S> in(bool masked) const {
    Tokens<S> out(x, 4);
    out.condition = condition;
    if (masked) {
      out.mask = mask;
    }
    return out;
  }
};

/// Calls `f(name, layer)` for a layer of every kind, its parameters not zero.
template <class S, class F>
void for_every_layer(F&& f) {
  const auto call = [&](const char* name, auto layer) {
    moxie::test::randomize(layer.parameters(), 4);
    f(std::string(name), layer);
  };
  const moxie::TopKMoE<S> top_k(
      {.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}, .balance = {.expert_level = 0.1}});
  call("top-k", top_k);
  call("shared", moxie::SharedExpertMoE<S>(
                     {.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}, .shared = {2 * hidden}}));
  call("soft", moxie::SoftMoE<S>({.model_dim = dim, .experts = experts, .slots_per_expert = 2, .expert = {hidden}}));
  call("expert choice", moxie::ExpertChoiceMoE<S>({.model_dim = dim, .experts = experts, .expert = {hidden}}));
  call("timestep", moxie::TimestepMoE<S>({.model_dim = dim, .condition_dim = condition_dim, .experts = experts, .top_k = 2}));
  call("dense", moxie::DenseFeedForward<moxie::GeluTanhExperts<S>>({.model_dim = dim, .expert = {hidden}}));
  call("block", NormedBlock(top_k));
}

/// A forward and a backward: y, dx, the condition's gradient, those of the parameters.
template <class S>
struct Step {
  Matrix<S> y = moxie::test::untouched<S>(tokens, dim), dx = y;
  Matrix<S> dcondition = moxie::test::untouched<S>(3, condition_dim);
  moxie::Parameters<S> grads;

  template <class L>
  Step(const L& layer, const Tokens<S>& in, const Matrix<S>& dy, typename L::Tape& tape)
      : grads(layer.parameters().zeros_like()) {
    layer.forward(in, y, tape);
    layer.backward(in, dy, {dx, dcondition}, grads, tape);
  }
  bool operator==(const Step& other) const {
    return moxie::test::same_bits(y, other.y) && moxie::test::same_bits(dx, other.dx) &&
           moxie::test::same_bits(dcondition, other.dcondition) && (grads.flat() == other.grads.flat()).all();
  }
};

TEST_CASE_TEMPLATE("AnyLayer: every layer has the bits that it has by itself", S, float, double) {
  const Batch<S> batch;
  for (const bool masked : {false, true}) {
    const Tokens<S> in = batch.in(masked);
    for_every_layer<S>([&](const std::string& name, auto layer) {
      CAPTURE(name);
      CAPTURE(masked);
      const AnyLayer<S> any = layer;
      auto tape = layer.make_tape();
      auto any_tape = any.make_tape();
      const Step<S> step(layer, in, batch.dy, tape);
      CHECK(Step<S>(any, in, batch.dy, any_tape) == step);
      CHECK(any_tape.balance_loss() == tape.balance_loss());
      CHECK(any_tape.statistics().load == tape.statistics().load);
      CHECK(any_tape.statistics().rows == tape.statistics().rows);
      CHECK(any.multiply_adds(any_tape) == layer.multiply_adds(tape));
      CHECK(any.multiply_adds(tokens, 4) == layer.multiply_adds(tokens, 4));
      CHECK(any.model_dim() == dim);
      CHECK(&any.layout() == &any.template get_if<decltype(layer)>()->layout());
      CHECK((any.parameters().flat() == layer.parameters().flat()).all());

      auto keeps_inputs = any.make_tape(tokens, Keep::inputs);
      CHECK(Step<S>(any, in, batch.dy, keeps_inputs) == step);
      typename AnyLayer<S>::Tape made_by_forward;
      CHECK(Step<S>(any, in, batch.dy, made_by_forward) == step);

      // Over parameters and scratch that live elsewhere.
      const moxie::Parameters<S> elsewhere = layer.parameters();
      Workspace workspace;
      AnyLayer<S> zero = any;
      zero.parameters().set_zero();
      Matrix<S> y(tokens, dim), dx(tokens, dim), dcondition(3, condition_dim);
      auto grads = elsewhere.zeros_like();
      zero.forward(elsewhere, in, y, any_tape, workspace);
      zero.backward(elsewhere, in, batch.dy, {{dx, dcondition}, grads}, any_tape, workspace);
      CHECK(moxie::test::same_bits(y, step.y));
      CHECK(moxie::test::same_bits(dx, step.dx));
      CHECK((grads.flat() == step.grads.flat()).all());

      CHECK(any.can_freeze() == (name != "block"));
      if (any.can_freeze()) {
        const auto frozen = any.freeze();
        y.setZero();
        any.forward(frozen, in, y, any_tape);
        CHECK(moxie::test::same_bits(y, step.y));
        CHECK_THROWS_AS(any.backward(in, batch.dy, {dx, dcondition}, grads, any_tape), ValueError);
      } else {
        CHECK_THROWS_AS(any.freeze(), ValueError);
      }

      AnyLayer<S> drawn = any;
      layer.initialize(layer.parameters(), moxie::Rng(5));
      drawn.initialize(moxie::Rng(5));
      CHECK((drawn.parameters().flat() == layer.parameters().flat()).all());
    });
  }
}

TEST_CASE("AnyLayer: keeps the laws of layers, and so does a block of one's own around one") {
  const Batch<double> batch;
  for (const bool masked : {false, true}) {
    const Tokens<double> in = batch.in(masked);
    for_every_layer<double>([&](const std::string& name, const auto& layer) {
      CAPTURE(name);
      moxie::testing::LawOptions options;
      options.allocations = [] { return moxie::test::allocation_count.load(); };
      const auto check = [&](const auto& any) {
        for (const auto& law : moxie::testing::check_layer_laws(any, in, options)) {
          INFO(law.message);
          CHECK(law.holds);
        }
      };
      check(AnyLayer<double>(layer));
      AnyLayer<double> block = NormedBlock<AnyLayer<double>>(layer);
      moxie::test::randomize(block.parameters(), 6);
      check(block);
    });
  }
}

TEST_CASE("AnyLayer: gradients match central differences, of a block of one's own too") {
  const Batch<double> batch;
  for (const bool masked : {false, true}) {
    for_every_layer<double>([&](const std::string& name, const auto& layer) {
      CAPTURE(name);
      for (const auto& report : moxie::testing::check_layer_gradients(AnyLayer<double>(layer), batch.in(masked), batch.dy,
                                                                      Exec{.threads = 1}, {.step = 2e-5})) {
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      }
    });
  }
}

TEST_CASE("AnyLayer: layers of 16-bit elements are layers of float") {
  const Batch<float> batch;
  moxie::TopKMoE<float, moxie::SwiGluExperts<float, moxie::BFloat16>> layer(
      {.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}});
  moxie::test::randomize(layer.parameters(), 7);
  const AnyLayer<float> any = layer;
  auto tape = layer.make_tape();
  auto any_tape = any.make_tape();
  CHECK(Step<float>(any, batch.in(false), batch.dy, any_tape) == Step<float>(layer, batch.in(false), batch.dy, tape));
}

TEST_CASE("AnyLayer: a foreign tape and foreign weights are refused, before anything is written") {
  const Batch<float> batch;
  const Tokens<float> in = batch.in(false);
  const AnyLayer<float> top_k = moxie::TopKMoE<float>({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}});
  const AnyLayer<float> soft = moxie::SoftMoE<float>({.model_dim = dim, .experts = experts, .expert = {hidden}});
  Matrix<float> y = moxie::test::untouched<float>(tokens, dim), dx = y, z(tokens, dim);
  auto grads = top_k.parameters().zeros_like();
  auto foreign = soft.make_tape();
  soft.forward(in, z, foreign);
  const auto expect_refused = [](const std::string& message) { CHECK(moxie::test::contains(message, "another type")); };
  using moxie::test::message_of;
  expect_refused(message_of<ValueError>([&] { top_k.forward(in, y, foreign); }));
  expect_refused(message_of<ValueError>([&] { top_k.backward(in, batch.dy, dx, grads, foreign); }));
  expect_refused(message_of<ValueError>([&] { top_k.multiply_adds(foreign); }));
  expect_refused(message_of<ValueError>([&] { top_k.forward(top_k.freeze(), in, y, foreign); }));
  auto tape = top_k.make_tape();
  expect_refused(message_of<ValueError>([&] { top_k.forward(soft.freeze(), in, y, tape); }));
  CHECK_THROWS_AS(top_k.forward(AnyLayer<float>::Frozen(), in, y, tape), ValueError);
  CHECK_THROWS_AS(top_k.backward(in, batch.dy, dx, grads, tape), ValueError);  // no forward yet
  AnyLayer<float>::Tape none;
  CHECK_THROWS_AS(top_k.backward(in, batch.dy, dx, grads, none), ValueError);
  CHECK(none.balance_loss() == 0);
  CHECK(none.statistics().tokens == 0);
  CHECK(top_k.multiply_adds(none) == moxie::Cost{});
  CHECK(moxie::test::is_untouched(y));
  CHECK(moxie::test::is_untouched(dx));
  CHECK((grads.flat() == 0).all());
  auto soft_grads = soft.parameters().zeros_like();
  soft.backward(in, batch.dy, dx, soft_grads, foreign);  // the refusals left its own tape as it was
}

TEST_CASE("AnyLayer: a copy is a layer of its own, and a layer that was moved away is refused") {
  const Batch<float> batch;
  const Tokens<float> in = batch.in(false);
  moxie::TopKMoE<float> layer({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}});
  moxie::test::randomize(layer.parameters(), 8);
  AnyLayer<float> any = layer;
  AnyLayer<float> copy = any;
  copy.parameters().set_zero();
  CHECK((any.parameters().flat() == layer.parameters().flat()).all());

  auto tape = any.make_tape();
  Matrix<float> y(tokens, dim), dx(tokens, dim);
  any.forward(in, y, tape);
  auto tape_copy = tape;  // holds the forward too
  auto grads = any.parameters().zeros_like();
  tape = any.make_tape();
  any.backward(in, batch.dy, dx, grads, tape_copy);
  CHECK_THROWS_AS(any.backward(in, batch.dy, dx, grads, tape), ValueError);

  AnyLayer<float> moved = std::move(any);
  CHECK(moved.has_value());
  CHECK_FALSE(any.has_value());  // NOLINT(bugprone-use-after-move): what is tested
  const auto refused = [&](auto&& f) { CHECK(moxie::test::contains(moxie::test::message_of<ValueError>(f), "moved away")); };
  refused([&] { any.forward(in, y, tape); });
  refused([&] { any.backward(in, batch.dy, dx, grads, tape_copy); });
  refused([&] { any.make_tape(); });
  refused([&] { any.layout(); });
  refused([&] { any.parameters(); });
  refused([&] { any.initialize(moxie::Rng(1)); });
  refused([&] { any.multiply_adds(1); });
  refused([&] { any.freeze(); });
  refused([&] { any.can_freeze(); });
  refused([&] { any.model_dim(); });
  CHECK(any.get_if<moxie::TopKMoE<float>>() == nullptr);
  const AnyLayer<float> copy_of_none = any;
  CHECK_FALSE(copy_of_none.has_value());
  any = moved;
  any.forward(in, y, tape);
}

TEST_CASE("AnyLayer: the layer and the tape within are there for who knows their types") {
  AnyLayer<float> any =
      moxie::TopKMoE<float>({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}, .selection_bias = true});
  auto* const layer = any.get_if<moxie::TopKMoE<float>>();
  REQUIRE(layer != nullptr);
  CHECK(&layer->parameters() == &any.parameters());
  CHECK(any.get_if<moxie::SoftMoE<float>>() == nullptr);
  CHECK(std::as_const(any).get_if<moxie::TopKMoE<float>>() == layer);
  auto tape = any.make_tape();
  const Batch<float> batch;
  Matrix<float> y(tokens, dim);
  any.forward(batch.x, y, tape);
  REQUIRE(tape.get_if<moxie::TopKMoE<float>::Tape>() != nullptr);
  CHECK(tape.get_if<moxie::TopKMoE<float>::Tape>()->plan().rows() == 2 * tokens);
  CHECK(std::as_const(tape).get_if<moxie::SoftMoE<float>::Tape>() == nullptr);
  // Its parts.
  REQUIRE(std::as_const(tape).get_if<moxie::SparsePlan<float>>() != nullptr);
  CHECK(tape.get_if<moxie::SparsePlan<float>>() == &tape.get_if<moxie::TopKMoE<float>::Tape>()->plan());
  CHECK(tape.get_if<moxie::TopKRouter<float>::Tape>() == &tape.get_if<moxie::TopKMoE<float>::Tape>()->router());
  CHECK(tape.get_if<moxie::DensePlan<float>>() == nullptr);
  CHECK(tape.get_if<moxie::SparsePlan<double>>() == nullptr);
}

/// Of what a user's configuration file says.
// [choose]
moxie::AnyLayer<float> make_layer(const std::string& kind, moxie::Index width) {
  if (kind == "dense") {
    return moxie::DenseFeedForward<moxie::SwiGluExperts<float>>({.model_dim = width, .expert = {.hidden_dim = 8 * width}});
  }
  if (kind == "soft") {
    return moxie::SoftMoE<float>(
        {.model_dim = width, .experts = 16, .slots_per_expert = 2, .expert = {.hidden_dim = 4 * width}});
  }
  return moxie::TopKMoE<float>({.model_dim = width, .experts = 16, .top_k = 2, .expert = {.hidden_dim = 4 * width}});
}
// [choose]

TEST_CASE("AnyLayer: the page's snippets") {
  const Matrix<float> x = moxie::test::random<float>(24, 8, 9);
  Matrix<float> y(24, 8), dx(24, 8);
  const Matrix<float>& dy = x;
  double rows = 0;
  for (const std::string kind : {"dense", "soft", "top-k"}) {
    // [run]
    moxie::AnyLayer<float> layer = make_layer(kind, 8);
    layer.initialize(moxie::Rng{1});
    auto grads = layer.parameters().zeros_like();
    auto tape = layer.make_tape();
    layer.forward({x, 12}, y, tape);  // two sequences of 12 tokens
    layer.backward({x, 12}, dy, dx, grads, tape);
    const double multiply_adds = layer.multiply_adds(tape).forward;  // of the rows that were computed
    // [run]
    CHECK(multiply_adds > 0);
    CHECK(y.allFinite());
    CHECK(dx.allFinite());
    rows += double(tape.statistics().rows);
  }
  CHECK(rows == 24 + 2 * 16 * 2 + 24 * 2);
}

}  // namespace

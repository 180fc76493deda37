// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <core/resident_memory.hpp>
#include <memory_resource>
#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/moxie.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>
#include <thread>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Moe;
using moxie::RowView;
using moxie::Tokens;
using moxie::test::contains;
using moxie::test::message_of;

constexpr Index model_dim = 5;
constexpr Index tokens = 12;
const Exec one_thread{.threads = 1};

moxie::TopKMoE<float> top_k_layer() {
  moxie::TopKMoE<float> layer({.model_dim = model_dim, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 6}});
  moxie::test::randomize(layer.parameters(), 72);
  return layer;
}

template <class Layer>
void check_gradients(const Layer& layer, const Tokens<double>& in) {
  const Matrix<double> dy = moxie::test::random<double>(in.x.rows(), in.x.cols(), 73);
  for (const auto& report : moxie::testing::check_layer_gradients(layer, in, dy, one_thread)) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE("layer: gradients match central differences with every bank and with shared experts of each") {
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 74);
  const auto check = [&](auto experts, auto shared) {
    Moe layer(moxie::TopKRouter<double>({.model_dim = model_dim, .experts = 4, .top_k = 2}), std::move(experts),
              std::optional(std::move(shared)));
    moxie::test::randomize(layer.parameters(), 75);
    check_gradients(layer, Tokens<double>{x});
  };
  const moxie::BankNames shared{"shared", false};
  using Tanh = moxie::GeluTanhExperts<double>;
  using Erf = moxie::GeluErfExperts<double>;
  using Linear = moxie::LinearExperts<double>;
  check(Tanh(4, model_dim, {7}), Tanh(1, model_dim, {3}, shared));
  check(Erf(4, model_dim, {7}), Erf(1, model_dim, {3}, shared));
  check(Linear(4, model_dim, {.bias = true}), Linear(1, model_dim, {.bias = true}, shared));
  check(Linear(4, model_dim, {.bias = false}), Linear(1, model_dim, {.bias = false}, shared));
}

TEST_CASE("layer: x and y of other shapes are refused before anything is written") {
  const auto layer = top_k_layer();
  auto tape = layer.make_tape();
  const auto forward = [&](Index rows, Index cols, Index y_rows, Index y_cols, Index length = 0) {
    const Matrix<float> x = moxie::test::random<float>(rows, cols, 81);
    Matrix<float> y = moxie::test::untouched<float>(y_rows, y_cols);
    const std::string message = message_of<moxie::ShapeError>([&] { layer.forward(Tokens<float>{x, length}, y, tape); });
    CHECK(moxie::test::is_untouched(y));
    return message;
  };
  CHECK(forward(7, 6, 7, 6) == "TopKMoE::forward: x is (7,6), expected (T,5)");
  CHECK(forward(7, 5, 6, 5) == "TopKMoE::forward: y is (6,5), expected (7,5)");
  CHECK(forward(7, 5, 7, 4) == "TopKMoE::forward: y is (7,4), expected (7,5)");
  CHECK(forward(7, 5, 7, 5, 3) == "TopKMoE::forward: 7 tokens do not divide into sequences of 3");
  CHECK(contains(forward(7, 5, 7, 5, -1), "7 tokens do not divide into sequences of -1"));
  CHECK(contains(forward(7, 5, 7, 5, 14), "7 tokens do not divide into sequences of 14"));
}

TEST_CASE("layer: dy, dx and gradients of other shapes are refused before anything is written") {
  const auto layer = top_k_layer();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 82);
  Matrix<float> y(tokens, model_dim);
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  auto grads = layer.parameters().zeros_like();
  const auto backward = [&](const Matrix<float>& input, Index dy_rows, Index dy_cols, Index dx_rows, Index dx_cols) {
    const Matrix<float> dy = moxie::test::random<float>(dy_rows, dy_cols, 83);
    Matrix<float> dx = moxie::test::untouched<float>(dx_rows, dx_cols);
    const std::string message = message_of<moxie::ShapeError>([&] { layer.backward(input, dy, dx, grads, tape); });
    CHECK(moxie::test::is_untouched(dx));
    CHECK((grads.flat() == 0).all());
    return message;
  };
  CHECK(backward(x, 11, 5, 12, 5) == "TopKMoE::backward: dy is (11,5), expected (12,5)");
  CHECK(backward(x, 12, 5, 12, 4) == "TopKMoE::backward: dx is (12,4), expected (12,5)");
  CHECK(backward(Matrix<float>(12, 6), 12, 5, 12, 5) == "TopKMoE::backward: x is (12,6), expected (T,5)");

  moxie::Layout other;
  other.add("gate.weight", {4, 5});
  moxie::Parameters<float> other_grads(other);
  Matrix<float> dx = moxie::test::untouched<float>(tokens, model_dim);
  CHECK(contains(message_of<moxie::ShapeError>([&] { layer.backward(x, y, dx, other_grads, tape); }), "another layout"));
  CHECK(contains(message_of<moxie::ShapeError>([&] { layer.forward(other_grads, Tokens<float>{x}, y, tape, Exec{}); }),
                 "another layout"));
  CHECK(moxie::test::is_untouched(dx));
}

TEST_CASE("layer: buffers that overlap are refused, wholly or in part") {
  const auto layer = top_k_layer();
  auto tape = layer.make_tape();
  Matrix<float> both = moxie::test::random<float>(2 * tokens, model_dim, 84);
  const Matrix<float> before = both;
  const auto rows = [&](Index first) { return RowView<float>(both).middle_rows(first, tokens); };
  const RowView<const float> x = rows(0);
  for (const Index first : {Index{0}, Index{1}, tokens - 1}) {
    CHECK(contains(message_of<moxie::ValueError>([&] { layer.forward(x, rows(first), tape); }), "y overlaps x"));
  }
  CHECK(moxie::test::same_bits(both, before));
  CHECK_NOTHROW(layer.forward(x, rows(tokens), tape));

  auto grads = layer.parameters().zeros_like();
  const Matrix<float> dy = moxie::test::random<float>(tokens, model_dim, 85);
  const Matrix<float> now = both;
  Matrix<float> apart(tokens, model_dim);
  CHECK(contains(message_of<moxie::ValueError>([&] { layer.backward(x, dy, rows(tokens - 1), grads, tape); }), "dx overlaps"));
  CHECK(contains(message_of<moxie::ValueError>([&] { layer.backward(x, rows(tokens), rows(tokens), grads, tape); }),
                 "dx overlaps"));
  CHECK(moxie::test::same_bits(both, now));
  CHECK((grads.flat() == 0).all());
  CHECK_NOTHROW(layer.backward(x, x, apart, grads, tape));  // dy may be x
}

TEST_CASE("layer: backward without the forward of this batch is refused") {
  const auto layer = top_k_layer();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 86);
  Matrix<float> y(tokens, model_dim);
  Matrix<float> dx = moxie::test::untouched<float>(tokens, model_dim);
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape(tokens);
  const auto message = [&](const Tokens<float>& in) {
    return message_of<moxie::ValueError>(
        [&] { layer.backward(in, in.x, RowView<float>(dx).middle_rows(0, in.count()), grads, tape); });
  };
  CHECK(contains(message({x}), "the tape holds no forward"));
  layer.forward(x, y, tape);
  CHECK(contains(message({x.topRows(6)}), "the tape holds no forward"));
  CHECK(contains(message({x, 4}), "the tape holds no forward"));
  // A forward that was refused for its numbers leaves none either.
  Matrix<float> bad = x;
  bad(3, 3) = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(layer.forward(bad, y, tape), moxie::ValueError);
  CHECK(contains(message({x}), "the tape holds no forward"));
  CHECK(moxie::test::is_untouched(dx));
  CHECK((grads.flat() == 0).all());
  layer.forward(x, y, tape);
  CHECK_NOTHROW(layer.backward(x, x, dx, grads, tape));
}

TEST_CASE("layer: a tape of another layer, or one that was moved away, is refused; a copy of the layer may use it") {
  const auto layer = top_k_layer();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 95);
  Matrix<float> y(tokens, model_dim);
  Matrix<float> dx = moxie::test::untouched<float>(tokens, model_dim);
  auto grads = layer.parameters().zeros_like();
  for (const moxie::TopKMoE<float>::Config& config :
       {moxie::TopKMoE<float>::Config{.model_dim = model_dim, .experts = 4, .top_k = 4, .expert = {.hidden_dim = 6}},
        {.model_dim = model_dim, .experts = 9, .top_k = 2, .expert = {.hidden_dim = 6}},
        {.model_dim = model_dim, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 5}},
        {.model_dim = model_dim, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 6}, .balance = {.z = 1}}}) {
    const moxie::TopKMoE<float> other(config);
    auto tape = other.make_tape();
    other.forward(x, y, tape);
    CHECK(contains(message_of<moxie::ValueError>([&] { layer.backward(x, y, dx, grads, tape); }),
                   "the tape holds no forward of this layer"));
  }
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  auto moved = std::move(tape);
  CHECK(contains(message_of<moxie::ValueError>([&] { layer.backward(x, y, dx, grads, tape); }),  // NOLINT: that is the point
                 "the tape holds no forward of this layer"));
  CHECK(moxie::test::is_untouched(dx));
  CHECK((grads.flat() == 0).all());
  const auto copy = layer;
  CHECK_NOTHROW(copy.backward(x, y, dx, grads, moved));
}

TEST_CASE("layer: rows in reverse are the same rows, and dx over them is refused") {
  const auto layer = top_k_layer();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 86);
  const Matrix<float> dy = moxie::test::random<float>(tokens, model_dim, 87);
  Matrix<float> y(tokens, model_dim);
  Matrix<float> dx(tokens, model_dim);
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  layer.forward(x, y, tape, one_thread);
  layer.backward(x, dy, dx, grads, tape, one_thread);

  // All four matrices from the last row in memory to the first.
  const auto reversed = [](Matrix<float>& m) {
    return RowView<float>(m.data() + (m.rows() - 1) * m.cols(), m.rows(), m.cols(), -m.cols());
  };
  Matrix<float> x2 = x.colwise().reverse();
  Matrix<float> dy2 = dy.colwise().reverse();
  Matrix<float> y2(tokens, model_dim);
  Matrix<float> dx2(tokens, model_dim);
  auto grads2 = layer.parameters().zeros_like();
  layer.forward(RowView<const float>(reversed(x2)), reversed(y2), tape, one_thread);
  layer.backward(RowView<const float>(reversed(x2)), RowView<const float>(reversed(dy2)), reversed(dx2), grads2, tape,
                 one_thread);
  CHECK(moxie::test::same_bits<float>(y, y2.colwise().reverse()));
  CHECK(moxie::test::same_bits<float>(dx, dx2.colwise().reverse()));
  CHECK((grads.flat() == grads2.flat()).all());

  // dx over the rows below the one that x2's pointer names.
  const RowView<float> low(x2.data(), tokens, model_dim);
  grads2.set_zero();
  CHECK(contains(message_of<moxie::ValueError>([&] {
                   layer.backward(RowView<const float>(reversed(x2)), RowView<const float>(reversed(dy2)), low, grads2, tape);
                 }),
                 "dx overlaps"));
  CHECK(contains(message_of<moxie::ValueError>([&] { layer.forward(RowView<const float>(reversed(x2)), low, tape); }),
                 "y overlaps x"));
  CHECK(x2 == Matrix<float>(x.colwise().reverse()));
  CHECK((grads2.flat() == 0).all());
}

TEST_CASE("layer: columns of one matrix do not overlap; parameters, gradients and dx must not either") {
  auto layer = top_k_layer();
  auto tape = layer.make_tape();
  Matrix<float> both = moxie::test::random<float>(tokens, 2 * model_dim, 96);
  CHECK_NOTHROW(layer.forward(both.leftCols(model_dim), both.rightCols(model_dim), tape));
  CHECK_THROWS_AS(layer.forward(both.leftCols(model_dim), both.middleCols(1, model_dim), tape), moxie::ValueError);
  const Matrix<float> x = both.leftCols(model_dim);
  Matrix<float> y(tokens, model_dim);
  layer.forward(x, y, tape);
  auto grads = layer.parameters().zeros_like();
  Matrix<float> dx(tokens, model_dim);
  CHECK_THROWS_AS(layer.backward(x, y, dx, layer.parameters(), tape), moxie::ValueError);
  const RowView<float> in_grads(grads.flat().data(), tokens, model_dim);
  CHECK_THROWS_AS(layer.backward(x, y, in_grads, grads, tape), moxie::ValueError);
  const RowView<float> in_parameters(layer.parameters().flat().data(), tokens, model_dim);
  CHECK_THROWS_AS(layer.forward(x, in_parameters, tape), moxie::ValueError);
  CHECK_THROWS_AS(layer.forward(x, RowView<float>(y.data(), tokens, model_dim, 0), tape), moxie::ValueError);
  CHECK_THROWS_AS(layer.forward(RowView<const float>(x.data(), -1, model_dim), y, tape), moxie::ValueError);
  CHECK_THROWS_AS(layer.forward(moxie::ParameterView<const float>{}, x, y, tape), moxie::ShapeError);
  layer.parameters() = moxie::Parameters<float>{};
  CHECK_THROWS_AS(layer.forward(x, y, tape), moxie::ShapeError);
}

TEST_CASE("layer: with a mask, the tape knows where the plan's tokens stand, and errors name the caller's rows") {
  const auto layer = top_k_layer();
  Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 97);
  std::vector<std::uint8_t> mask(std::size_t(tokens), 1);
  mask[0] = mask[3] = mask[4] = 0;
  Tokens<float> in(x, 4);
  in.mask = mask;
  Matrix<float> y = moxie::test::untouched<float>(tokens, model_dim);
  auto tape = layer.make_tape();
  layer.forward(in, y, tape);
  CHECK(tape.plan().tokens() == tokens - 3);
  CHECK(tape.row(0) == 1);
  CHECK(tape.row(2) == 5);
  CHECK((y.row(3).array() == 0).all());
  auto grads = layer.parameters().zeros_like();
  Matrix<float> dx(tokens, model_dim);
  auto other_mask = mask;
  other_mask[5] = 0;
  other_mask[4] = 1;
  Tokens<float> other = in;
  other.mask = other_mask;
  CHECK(
      contains(message_of<moxie::ValueError>([&] { layer.backward(other, y, dx, grads, tape); }), "the tape holds no forward"));
  other.mask = {};
  CHECK(
      contains(message_of<moxie::ValueError>([&] { layer.backward(other, y, dx, grads, tape); }), "the tape holds no forward"));
  CHECK_NOTHROW(layer.backward(in, y, dx, grads, tape));
  x(7, 1) = std::numeric_limits<float>::infinity();
  CHECK(message_of<moxie::ValueError>([&] { layer.forward(in, y, tape); }) ==
        "TopKRouter::route: the logits of token 7 are not finite");
}

TEST_CASE("layer: a forward that throws leaves a tape that is safe to look at, and nothing to go back from") {
  const auto layer = top_k_layer();
  auto tape = layer.make_tape();
  Matrix<float> x = moxie::test::random<float>(4, model_dim, 98);
  Matrix<float> y(4, model_dim);
  layer.forward(x, y, tape);
  Matrix<float> many = moxie::test::random<float>(100, model_dim, 99);
  many(50, 1) = std::numeric_limits<float>::quiet_NaN();
  Matrix<float> y_many(100, model_dim);
  const std::vector<std::uint8_t> mask(100, 1);
  for (const bool masked : {false, true}) {
    Tokens<float> in(many);
    in.mask = masked ? std::span<const std::uint8_t>(mask) : std::span<const std::uint8_t>();
    CHECK_THROWS_AS(layer.forward(in, y_many, tape), moxie::ValueError);
    CHECK(tape.plan().tokens() == 0);
    CHECK(tape.router().scores().rows() == 0);
    CHECK(tape.balance_loss() == 0);
    moxie::RoutingRecorder recorder(1, 4);
    CHECK_THROWS_AS(recorder.add(tape, std::vector<Index>(100, 0)), moxie::ShapeError);
  }
}

TEST_CASE("layer: what backward writes is apart from all that it reads") {
  moxie::TimestepMoE<float> layer({.model_dim = model_dim, .condition_dim = model_dim, .experts = 3, .top_k = 2});
  moxie::test::randomize(layer.parameters(), 100);
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 101);
  Matrix<float> condition = moxie::test::random<float>(3, model_dim, 102);
  Tokens<float> in(x, 4);
  in.condition = condition;
  Matrix<float> y(tokens, model_dim), dx(tokens, model_dim), dcondition(3, model_dim);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  CHECK_THROWS_AS(layer.forward(in, RowView<float>(condition.data(), tokens, model_dim), tape), moxie::ValueError);
  layer.forward(in, y, tape);
  CHECK_THROWS_AS(layer.backward(in, y, {dx, condition}, grads, tape), moxie::ValueError);
  CHECK_THROWS_AS(layer.backward(in, y, {dx, RowView<float>(dx).middle_rows(0, 3)}, grads, tape), moxie::ValueError);
  const RowView<const float> in_grads(grads.flat().data(), tokens, model_dim);
  CHECK_THROWS_AS(layer.backward(in, in_grads, {dx, dcondition}, grads, tape), moxie::ValueError);
  Tokens<float> narrow = in;
  const Matrix<float> one = moxie::test::random<float>(3, 1, 103);
  Matrix<float> done(3, 1);
  narrow.condition = one;
  CHECK_THROWS_AS(layer.backward(narrow, y, {dx, done}, grads, tape), moxie::ValueError);
  CHECK_NOTHROW(layer.backward(in, y, {dx, dcondition}, grads, tape));
}

TEST_CASE("layer: noise is forward's alone, with a mask too") {
  moxie::TopKMoE<float> layer(
      {.model_dim = model_dim, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 6}, .noise = {.logits = 1}});
  moxie::test::randomize(layer.parameters(), 104);
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 105);
  const Matrix<float> noise = moxie::test::random<float>(tokens, 4, 106);
  std::vector<std::uint8_t> mask(std::size_t(tokens), 1);
  mask[2] = 0;
  Tokens<float> in(x);
  in.mask = mask;
  in.training = true;
  in.noise = noise;
  Matrix<float> y(tokens, model_dim), dx(tokens, model_dim), dx2(tokens, model_dim);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  layer.forward(in, y, tape);
  layer.backward(in, y, dx, grads, tape);
  in.noise = {};
  layer.backward(in, y, dx2, grads, tape);
  CHECK(moxie::test::same_bits(dx, dx2));
}

TEST_CASE("layer: parts that do not fit are refused") {
  using moxie::ValueError;
  const moxie::TopKRouter<float> router({.model_dim = 5, .experts = 4, .top_k = 2});
  using Experts = moxie::SwiGluExperts<float>;
  const auto build = [&](const Experts& experts, std::optional<Experts> shared = std::nullopt) {
    return message_of<ValueError>([&] { Moe(router, experts, shared); });
  };
  CHECK(contains(build(Experts(3, 5, {2})), "the router has 4 experts, the bank 3"));
  CHECK(contains(build(Experts(4, 6, {2})), "the router has 5 features, the bank 6"));
  CHECK(contains(build(Experts(4, 5, {2}), Experts(2, 5, {2}, {"shared", true})), "shared experts"));
  CHECK(contains(build(Experts(4, 5, {2}), Experts(1, 4, {2}, {"shared", false})), "shared experts"));
  CHECK(contains(build(Experts(4, 5, {2}), Experts(1, 5, {2})), "there is a tensor"));
}

TEST_CASE("layer: parameters in a block elsewhere give the same bits as its own") {
  const auto layer = top_k_layer();
  moxie::TopKMoE<float> other = layer;
  other.parameters().set_zero();
  const moxie::Parameters<float> block = layer.parameters();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 88);
  Matrix<float> y(tokens, model_dim), dx(tokens, model_dim), y2 = y, dx2 = dx;
  auto tape = layer.make_tape();
  auto grads = block.zeros_like();
  auto grads2 = block.zeros_like();
  layer.forward(x, y, tape);
  layer.backward(x, x, dx, grads, tape);
  other.forward(block, Tokens<float>{x}, y2, tape, Exec{});
  other.backward(block, Tokens<float>{x}, x, {dx2, grads2}, tape, Exec{});
  CHECK(moxie::test::same_bits(y, y2));
  CHECK(moxie::test::same_bits(dx, dx2));
  CHECK((grads.flat() == grads2.flat()).all());
}

TEST_CASE("layer: its own block costs nothing before it is used, nor do copies") {
  const auto before = moxie::test::resident_kib();
  const moxie::TopKMoE<float> layer({.model_dim = 512, .experts = 16, .top_k = 2, .expert = {.hidden_dim = 1024}});  // 100 MB
  const moxie::TopKMoE<float> copy = layer;
  CHECK(copy.parameters().view()[Index(layer.layout().tensors().size()) - 1](0, 0) == 0);
  CHECK(moxie::test::resident_kib() - before < 32 << 10);
}

TEST_CASE("layer: layers may share a workspace that is in use, and give the same bits without scratch of their own") {
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 107);
  const Matrix<float> condition = moxie::test::random<float>(3, model_dim, 108);
  std::vector<std::uint8_t> mask(std::size_t(tokens), 1);
  mask[2] = mask[7] = 0;
  const auto check = [&](auto layer, moxie::Keep keep, bool masked) {
    moxie::test::randomize(layer.parameters(), 109);
    const moxie::Parameters<float> block = layer.parameters();
    Tokens<float> in(x, 4);
    in.condition = condition;
    in.mask = masked ? std::span<const std::uint8_t>(mask) : std::span<const std::uint8_t>();
    Tokens<float> next = in;
    // Forward and backward of two layers, one after the other; `scratch` is a workspace or nothing. Returns the allocations.
    const auto run = [&](auto& first, auto& second, RowView<float> y, RowView<float> y2, RowView<float> dy, RowView<float> dx,
                         moxie::Parameters<float>& grads, auto&... scratch) {
      next.x = y;
      const std::size_t before = moxie::test::allocation_count;
      const auto with = [&] {
        if constexpr (sizeof...(scratch) == 0) {
          return one_thread;
        } else {
          return moxie::Context(scratch..., one_thread);
        }
      }();
      layer.forward(block, in, y, first, with);
      layer.forward(block, next, y2, second, with);
      layer.backward(block, next, y2, {dy, grads}, second, with);
      layer.backward(block, in, dy, {dx, grads}, first, with);
      return moxie::test::allocation_count - before;
    };
    auto first = layer.make_tape(0, keep);
    auto second = layer.make_tape(0, keep);
    Matrix<float> y(tokens, model_dim), y2 = y, dy = y, dx = y;
    moxie::Workspace workspace;
    for (int step = 0; step < 3; ++step) {
      const moxie::Workspace::Frame frame(workspace);
      const auto matrix = [&] { return workspace.matrix<float>(tokens, model_dim); };
      const RowView<float> z2 = matrix();
      const RowView<float> dz = matrix();
      auto grads = block.zeros_like();
      auto shared_grads = block.zeros_like();
      const std::size_t allocations = run(first, second, matrix(), z2, matrix(), dz, shared_grads, workspace);
      CHECK((step == 0 || allocations == 0));
      auto own = layer.make_tape(0, keep);
      auto own2 = layer.make_tape(0, keep);
      run(own, own2, y, y2, dy, dx, grads);
      CHECK(moxie::test::same_bits<float>(z2.eigen(), y2));
      CHECK(moxie::test::same_bits<float>(dz.eigen(), dx));
      CHECK((grads.flat() == shared_grads.flat()).all());
    }
    // The tapes' own scratch has not come into being.
    auto grads = block.zeros_like();
    CHECK(run(first, second, y, y2, dy, dx, grads) > 0);
    CHECK(run(first, second, y, y2, dy, dx, grads) == 0);
  };
  for (const moxie::Keep keep : {moxie::Keep::activations, moxie::Keep::inputs}) {
    for (const bool masked : {false, true}) {
      check(moxie::SharedExpertMoE<float>({.model_dim = model_dim,
                                           .experts = 4,
                                           .top_k = 2,
                                           .expert = {.hidden_dim = 6},
                                           .shared = {.hidden_dim = 3},
                                           .balance = {.expert_level = 1}}),
            keep, masked);
      check(moxie::TimestepMoE<float>({.model_dim = model_dim, .condition_dim = model_dim, .experts = 3, .top_k = 2}), keep,
            masked);
      check(moxie::SoftMoE<float>({.model_dim = model_dim, .experts = 3, .slots_per_expert = 2, .expert = {.hidden_dim = 6}}),
            keep, masked);
    }
  }
}

TEST_CASE("layer: rows may lie apart, and what is between them stays as it is") {
  const auto layer = top_k_layer();
  Matrix<float> wide = moxie::test::random<float>(tokens, 2 * model_dim + 3, 89);
  const Matrix<float> x = wide.leftCols(model_dim);
  Matrix<float> expected(tokens, model_dim), dx(tokens, model_dim), y(tokens, model_dim);
  Matrix<float> wide_y = moxie::test::untouched<float>(tokens, model_dim + 2);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  auto wide_grads = layer.parameters().zeros_like();
  layer.forward(x, expected, tape);
  layer.backward(x, expected, dx, grads, tape);
  layer.forward(wide.leftCols(model_dim), wide_y.leftCols(model_dim), tape);
  CHECK(moxie::test::same_bits<float>(wide_y.leftCols(model_dim), expected));
  CHECK((wide_y.rightCols(2).array() == -77).all());
  layer.backward(wide.leftCols(model_dim), wide_y.leftCols(model_dim), y, wide_grads, tape);
  CHECK(moxie::test::same_bits(y, dx));
  CHECK((grads.flat() == wide_grads.flat()).all());
}

TEST_CASE("layer: threads may share a layer, each with a tape of its own") {
  const auto layer = top_k_layer();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 90);
  Matrix<float> expected(tokens, model_dim);
  auto tape = layer.make_tape();
  layer.forward(x, expected, tape);
  std::vector<Matrix<float>> y(4, Matrix<float>(tokens, model_dim));
  std::vector<std::thread> threads;
  for (Matrix<float>& own : y) {
    threads.emplace_back([&] {
      auto own_tape = layer.make_tape();
      for (int i = 0; i < 20; ++i) {
        layer.forward(x, own, own_tape, one_thread);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const Matrix<float>& own : y) {
    CHECK(moxie::test::same_bits(own, expected));
  }
}

TEST_CASE("layer: a copied tape goes on for itself") {
  const auto layer = top_k_layer();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 91);
  Matrix<float> y(tokens, model_dim), dx(tokens, model_dim), dx2(tokens, model_dim);
  auto grads = layer.parameters().zeros_like();
  auto grads2 = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  auto copy = tape;
  layer.backward(x, y, dx, grads, tape);
  const Matrix<float> other = 2 * x;
  Matrix<float> ignored(tokens, model_dim);
  layer.forward(other, ignored, tape);
  layer.backward(x, y, dx2, grads2, copy);
  CHECK(moxie::test::same_bits(dx, dx2));
  CHECK((grads.flat() == grads2.flat()).all());
}

TEST_CASE("layer: steps of other shapes in between allocate once, not again") {
  const auto layer = top_k_layer();
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 92);
  Matrix<float> y(tokens, model_dim), dx(tokens, model_dim);
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  const auto step = [&](Index n) {
    const RowView<const float> in = RowView<const float>(x).middle_rows(0, n);
    layer.forward(in, RowView<float>(y).middle_rows(0, n), tape, one_thread);
    layer.backward(in, in, RowView<float>(dx).middle_rows(0, n), grads, tape, one_thread);
  };
  step(tokens);
  const std::size_t before = moxie::test::allocation_count;
  for (const Index n : {tokens, Index{3}, Index{1}, Index{7}, tokens}) {
    step(n);
  }
  const std::size_t after = moxie::test::allocation_count;
  CHECK(after == before);
}

TEST_CASE("layer: initialize draws the same numbers for the same seed, others for another, and leaves the gaps zero") {
  auto a = top_k_layer();
  auto b = top_k_layer();
  a.initialize(moxie::Rng(5));
  b.initialize(moxie::Rng(5));
  CHECK((a.parameters().flat() == b.parameters().flat()).all());
  b.initialize(moxie::Rng(6));
  for (const auto& info : a.layout().tensors()) {
    CAPTURE(info.name);
    CHECK(a.parameters()[info.name].eigen() != b.parameters()[info.name].eigen());
  }
  // No two tensors begin alike: each has a stream of its own.
  for (const auto& s : a.layout().tensors()) {
    for (const auto& t : a.layout().tensors()) {
      CHECK((s.name == t.name || double(a.parameters()[s.name](0, 0) / a.parameters()[t.name](0, 0)) !=
                                     doctest::Approx(double(a.parameters()[s.name](0, 1) / a.parameters()[t.name](0, 1)))));
    }
  }
}

// Memory that counts, and runs out at allocation number `last`.
class Limited : public std::pmr::memory_resource {
 public:
  std::size_t allocations = 0, blocks = 0, bytes = 0;
  std::size_t last = std::numeric_limits<std::size_t>::max();

 private:
  void* do_allocate(std::size_t size, std::size_t aligned) override {
    if (allocations == last) {
      throw std::bad_alloc();
    }
    ++allocations;
    ++blocks;
    bytes += size;
    return std::pmr::new_delete_resource()->allocate(size, aligned);
  }
  void do_deallocate(void* block, std::size_t size, std::size_t aligned) override {
    --blocks;
    bytes -= size;
    std::pmr::new_delete_resource()->deallocate(block, size, aligned);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

TEST_CASE("layer: a tape's memory comes from its resource, a copy's does not, and all of it goes back") {
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 121);
  std::vector<std::uint8_t> mask(std::size_t(tokens), 1);
  mask[3] = 0;
  const auto check = [&](auto layer) {
    moxie::test::randomize(layer.parameters(), 122);
    Tokens<float> in(x);
    in.mask = mask;
    for (const moxie::Keep keep : {moxie::Keep::activations, moxie::Keep::inputs}) {
      Limited memory;
      Matrix<float> y(tokens, model_dim), dx = y, y2 = y, dx2 = y;
      auto grads = layer.parameters().zeros_like();
      auto grads2 = grads;
      {
        auto tape = layer.make_tape(0, keep, &memory);
        layer.forward(in, y, tape, one_thread);
        layer.backward(in, y, dx, grads, tape, one_thread);
        CHECK(memory.bytes > std::size_t(tokens * model_dim) * sizeof(float));
        const std::size_t before = memory.allocations;
        auto copy = tape;
        layer.backward(in, y, dx2, grads2, copy, one_thread);
        layer.forward(in, y2, copy, one_thread);
        CHECK(memory.allocations == before);
        CHECK(moxie::test::same_bits(dx, dx2));
        CHECK(moxie::test::same_bits(y, y2));
      }
      CHECK(memory.blocks == 0);
    }
  };
  check(moxie::SharedExpertMoE<float>(
      {.model_dim = model_dim, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 6}, .shared = {.hidden_dim = 3}}));
  check(moxie::SoftMoE<float>({.model_dim = model_dim, .experts = 2, .slots_per_expert = 2, .expert = {.hidden_dim = 6}}));
  check(moxie::ExpertChoiceMoE<float>({.model_dim = model_dim, .experts = 3, .expert = {.hidden_dim = 6}}));
}

TEST_CASE("layer: memory that runs out throws, leaks nothing, and the step can be taken again") {
  moxie::SharedExpertMoE<float> layer(
      {.model_dim = model_dim, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 6}, .shared = {.hidden_dim = 3}});
  moxie::test::randomize(layer.parameters(), 123);
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 124);
  Matrix<float> y(tokens, model_dim), dx = y, y2 = y, dx2 = y;
  auto grads = layer.parameters().zeros_like();
  for (const moxie::Keep keep : {moxie::Keep::activations, moxie::Keep::inputs}) {
    auto whole = layer.make_tape(0, keep);
    auto expected = layer.parameters().zeros_like();
    layer.forward(x, y, whole, one_thread);
    layer.backward(x, y, dx, expected, whole, one_thread);
    std::size_t failed_forwards = 0, failed_backwards = 0;
    for (bool done = false; !done;) {
      const std::size_t last = failed_forwards + failed_backwards;
      Limited memory;
      memory.last = last;
      {
        auto tape = layer.make_tape(0, keep, &memory);
        grads.set_zero();
        try {
          layer.forward(x, y2, tape, one_thread);
          try {
            layer.backward(x, y2, dx2, grads, tape, one_thread);
            done = true;
          } catch (const std::bad_alloc&) {  // gradients are undefined now; the forward is still there
            ++failed_backwards;
            memory.last = std::numeric_limits<std::size_t>::max();
            grads.set_zero();
            layer.backward(x, y2, dx2, grads, tape, one_thread);
          }
        } catch (const std::bad_alloc&) {
          ++failed_forwards;
          memory.last = std::numeric_limits<std::size_t>::max();
          CHECK_THROWS_AS(layer.backward(x, y2, dx2, grads, tape, one_thread), moxie::ValueError);
          CHECK((grads.flat() == 0).all());
          layer.forward(x, y2, tape, one_thread);
          layer.backward(x, y2, dx2, grads, tape, one_thread);
        }
        CHECK(moxie::test::same_bits(y, y2));
        CHECK(moxie::test::same_bits(dx, dx2));
        CHECK((grads.flat() == expected.flat()).all());
      }
      CHECK(memory.blocks == 0);
    }
    CHECK(failed_forwards > 10);
    CHECK(failed_backwards > 1);
  }
}

}  // namespace

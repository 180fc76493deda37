// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cuda/on_device.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::Rng;
using moxie::RowView;
using moxie::Tokens;
using moxie::test::OnDevice;

template <class S>
double distance(RowView<const S> a, RowView<const S> b) {
  const double scale = double(b.eigen().cwiseAbs().maxCoeff());
  const double error = double((a.eigen() - b.eigen()).cwiseAbs().maxCoeff());
  return scale == 0 ? error : error / scale;
}

/// One step of the CPU's layer and of the device's: the same outputs, losses, choices and gradients.
template <class Host>
void check_same_step(const typename Host::Config& config, Tokens<typename Host::Scalar> in, double tolerance) {
  using S = typename Host::Scalar;
  Host host(config);
  host.initialize(Rng(3));
  OnDevice<Host> device(config);
  device.initialize(Rng(3));
  if (host.layout().find("gate.e_score_correction_bias") >= 0) {
    const auto bias = host.parameters()["gate.e_score_correction_bias"];
    Rng(4).fill_normal(bias, 0.5);
    device.parameters()["gate.e_score_correction_bias"].eigen() = bias.eigen();
  }
  const Index tokens = in.count();
  const Index dim = host.model_dim();
  const Matrix<S> dy = moxie::random_normal<S>(tokens, dim, Rng(5));
  Matrix<S> y(tokens, dim), dx(tokens, dim), y2(tokens, dim), dx2(tokens, dim);
  auto tape = host.make_tape();
  auto tape2 = device.make_tape();
  auto grads = host.parameters().zeros_like();
  auto grads2 = grads;
  for (int step = 0; step < 2; ++step) {  // the second one on used tapes
    host.forward(in, y, tape);
    device.forward(in, y2, tape2);
    CHECK(distance<S>(y2, y) <= tolerance);
    CHECK(tape2.balance_loss() == doctest::Approx(tape.balance_loss()).epsilon(tolerance));
    if constexpr (requires { tape.router().choices(); }) {
      CHECK(std::equal(tape.router().choices().begin(), tape.router().choices().end(), tape2.router().choices().begin(),
                       tape2.router().choices().end()));
      CHECK(tape2.plan().tokens_per_expert() == tape.plan().tokens_per_expert());
    }
    grads.set_zero();
    grads2.set_zero();
    host.backward(in, dy, dx, grads, tape);
    device.backward(in, dy, dx2, grads2, tape2);
    CHECK(distance<S>(dx2, dx) <= tolerance);
    for (const auto& t : host.layout().tensors()) {
      CAPTURE(t.name);
      CHECK(distance<S>(grads2.view()[t.name], grads.view()[t.name]) <= tolerance);
    }
  }
}

const std::vector<Index> ragged{0, 5, 5, 12, 20, 24};
const std::vector<std::uint8_t> mask{1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 255, 1, 1, 0};
const std::vector<std::uint8_t> nothing(24, 0);

template <class S>
struct Input {
  Matrix<S> x = moxie::random_normal<S>(24, 8, Rng(1));
  Tokens<S> tokens() const { return {x, ragged}; }
};

TEST_CASE_TEMPLATE("device: token choice is what the CPU computes, whatever the options", S, float, double) {
  const double tolerance = std::is_same_v<S, double> ? 1e-12 : 5e-5;
  const Input<S> input;
  using Layer = moxie::TopKMoE<S>;
  typename Layer::Config c{.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}};
  SUBCASE("plain") {}
  SUBCASE("normalized, scaled, every loss of the probabilities") {
    c.normalize = true;
    c.scale = 2.5;
    c.balance = {.expert_level = 0.1,
                 .sequence_level = 0.2,
                 .device_level = 0.3,
                 .gshard = 0.4,
                 .importance = 0.5,
                 .z = 0.01,
                 .mean_entropy = 0.2,
                 .token_entropy = 0.1,
                 .devices = 3};
  }
  SUBCASE("one expert, top-k before the softmax") {
    c.top_k = 3;
    c.order = moxie::TopKOrder::top_k_softmax;
  }
  SUBCASE("sigmoid scores, groups, a bias, losses") {
    c.top_k = 2;
    c.score = moxie::Score::sigmoid;
    c.normalize = true;
    c.groups = {.count = 3, .chosen = 2};
    c.selection_bias = true;
    c.balance = {.expert_level = 0.1, .sequence_level = 0.2, .importance = 0.3, .token_entropy = 0.1};
  }
  SUBCASE("sigmoid scores as they are, groups by their largest, counts of the chosen") {
    c.score = moxie::Score::sigmoid;
    c.groups = {.count = 2, .chosen = 1, .score = moxie::GroupScore::largest};
    c.selection_bias = true;
    c.balance = {.expert_level = 0.3, .gshard = 0.1, .count_chosen = true};
  }
  SUBCASE("softmax scores with a bias") {
    c.selection_bias = true;
    c.normalize = true;
    c.balance = {.expert_level = 0.3};
  }
  SUBCASE("capacity by order") {
    c.capacity = {.factor = 0.6};
    c.balance = {.expert_level = 0.3};
  }
  SUBCASE("capacity by weight") { c.capacity = {.factor = 0.5, .priority = moxie::Priority::weight}; }
  Tokens<S> in = input.tokens();
  SUBCASE("Switch: one expert, with room, jitter") {
    c.top_k = 1;
    c.capacity = {.factor = 1.25};
    c.noise = {.jitter = 0.2};
    in.training = true;
    in.rng = Rng(7, 1);
  }
  SUBCASE("another K for this call, with room") {
    in.top_k = 3;
    c.capacity = {.factor = 0.6};
    c.balance = {.expert_level = 0.3};
  }
  check_same_step<Layer>(c, in, tolerance);
}

TEST_CASE("device: noise on the logits, and the losses that look at it") {
  const Input<double> input;
  Tokens<double> in = input.tokens();
  in.training = true;
  in.rng = Rng(9);
  moxie::TopKMoE<double>::Config c{.model_dim = 8,
                                   .experts = 6,
                                   .top_k = 2,
                                   .expert = {.hidden_dim = 10},
                                   .balance = {.importance = 0.3, .load = 0.5, .z = 0.1},
                                   .noise = {.logits = 2}};
  const Matrix<double> given = moxie::random_normal<double>(24, 6, Rng(6));
  SUBCASE("softmax") {}
  SUBCASE("sigmoid") { c.score = moxie::Score::sigmoid; }
  SUBCASE("noise that is given") { in.noise = given; }
  SUBCASE("jitter too, and a mask") {
    c.noise.jitter = 0.3;
    in.mask = mask;
  }
  SUBCASE("noise that is given, and a mask") {
    in.noise = given;
    in.mask = mask;
  }
  SUBCASE("no training") { in.training = false; }
  check_same_step<moxie::TopKMoE<double>>(c, in, 1e-11);
}

TEST_CASE_TEMPLATE("device: shared experts, every kind of expert", S, float, double) {
  const double tolerance = std::is_same_v<S, double> ? 1e-12 : 5e-5;
  const Input<S> input;
  const auto check = [&]<class Experts>(std::type_identity<Experts>) {
    for (const Index hidden : {Index{10}, Index{16}}) {  // gate and up apart, and side by side
      check_same_step<moxie::SharedExpertMoE<S, Experts>>({.model_dim = 8,
                                                           .experts = 5,
                                                           .top_k = 2,
                                                           .expert = {.hidden_dim = hidden},
                                                           .shared = {.hidden_dim = 12},
                                                           .balance = {.expert_level = 0.1}},
                                                          input.tokens(), tolerance);
    }
  };
  check(std::type_identity<moxie::SwiGluExperts<S>>());
  check(std::type_identity<moxie::GegluTanhExperts<S>>());
  check(std::type_identity<moxie::GegluErfExperts<S>>());
  check(std::type_identity<moxie::ReGluExperts<S>>());
  check(std::type_identity<moxie::GeluTanhExperts<S>>());
  check(std::type_identity<moxie::GeluErfExperts<S>>());
  check(std::type_identity<moxie::ReluSquaredExperts<S>>());
}

TEST_CASE_TEMPLATE("device: expert choice", S, float, double) {
  const double tolerance = std::is_same_v<S, double> ? 1e-12 : 5e-5;
  const Input<S> input;
  Tokens<S> in = input.tokens();
  typename moxie::ExpertChoiceMoE<S>::Config c{
      .model_dim = 8, .experts = 4, .expert = {.hidden_dim = 10}, .capacity = {.factor = 2}};
  SUBCASE("plain") {}
  SUBCASE("noise") {
    c.noise.logits = 1;
    in.training = true;
    in.rng = Rng(5);
  }
  check_same_step<moxie::ExpertChoiceMoE<S>>(c, in, tolerance);
}

TEST_CASE_TEMPLATE("device: Soft MoE, and its ablations", S, float, double) {
  using moxie::Mixing;
  const double tolerance = std::is_same_v<S, double> ? 1e-12 : 5e-5;
  const Input<S> input;
  typename moxie::SoftMoE<S>::Config c{.model_dim = 8, .experts = 3, .slots_per_expert = 2, .expert = {.hidden_dim = 10}};
  Tokens<S> in = input.tokens();
  SUBCASE("normalized") {}
  SUBCASE("plain") { c.normalize = false; }
  SUBCASE("uniform dispatch") { c.dispatch = Mixing::uniform; }
  SUBCASE("uniform combine") { c.combine = Mixing::uniform; }
  SUBCASE("uniform both") { c.dispatch = c.combine = Mixing::uniform; }
  SUBCASE("identity") {
    c.dispatch = Mixing::identity;
    in = Tokens<S>(input.x, 6);
  }
  check_same_step<moxie::SoftMoE<S>>(c, in, tolerance);
}

// Several blocks of rows, columns that no warp divides and that several warps share, more experts than a warp has lanes.
TEST_CASE("device: many tokens, wide rows, many experts") {
  const Matrix<double> x = moxie::random_normal<double>(130, 150, Rng(1));
  const std::vector<Index> sequences{0, 50, 51, 100, 130};
  std::vector<std::uint8_t> some(130);
  for (std::size_t t = 0; t < some.size(); ++t) {
    some[t] = t % 7 == 3 ? 0 : 1;
  }
  Tokens<double> in{x, sequences};
  SUBCASE("all tokens") {}
  SUBCASE("some tokens") { in.mask = some; }
  check_same_step<moxie::SharedExpertMoE<double>>({.model_dim = 150,
                                                   .experts = 70,
                                                   .top_k = 5,
                                                   .expert = {.hidden_dim = 10},
                                                   .shared = {.hidden_dim = 140},
                                                   .balance = {.expert_level = 0.1, .sequence_level = 0.1},
                                                   .capacity = {.factor = 1.1}},
                                                  in, 1e-11);
  check_same_step<moxie::TopKMoE<double, moxie::GeluTanhExperts<double>>>(
      {.model_dim = 150, .experts = 5, .top_k = 2, .expert = {.hidden_dim = 140}}, in, 1e-11);
  check_same_step<moxie::ExpertChoiceMoE<double>>(
      {.model_dim = 150, .experts = 40, .expert = {.hidden_dim = 10}, .capacity = {.factor = 2}}, in, 1e-11);
  check_same_step<moxie::SoftMoE<double>>(
      {.model_dim = 150, .experts = 35, .slots_per_expert = 3, .expert = {.hidden_dim = 10}}, in, 1e-11);
}

TEST_CASE("device: products of BFloat16 are within a hundredth of those of floats") {
  const Input<float> input;
  moxie::TopKMoE<float, moxie::SwiGluExperts<float, moxie::BFloat16>>::Config c{
      .model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 16}};
  check_same_step<moxie::TopKMoE<float, moxie::SwiGluExperts<float, moxie::BFloat16>>>(c, input.tokens(), 0.01);
  check_same_step<moxie::SharedExpertMoE<float, moxie::GeluTanhExperts<float, moxie::BFloat16>>>(
      {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 16}, .shared = {.hidden_dim = 16}}, input.tokens(),
      0.02);
  check_same_step<moxie::SoftMoE<float, moxie::GeluTanhExperts<float, moxie::BFloat16>>>(
      {.model_dim = 8, .experts = 3, .slots_per_expert = 2, .expert = {.hidden_dim = 16}}, input.tokens(), 0.02);
}

TEST_CASE_TEMPLATE("device: an activation of one's own is the same on both sides", S, float, double) {
  const Input<S> input;
  const double tolerance = std::is_same_v<S, double> ? 1e-12 : 5e-5;
  check_same_step<moxie::TopKMoE<S, moxie::GluExperts<S, moxie::test::QuickGelu>>>(
      {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 16}}, input.tokens(), tolerance);
  check_same_step<moxie::TopKMoE<S, moxie::MlpExperts<S, moxie::test::QuickGelu>>>(
      {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 16}}, input.tokens(), tolerance);
  if constexpr (std::is_same_v<S, float>) {
    check_same_step<moxie::TopKMoE<float, moxie::GluExperts<float, moxie::test::QuickGelu, moxie::BFloat16>>>(
        {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 16}}, input.tokens(), 0.01);
  }
}

TEST_CASE_TEMPLATE("device: a gated unit with options is the same on both sides", S, float, double) {
  const Input<S> input;
  const double tolerance = std::is_same_v<S, double> ? 1e-12 : 5e-5;
  for (const double limit : {0.1, 7.0}) {  // that is met, and that is not
    check_same_step<moxie::TopKMoE<S, moxie::ClampedSwiGluExperts<S>>>(
        {.model_dim = 8,
         .experts = 6,
         .top_k = 2,
         .expert = {.hidden_dim = 16, .unit = {.limit = limit, .alpha = 1.702, .beta = 1}}},
        input.tokens(), tolerance);
  }
}

TEST_CASE_TEMPLATE("device: masked tokens take no part, in any layer", S, float, double) {
  const double tolerance = std::is_same_v<S, double> ? 1e-12 : 5e-5;
  Input<S> input;
  for (std::size_t t = 0; t < mask.size(); ++t) {
    if (mask[t] == 0) {
      input.x.row(Index(t)).setConstant(std::numeric_limits<S>::quiet_NaN());
    }
  }
  const auto check = [&]<class Layer>(std::type_identity<Layer>, typename Layer::Config config) {
    for (const auto* m : {&mask, &nothing}) {
      Tokens<S> in = input.tokens();
      in.mask = *m;
      check_same_step<Layer>(config, in, tolerance);
    }
  };
  check(std::type_identity<moxie::TopKMoE<S>>(), {.model_dim = 8,
                                                  .experts = 6,
                                                  .top_k = 2,
                                                  .expert = {.hidden_dim = 10},
                                                  .balance = {.expert_level = 0.1, .sequence_level = 0.2, .z = 0.1},
                                                  .capacity = {.factor = 0.6}});
  check(std::type_identity<moxie::SharedExpertMoE<S>>(),
        {.model_dim = 8, .experts = 5, .top_k = 2, .expert = {.hidden_dim = 10}, .shared = {.hidden_dim = 12}});
  check(std::type_identity<moxie::ExpertChoiceMoE<S>>(),
        {.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 10}, .capacity = {.factor = 2}});
  check(std::type_identity<moxie::SoftMoE<S>>(),
        {.model_dim = 8, .experts = 3, .slots_per_expert = 2, .expert = {.hidden_dim = 10}});
}

TEST_CASE("device: a mask costs two loops, forward and backward") {
  const Input<float> input;
  OnDevice<moxie::TopKMoE<float>> layer({.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}});
  layer.initialize(Rng(3));
  Matrix<float> y(24, 8);
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  std::int64_t launches[2][2];
  for (int masked = 0; masked < 2; ++masked) {
    for (int step = 0; step < 2; ++step) {  // the first one sends the mask and the sequences
      Tokens<float> in = input.tokens();
      in.mask = std::span(mask).first(masked == 0 ? 0 : mask.size());
      layer.forward(in, y, tape);
      launches[masked][0] = tape.device().cost().launches;
      layer.backward(in, input.x, y, grads, tape);
      launches[masked][1] = tape.device().cost().launches;
    }
    CHECK(tape.device().cost().allocations == 0);
  }
  CHECK(launches[1][0] == launches[0][0] + 2);
  CHECK(launches[1][1] == launches[0][1] + 2);
}

TEST_CASE("device: frozen weights give the same bits, and a tape without a backward") {
  const Input<float> input;
  const auto check = [&](auto layer, bool masked, std::int64_t conversions) {
    layer.initialize(Rng(3));
    moxie::test::randomize(layer.parameters(), 8, 0.3);
    Tokens<float> in = input.tokens();
    if (masked) {
      in.mask = mask;
    }
    Matrix<float> y(24, 8), frozen(24, 8), dx(24, 8);
    auto tape = layer.make_tape();
    layer.forward(in, y, tape);
    layer.forward(in, y, tape);  // the first one sends sequences and mask
    const auto launches = tape.device().cost().launches;
    layer.forward(layer.parameters(), in, frozen, tape, {}, true);
    CHECK(tape.device().cost().launches == launches - conversions);
    CHECK(frozen == y);
    CHECK(y.cwiseAbs().maxCoeff() > 0);
    auto grads = layer.parameters().zeros_like();
    CHECK(
        moxie::test::contains(moxie::test::message_of<moxie::ValueError>([&] { layer.backward(in, input.x, dx, grads, tape); }),
                              "the tape holds no forward of this layer"));
  };
  using moxie::BFloat16;
  check(OnDevice<moxie::TopKMoE<float>>({.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}}), true, 0);
  check(OnDevice<moxie::TopKMoE<float, moxie::SwiGluExperts<float, BFloat16>>>(
            {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}}),
        false, 1);
  check(OnDevice<moxie::SharedExpertMoE<float, moxie::GeluTanhExperts<float, BFloat16>>>(
            {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}, .shared = {.hidden_dim = 12}}),
        false, 2);
  check(OnDevice<moxie::SharedExpertMoE<float, moxie::GeluTanhExperts<float>>>(
            {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}, .shared = {.hidden_dim = 12}}),
        true, 0);
  check(OnDevice<moxie::ExpertChoiceMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 10}}), false, 0);
  check(OnDevice<moxie::SoftMoE<float, moxie::GeluTanhExperts<float, BFloat16>>>(
            {.model_dim = 8, .experts = 3, .slots_per_expert = 2, .expert = {.hidden_dim = 10}}),
        true, 1);
}

template <class Host>
void check_laws_and_gradients(const typename Host::Config& config, bool permute = true) {
  OnDevice<Host> layer(config);
  layer.initialize(Rng(3));
  moxie::test::randomize(layer.parameters(), 8, 0.3);
  const Input<double> input;
  const Tokens<double> in = input.tokens();
  const Matrix<double> dy = moxie::random_normal<double>(24, 8, Rng(5));
  Matrix<double> y(24, 8);
  auto tape = layer.make_tape();
  layer.forward(in, y, tape);
  std::vector<moxie::testing::LawResult> laws = moxie::testing::check_plan_laws(tape.plan(), 8);
  laws.push_back(moxie::testing::bits_do_not_depend_on_threads(layer, in, dy));
  laws.push_back(moxie::testing::backward_is_linear(layer, in));
  laws.push_back(moxie::testing::backward_overwrites_dx_and_adds_to_gradients(layer, in, dy));
  laws.push_back(moxie::testing::masked_tokens_change_nothing(layer, in, dy));
  if (permute) {
    laws.push_back(moxie::testing::permuting_tokens_permutes_outputs(layer, in, dy));
  }
  for (const auto& law : laws) {
    INFO(law.law, ": ", law.message);
    CHECK(law.holds);
  }
  const auto worst =
      moxie::testing::worst(moxie::testing::check_layer_gradients(layer, in, dy, {}, {.step = 1e-5, .max_elements = 6}));
  INFO(worst.message());
  CHECK(worst.passes(moxie::test::gradient_tolerance));
}

TEST_CASE("device: the laws hold, and gradients are those of differences") {
  check_laws_and_gradients<moxie::TopKMoE<double>>({.model_dim = 8,
                                                    .experts = 6,
                                                    .top_k = 2,
                                                    .expert = {.hidden_dim = 10},
                                                    .normalize = true,
                                                    .balance = {.expert_level = 0.1,
                                                                .sequence_level = 0.1,
                                                                .importance = 0.1,
                                                                .z = 0.1,
                                                                .mean_entropy = 0.1,
                                                                .token_entropy = 0.1}});
  check_laws_and_gradients<moxie::SharedExpertMoE<double, moxie::GeluErfExperts<double>>>(
      {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}, .shared = {.hidden_dim = 12}});
  check_laws_and_gradients<moxie::ExpertChoiceMoE<double>>(
      {.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 10}, .capacity = {.factor = 2}});
  check_laws_and_gradients<moxie::SoftMoE<double>>(
      {.model_dim = 8, .experts = 3, .slots_per_expert = 2, .expert = {.hidden_dim = 10}});
  // Who comes first depends on where tokens stand.
  check_laws_and_gradients<moxie::TopKMoE<double>>(
      {.model_dim = 8, .experts = 6, .top_k = 2, .expert = {.hidden_dim = 10}, .capacity = {.factor = 0.6}}, false);
}

TEST_CASE("device: no tokens, and sequences without any, are legal") {
  const auto check = [](auto layer) {
    using S = typename decltype(layer)::Scalar;
    layer.initialize(Rng(1));
    const Matrix<S> none(0, 8);
    Matrix<S> y(0, 8), dx(0, 8);
    auto grads = layer.parameters().zeros_like();
    auto tape = layer.make_tape();
    layer.forward({none}, y, tape);
    CHECK(tape.balance_loss() == 0);
    layer.backward({none}, none, dx, grads, tape);
    CHECK((grads.flat() == S(0)).all());
  };
  check(OnDevice<moxie::TopKMoE<float>>(
      {.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 8}, .balance = {.expert_level = 1, .z = 1}}));
  check(OnDevice<moxie::SharedExpertMoE<float>>(
      {.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 8}, .shared = {.hidden_dim = 8}}));
  check(OnDevice<moxie::ExpertChoiceMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}}));
  check(OnDevice<moxie::SoftMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}}));
}

TEST_CASE("device: steps after the first allocate nothing, and token choice alone waits, once") {
  const Input<float> input;
  const auto check = [&](auto layer, std::int64_t waits) {
    layer.initialize(Rng(1));
    const Tokens<float> in = input.tokens();
    Matrix<float> y(24, 8), dx(24, 8);
    auto grads = layer.parameters().zeros_like();
    auto tape = layer.make_tape();
    for (int step = 0; step < 3; ++step) {
      layer.forward(in, y, tape);
      const moxie::test::DeviceCost forward = tape.device().cost();
      layer.backward(in, input.x, dx, grads, tape);
      const moxie::test::DeviceCost backward = tape.device().cost();
      CHECK(forward.launches > 0);
      CHECK(forward.synchronizations == waits);
      CHECK(backward.synchronizations == 0);
      if (step > 0) {
        CHECK(forward.allocations == 0);
        CHECK(backward.allocations == 0);
      }
    }
  };
  check(OnDevice<moxie::TopKMoE<float>>({.model_dim = 8,
                                         .experts = 4,
                                         .top_k = 2,
                                         .expert = {.hidden_dim = 8},
                                         .balance = {.expert_level = 1},
                                         .capacity = {.factor = 1}}),
        1);
  check(OnDevice<moxie::ExpertChoiceMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}}), 0);
  check(OnDevice<moxie::SoftMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}}), 0);
}

TEST_CASE("device: nothing is allocated where a capacity drops other choices from step to step, either") {
  OnDevice<moxie::TopKMoE<float, moxie::GeluTanhExperts<float>>> layer(
      {.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 8}, .capacity = {.factor = 1}});
  layer.initialize(Rng(1));
  auto tape = layer.make_tape();
  auto grads = layer.parameters().zeros_like();
  Matrix<float> y(400, 8), dx(400, 8);
  for (int step = 0; step < 6; ++step) {
    // All tokens alike first, so that most choices are dropped and one expert is full; then ever more different ones.
    const Matrix<float> x = Matrix<float>::Ones(400, 8) + float(step) * moxie::random_normal<float>(400, 8, Rng(2));
    layer.forward({x}, y, tape);
    const auto forward = tape.device().cost();
    layer.backward({x}, x, dx, grads, tape);
    const auto backward = tape.device().cost();
    if (step > 0) {
      CHECK(forward.allocations == 0);
      CHECK(backward.allocations == 0);
    }
  }
}

TEST_CASE("device: nor where ever more tokens are not masked") {
  const Input<float> input;
  const auto check = [&](auto layer) {
    layer.initialize(Rng(1));
    auto tape = layer.make_tape();
    auto grads = layer.parameters().zeros_like();
    Matrix<float> y(24, 8), dx(24, 8);
    std::vector<std::uint8_t> some(24, 0);
    some[0] = 1;
    for (std::size_t step = 1; step <= 24; ++step) {
      Tokens<float> in = input.tokens();
      in.mask = some;
      in.training = true;
      layer.forward(in, y, tape);
      const auto forward = tape.device().cost();
      layer.backward(in, input.x, dx, grads, tape);
      const auto backward = tape.device().cost();
      if (step > 1) {
        CHECK(forward.allocations == 0);
        CHECK(backward.allocations == 0);
      }
      some[step * 7 % 24] = 1;
    }
  };
  check(OnDevice<moxie::TopKMoE<float>>({.model_dim = 8,
                                         .experts = 4,
                                         .top_k = 2,
                                         .expert = {.hidden_dim = 8},
                                         .balance = {.expert_level = 1, .importance = 1, .load = 1},
                                         .capacity = {.factor = 1},
                                         .noise = {.logits = 1, .jitter = 0.1}}));
  check(OnDevice<moxie::SharedExpertMoE<float, moxie::GeluTanhExperts<float>>>(
      {.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 8}, .shared = {.hidden_dim = 8}}));
  check(OnDevice<moxie::ExpertChoiceMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}}));
  check(OnDevice<moxie::SoftMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}}));
}

TEST_CASE("device: logits that are not finite are told by the token") {
  const auto message = [](auto layer) {
    using S = typename decltype(layer)::Scalar;
    layer.initialize(Rng(1));
    Matrix<S> x = moxie::random_normal<S>(6, 8, Rng(2));
    x(4, 3) = std::numeric_limits<S>::quiet_NaN();
    x(5, 0) = std::numeric_limits<S>::infinity();
    Matrix<S> y = Matrix<S>::Constant(6, 8, S(7));
    auto tape = layer.make_tape();
    const std::string text = moxie::test::message_of<moxie::ValueError>([&] { layer.forward({x, 3}, y, tape); });
    CHECK((y.array() == S(7)).all());
    const std::vector<std::uint8_t> second{1, 0, 1, 1, 1, 1};
    Tokens<S> in(x, 3);
    in.mask = second;
    CHECK(moxie::test::message_of<moxie::ValueError>([&] { layer.forward(in, y, tape); }) == text);
    auto grads = layer.parameters().zeros_like();
    x.setOnes();
    layer.forward({x, 3}, y, tape);  // the tape can be used again
    layer.backward({x, 3}, x, y, grads, tape);
    return text;
  };
  CHECK(message(OnDevice<moxie::TopKMoE<float>>({.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 8}})) ==
        "TopKRouter::route: the logits of token 4 are not finite");
  CHECK(message(OnDevice<moxie::ExpertChoiceMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}})) ==
        "ExpertChoiceRouter::route: the logits of token 4 are not finite");
  CHECK(message(OnDevice<moxie::SoftMoE<float>>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}})) ==
        "SoftRouter::route: the logits of token 4 are not finite");
}

}  // namespace

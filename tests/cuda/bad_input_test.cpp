// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <memory>
#include <moxie/cuda/cuda.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/loss/selection_bias.hpp>
#include <support.hpp>

// What layer.hpp refuses.
namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::test::message_of;
using namespace moxie::cuda;

TEST_CASE("device: options that no layer has are refused") {
  const auto message = [](moxie::TopKMoEConfig<moxie::GluConfig<>> c) {
    return message_of<moxie::ValueError>([&] { TopKMoE<float> layer(c); });
  };
  moxie::TopKMoEConfig<moxie::GluConfig<>> c{.model_dim = 8, .experts = 4, .top_k = 5, .expert = {.hidden_dim = 8}};
  CHECK(message(c) == "TopKRouter: top_k is 5, expected at most the 4 experts");
  c.top_k = 2;
  CHECK(message(c) == "nothing was thrown");
  c.noise.jitter = 1.5;
  CHECK(message(c) == "TopKRouter: noise.jitter must be between 0 and 1");
  c.noise = {};
  c.expert.hidden_dim = 0;
  CHECK(message(c) == "GluExperts: hidden_dim is 0, expected at least 1");
  CHECK_THROWS_AS(
      ExpertChoiceMoE<float>({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}, .capacity = {.factor = 0}}),
      moxie::ValueError);
  CHECK_THROWS_AS(SoftMoE<float>({.model_dim = 8, .experts = 4, .slots_per_expert = 0, .expert = {.hidden_dim = 8}}),
                  moxie::ValueError);
}

TEST_CASE("device: other shapes, blocks and tapes are refused before anything is written") {
  DeviceExec exec;
  const TopKMoE<float> layer({.model_dim = 8,
                              .experts = 4,
                              .top_k = 2,
                              .expert = {.hidden_dim = 8},
                              .capacity = {.factor = 0.1, .rounding = moxie::Rounding::round}});
  DeviceParameters<float> p(exec, layer.layout());
  DeviceParameters<float> grads(exec, layer.layout());
  Matrix<float> x = Matrix<float>::Ones(60, 8);
  Matrix<float> y = Matrix<float>::Constant(60, 8, 7);
  const DeviceRows<float> in(x.data(), 60, 8);
  const DeviceRows<float> out(y.data(), 60, 8);
  auto tape = layer.make_tape();
  const auto forward = [&](const DeviceTokens<float>& tokens, DeviceRows<float> to) {
    return message_of<std::exception>([&] { layer.forward(exec, p, tokens, to, tape); });
  };
  CHECK(forward(in.middle_cols(0, 7), out) == "TopKMoE::forward: x has 7 columns, expected 8");
  CHECK(forward(in, out.middle_rows(0, 5)) == "TopKMoE::forward: y is (5,8), expected (60,8)");
  CHECK(forward(in, in) == "TopKMoE::forward: y overlaps x");
  CHECK(message_of<moxie::ValueError>([&] { layer.forward(exec, p, in, DeviceRows<float>(p.data(), 60, 8), tape); }) ==
        "TopKMoE::forward: y overlaps the parameters");
  DeviceTokens<float> other_tokens(in);
  const std::vector<std::uint8_t> mask(59, 1);
  other_tokens.mask = mask;
  CHECK(forward(other_tokens, out) ==
        "TopKMoE::forward: there are 59 elements of the mask, expected one for each of 60 tokens");
  other_tokens.mask = {};
  other_tokens.top_k = 5;
  CHECK(forward(other_tokens, out) == "TopKRouter::route: top_k is 5, expected at most the 4 experts");
  other_tokens.top_k = -1;
  CHECK(forward(other_tokens, out) == "TopKMoE::forward: top_k must not be negative");
  other_tokens.top_k = 0;
  other_tokens.noise = DeviceRows<const float>(x.data(), 59, 4);
  CHECK(forward(other_tokens, out) == "TopKMoE::forward: noise is (59,4), expected (60,E)");
  const TopKMoE<float> noisy({.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 8}, .noise = {.logits = 1}});
  other_tokens.noise = DeviceRows<const float>(x.data(), 60, 5);
  CHECK(message_of<moxie::ShapeError>([&] {
          DeviceTokens<float> training = other_tokens;
          training.training = true;
          noisy.forward(exec, p, training, out, tape);
        }) == "TopKRouter::route: noise is (60,5), expected (60,4)");
  other_tokens.noise = {};
  CHECK(moxie::test::contains(forward({in, 7}, out), "60 tokens do not divide into sequences of 7"));
  CHECK(moxie::test::contains(forward({in, 2}, out), "rounds to a capacity of 0"));
  const TopKMoE<float> wider({.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 16}});
  DeviceParameters<float> other(exec, wider.layout());
  CHECK(moxie::test::contains(message_of<moxie::ShapeError>([&] { layer.forward(exec, other, in, out, tape); }),
                              "have another layout than the layer"));
  const auto backward = [&](const DeviceTokens<float>& tokens, DeviceRows<float> dy, DeviceRows<float> dx,
                            DeviceParameters<float>& to) {
    return message_of<std::exception>([&] { layer.backward(exec, p, tokens, dy, {dx, to}, tape); });
  };
  Matrix<float> d = Matrix<float>::Ones(60, 8);
  const DeviceRows<float> dy(d.data(), 60, 8);
  const std::string no_forward = "TopKMoE::backward: the tape holds no forward of this layer, these sequences and this mask";
  CHECK(backward(in, dy, out, grads) == no_forward);
  layer.forward(exec, p, in, out, tape);
  CHECK(backward({in, 30}, dy, out, grads) == no_forward);
  other_tokens.top_k = 0;
  std::vector<std::uint8_t> whole(60, 1);
  other_tokens.mask = whole;
  CHECK(backward(other_tokens, dy, out, grads) == no_forward);
  layer.forward(exec, p, other_tokens, out, tape);
  CHECK(backward(in, dy, out, grads) == no_forward);
  whole[7] = 255;  // as good as 1
  CHECK(backward(other_tokens, dy, out, grads) == "nothing was thrown");
  whole[7] = 0;
  CHECK(backward(other_tokens, dy, out, grads) == no_forward);
  layer.forward(exec, p, in, out, tape);
  const auto frozen = wider.freeze(exec, other);
  CHECK(message_of<moxie::ValueError>([&] { layer.forward(exec, frozen, in, out, tape); }) ==
        "TopKMoE::forward: the weights were not frozen by this layer");
  CHECK(moxie::test::contains(message_of<moxie::ShapeError>([&] { layer.freeze(exec, other); }), "another layout"));
  CHECK(backward(in, dy, dy, grads) == "TopKMoE::backward: dx overlaps x, dy or the parameters");
  CHECK(backward(in, dy, out, p) == "TopKMoE::backward: the gradients overlap what they are computed from, or dx");
  CHECK(backward(in, dy.middle_rows(0, 3), out, grads) == "TopKMoE::backward: dy is (3,8), expected (60,8)");
  CHECK(backward(in, dy, out, grads) == "nothing was thrown");
  CHECK(forward({in, 2}, out) != "nothing was thrown");  // after a forward that threw there is none
  CHECK(tape.plan().rows() == 0);
  CHECK(tape.plan().tokens() == 0);
  CHECK(tape.balance_loss(exec) == 0);
  DeviceBuffer<double> load;
  tape.router().add_times_chosen(exec, load);  // of nothing
  CHECK(backward(in, dy, out, grads) == no_forward);
  const SoftMoE<float> soft({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}, .dispatch = moxie::Mixing::identity});
  DeviceParameters<float> soft_p(exec, soft.layout());
  auto soft_tape = soft.make_tape();
  CHECK(message_of<moxie::ShapeError>([&] {
          soft.forward(exec, soft_p, {in, 5}, out, soft_tape);
        }) == "SoftRouter::route: sequence 0 has 5 tokens, expected one for each of the 4 slots");
  other_tokens = {in, 4};
  other_tokens.top_k = 1;
  CHECK(message_of<moxie::ValueError>([&] { soft.forward(exec, soft_p, other_tokens, out, soft_tape); }) ==
        "SoftRouter::route: every token uses all slots, so there is no top_k to set");
}

TEST_CASE(
    "device: overlapping and repeated rows, other blocks of the same size, and tapes of layers that are gone are refused") {
  DeviceExec exec;
  const moxie::TopKMoEConfig<moxie::GluConfig<>> config{.model_dim = 4, .experts = 2, .top_k = 1, .expert = {.hidden_dim = 32}};
  auto layer = std::make_unique<TopKMoE<float>>(config);
  DeviceParameters<float> p(exec, layer->layout());
  Matrix<float> x = Matrix<float>::Ones(6, 4);
  Matrix<float> y(6, 4);
  auto tape = layer->make_tape();
  const auto forward = [&](const DeviceTokens<float>& tokens, DeviceRows<float> to, const DeviceParameters<float>& block) {
    return message_of<std::exception>([&] { layer->forward(exec, block, tokens, to, tape); });
  };
  const DeviceRows<float> in(x.data(), 6, 4);
  const DeviceRows<float> out(y.data(), 6, 4);
  CHECK(forward(DeviceRows<float>(x.data(), 5, 4), DeviceRows<float>(x.data() + 4, 5, 4), p) ==
        "TopKMoE::forward: y overlaps x");
  CHECK(forward(DeviceRows<float>(x.data(), 6, 4, 0), out, p) == "TopKMoE::forward: the rows of x overlap");
  CHECK(forward(in, DeviceRows<float>(y.data(), 6, 4, 3), p) == "TopKMoE::forward: the rows of y overlap");
  DeviceTokens<float> undivided(in);
  undivided.sequences = moxie::Sequences(3);
  CHECK(moxie::test::contains(forward(undivided, out, p), "the sequences divide 0 tokens, expected 6"));
  const TopKMoE<float> same_size({.model_dim = 4, .experts = 4, .top_k = 1, .expert = {.hidden_dim = 16}});
  REQUIRE(same_size.layout().parameter_count() - 16 + 8 == layer->layout().parameter_count());
  CHECK(moxie::test::contains(forward(in, out, DeviceParameters<float>(exec, same_size.layout())), "another layout"));
  DeviceParameters<float> moved = std::move(p);
  CHECK(moxie::test::contains(forward(in, out, p), "another layout"));
  CHECK(forward(in, out, moved) == "nothing was thrown");
  layer.reset();
  const TopKMoE<float> next(config);
  DeviceParameters<float> grads(exec, next.layout());
  Matrix<float> dx(6, 4);
  CHECK(moxie::test::contains(message_of<moxie::ValueError>([&] {
                                next.backward(exec, moved, in, out, {DeviceRows<float>(dx.data(), 6, 4), grads}, tape);
                              }),
                              "holds no forward of this layer"));
}

TEST_CASE("device: parts that do not fit, a scale and a selection bias that are not finite") {
  const auto message = [](Index experts, Index dim, Index shared_experts) {
    return message_of<moxie::ValueError>([&] {
      Moe<TopKRouter<float>, SwiGluExperts<float>> layer(
          TopKRouter<float>({.model_dim = 8, .experts = 4}), SwiGluExperts<float>(experts, dim, {8}),
          SwiGluExperts<float>(shared_experts, 8, {8}, {"shared_experts"}), "Moe");
    });
  };
  CHECK(message(4, 8, 1) == "nothing was thrown");
  CHECK(moxie::test::contains(message(5, 8, 1), "other experts or another width"));
  CHECK(moxie::test::contains(message(4, 9, 1), "other experts or another width"));
  CHECK(moxie::test::contains(message(4, 8, 2), "a bank of one expert"));
  CHECK_THROWS_AS(TopKRouter<float>({.model_dim = 8, .experts = 4, .scale = 1e300}), moxie::ValueError);

  DeviceExec exec;
  const TopKMoE<float> layer({.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 8}, .selection_bias = true});
  DeviceParameters<float> p(exec, layer.layout());
  p.data()[moxie::cuda::detail::device_offset(layer.layout(), 1) + 2] =
      std::numeric_limits<float>::quiet_NaN();  // the host build's memory is the host's
  Matrix<float> x = Matrix<float>::Ones(3, 8);
  Matrix<float> y(3, 8);
  auto tape = layer.make_tape();
  CHECK(message_of<moxie::ValueError>([&] {
          layer.forward(exec, p, DeviceRows<float>(x.data(), 3, 8), DeviceRows<float>(y.data(), 3, 8), tape);
        }) == "TopKRouter::route: the selection bias is not finite");
}

TEST_CASE("device: the selection bias takes the CPU's step, over micro-batches; what it refuses") {
  DeviceExec exec;
  const moxie::TopKMoEConfig<moxie::GluConfig<>> config{.model_dim = 8,
                                                        .experts = 5,
                                                        .top_k = 2,
                                                        .expert = {.hidden_dim = 8},
                                                        .selection_bias = true,
                                                        .capacity = {.factor = 0.5}};
  moxie::TopKMoE<float> host(config);
  host.initialize(moxie::Rng(1));
  const TopKMoE<float> layer(config);
  DeviceParameters<float> p(exec, layer.layout());
  p.upload(exec, host.parameters().flat().data());
  DeviceBuffer<double> load;
  load.resize(exec, 5);
  exec.zero(load.data(), 5);
  std::vector<std::int64_t> expected(5, 0);
  auto tape = layer.make_tape();
  auto host_tape = host.make_tape();
  for (int batch = 0; batch < 2; ++batch) {
    auto x = moxie::test::random<float>(30, 8, std::uint64_t(batch));
    Matrix<float> y(30, 8);
    layer.forward(exec, p, DeviceRows<float>(x.data(), 30, 8), DeviceRows<float>(y.data(), 30, 8), tape);
    tape.router().add_times_chosen(exec, load);
    host.forward(x, y, host_tape);
    for (std::size_t e = 0; e < 5; ++e) {
      expected[e] += host_tape.router().times_chosen()[e];
    }
  }
  CHECK(std::equal(expected.begin(), expected.end(), load.data()));
  const auto bias = host.parameters()["gate.e_score_correction_bias"];
  for (const bool recentre : {false, true}) {
    layer.update_selection_bias(exec, p, load, 0.125, recentre);
    moxie::update_selection_bias(bias, std::span<const std::int64_t>(expected), 0.125, recentre);
    const float* found = p.data() + moxie::cuda::detail::device_offset(layer.layout(), 1);
    for (Index e = 0; e < 5; ++e) {
      CHECK(found[e] == doctest::Approx(double(bias(0, e))).epsilon(1e-6));
    }
    CHECK(bias.eigen().cwiseAbs().maxCoeff() > 0);
  }
  const auto message = [&](const TopKMoE<float>& of, DeviceParameters<float>& block, double rate) {
    return message_of<std::exception>([&] { of.update_selection_bias(exec, block, load, rate); });
  };
  const TopKMoE<float> without({.model_dim = 8, .experts = 5, .top_k = 2, .expert = {.hidden_dim = 8}});
  DeviceParameters<float> other(exec, without.layout());
  CHECK(moxie::test::contains(message(layer, other, 0.1), "another layout"));
  CHECK(message(without, other, 0.1) == "update_selection_bias: the router has no selection bias");
  CHECK(message(layer, p, std::numeric_limits<double>::infinity()) == "update_selection_bias: the rate is not finite");
  load.resize(exec, 4);
  CHECK(message(layer, p, 0.1) == "update_selection_bias: the load is not of as many experts");
}

TEST_CASE("device: one tape serves layers of other slots, one after the other") {
  DeviceExec exec;
  auto x = moxie::test::random<float>(10, 4, 1);
  Matrix<float> y(10, 4);
  const DeviceRows<float> in(x.data(), 10, 4);
  auto tape = SoftMoE<float>({.model_dim = 4, .experts = 3, .expert = {.hidden_dim = 8}}).make_tape();
  for (const Index slots : {1, 4, 2}) {
    const SoftMoE<float> layer({.model_dim = 4, .experts = 3, .slots_per_expert = slots, .expert = {.hidden_dim = 8}});
    DeviceParameters<float> p(exec, layer.layout());
    layer.forward(exec, p, {in, 5}, DeviceRows<float>(y.data(), 10, 4), tape);
    CHECK(tape.plan().rows() == 2 * 3 * slots);
  }
}

}  // namespace

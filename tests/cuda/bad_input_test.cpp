// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/cuda/cuda.hpp>
#include <support.hpp>

// What layer.hpp refuses.
namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::test::message_of;
using namespace moxie::cuda;

TEST_CASE("device: options that no layer has are refused") {
  const auto message = [](moxie::TopKMoEConfig<moxie::HiddenConfig> c) {
    return message_of<moxie::ValueError>([&] { TopKMoE<float> layer(c); });
  };
  moxie::TopKMoEConfig<moxie::HiddenConfig> c{.model_dim = 8, .experts = 4, .top_k = 5, .expert = {.hidden_dim = 8}};
  CHECK(message(c) == "TopKRouter: top_k is 5, expected at most the 4 experts");
  c.top_k = 2;
  CHECK(message(c) == "nothing was thrown");
  c.noise.jitter = 0.1;
  CHECK(message(c) == "TopKRouter: jitter is not there on the device");
  c.noise = {};
  c.expert.hidden_dim = 0;
  CHECK(message(c) == "GluExperts: hidden_dim is 0, expected at least 1");
  CHECK(message_of<moxie::ValueError>([] {
          TopKMoE<float> layer(
              {.model_dim = 8, .experts = 128, .top_k = 2, .expert = {.hidden_dim = 8}, .groups = {.count = 128, .chosen = 4}});
        }) == "TopKRouter: more than 64 groups are not there on the device");
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
  CHECK(moxie::test::contains(forward({in, 7}, out), "60 tokens do not divide into sequences of 7"));
  CHECK(moxie::test::contains(forward({in, 2}, out), "rounds to a capacity of 0"));
  const TopKMoE<float> wider({.model_dim = 8, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 16}});
  DeviceParameters<float> other(exec, wider.layout());
  CHECK(moxie::test::contains(message_of<moxie::ShapeError>([&] { layer.forward(exec, other, in, out, tape); }),
                              "the layer's layout has"));
  const auto backward = [&](const DeviceTokens<float>& tokens, DeviceRows<float> dy, DeviceRows<float> dx,
                            DeviceParameters<float>& to) {
    return message_of<std::exception>([&] { layer.backward(exec, p, tokens, dy, dx, to, tape); });
  };
  Matrix<float> d = Matrix<float>::Ones(60, 8);
  const DeviceRows<float> dy(d.data(), 60, 8);
  const std::string no_forward = "TopKMoE::backward: the tape holds no forward of this layer and these sequences";
  CHECK(backward(in, dy, out, grads) == no_forward);
  layer.forward(exec, p, in, out, tape);
  CHECK(backward({in, 30}, dy, out, grads) == no_forward);
  CHECK(backward(in, dy, dy, grads) == "TopKMoE::backward: dx overlaps x or dy");
  CHECK(backward(in, dy, out, p) == "TopKMoE::backward: the gradients are the parameters");
  CHECK(backward(in, dy.middle_rows(0, 3), out, grads) == "TopKMoE::backward: dy is (3,8), expected (60,8)");
  CHECK(backward(in, dy, out, grads) == "nothing was thrown");
  CHECK(forward({in, 2}, out) != "nothing was thrown");  // after a forward that threw there is none
  CHECK(backward(in, dy, out, grads) == no_forward);
  const SoftMoE<float> soft({.model_dim = 8, .experts = 4, .expert = {.hidden_dim = 8}, .dispatch = moxie::Mixing::identity});
  DeviceParameters<float> soft_p(exec, soft.layout());
  auto soft_tape = soft.make_tape();
  CHECK(message_of<moxie::ShapeError>([&] {
          soft.forward(exec, soft_p, {in, 5}, out, soft_tape);
        }) == "SoftRouter::route: sequence 0 has 5 tokens, expected one for each of the 4 slots");
}

}  // namespace

// SPDX-License-Identifier: MIT
//
// Lesson 7: the same layer on a device.
//
// A layer on the device has the options and the layout of parameters of the CPU's: what one of them initialized, trained or
// loaded is one copy away from the other. This half knows the CPU's layer, device.cpp the device's; here both take the same
// step.
#include <cstdio>
#include <moxie/moxie.hpp>

#include "config.hpp"
#include "device.hpp"

using moxie::Index;
using moxie::Matrix;

static double worst(const std::vector<float>& device, const float* host) {
  double difference = 0;
  for (std::size_t i = 0; i < device.size(); ++i) {
    difference = std::max(difference, double(std::abs(device[i] - host[i])));
  }
  return difference;
}

int main() {
  constexpr Index tokens = 48, length = 16;
  moxie::SharedExpertMoE<float> layer(layer_config());
  layer.initialize(moxie::Rng{42});
  const Index dim = layer.model_dim();
  const Matrix<float> x = moxie::random_normal<float>(tokens, dim, moxie::Rng{1});
  const Matrix<float> dy = moxie::random_normal<float>(tokens, dim, moxie::Rng{2});

  Matrix<float> y(tokens, dim), dx(tokens, dim);
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape(tokens);
  layer.forward({x, length}, y, tape);
  layer.backward({x, length}, dy, dx, grads, tape);

  const auto numbers = [](const float* data, Index n) { return std::vector<float>(data, data + n); };
  const float* block = layer.parameters().flat().data();
  const Step step = step_on_device(numbers(block, layer.layout().size()), numbers(x.data(), x.size()),
                                   numbers(dy.data(), dy.size()), int(length));
  const double error = std::max({worst(step.y, y.data()), worst(step.dx, dx.data()), worst(step.grads, grads.flat().data()),
                                 std::abs(step.balance_loss - tape.balance_loss())});
  std::printf("y, dx and %td gradients on both sides: the largest difference is %.1e\n", layer.layout().parameter_count(),
              error);
  return error < 1e-4 ? 0 : 1;
}

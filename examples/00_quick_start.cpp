// SPDX-License-Identifier: MIT
//
// The README's lines: forward, backward and a step of gradient descent over named parameters, then inference.
#include <cstdio>
#include <moxie/moxie.hpp>

int main() {
  double first = 0, last = 0;

  // [quick start]
  const auto x = moxie::random_normal<float>(64, 32, moxie::Rng{1});  // 64 tokens
  const auto target = moxie::random_normal<float>(64, 32, moxie::Rng{2});
  moxie::TopKMoE<float> layer({.model_dim = 32, .experts = 8, .top_k = 2, .expert = {.hidden_dim = 64}});
  layer.initialize(moxie::Rng{42});
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  moxie::Matrix<float> y(64, 32), dx(64, 32);
  for (int step = 0; step < 200; ++step) {
    layer.forward(x, y, tape);  // (T,D) -> (T,D)
    const moxie::Matrix<float> dy = y - target;
    grads.set_zero();
    layer.backward(x, dy, dx, grads, tape);  // overwrites dx, adds to grads
    moxie::zip([](const auto&, auto w, auto g) { w.eigen() -= 0.01F * g.eigen(); }, layer.parameters(), grads);
    // [quick start]
    (step == 0 ? first : last) = double(dy.squaredNorm());
    // [quick start]
  }
  // [quick start]

  const moxie::Matrix<float> trained = y;
  // [inference]
  const auto frozen = layer.freeze();  // weights packed once: freeze again after an update
  auto nothing = layer.make_tape(64, moxie::Keep::nothing);
  layer.forward(frozen, x, y, nothing, {.threads = 2});
  // [inference]
  std::printf("squared error %.1f -> %.1f, after the last update %.1f\n", first, last, double((y - target).squaredNorm()));
  return last < 0.5 * first && (y - target).squaredNorm() < (trained - target).squaredNorm() ? 0 : 1;
}

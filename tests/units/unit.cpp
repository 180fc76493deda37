// SPDX-License-Identifier: MIT
// One translation unit of a program that has several: forward and backward of three layers, and a hash of all bits. UNIT is the
// name of its function.
#include <cstdint>
#include <moxie/moxie.hpp>

extern "C" std::uint64_t UNIT();

namespace {

std::uint64_t hash(std::uint64_t h, const void* data, std::size_t bytes) {
  const auto* const p = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; ++i) {
    h = (h ^ p[i]) * 1099511628211U;
  }
  return h;
}

template <class Layer>
std::uint64_t hash_of(std::uint64_t h, Layer layer) {
  using Scalar = typename Layer::Scalar;
  const moxie::Index tokens = 96;
  const moxie::Index width = layer.model_dim();
  const auto x = moxie::random_normal<Scalar>(tokens, width, moxie::Rng{1});
  const auto dy = moxie::random_normal<Scalar>(tokens, width, moxie::Rng{2});
  layer.initialize(moxie::Rng{3});
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  moxie::Matrix<Scalar> y(tokens, width), dx(tokens, width);
  layer.forward({x, 16}, y, tape, {.threads = 2});
  layer.backward({x, 16}, dy, dx, grads, tape, {.threads = 2});
  const auto bytes = std::size_t(y.size()) * sizeof(Scalar);
  h = hash(hash(h, y.data(), bytes), dx.data(), bytes);
  return hash(h, grads.flat().data(), std::size_t(grads.flat().size()) * sizeof(Scalar));
}

}  // namespace

std::uint64_t UNIT() {
  std::uint64_t h = 1469598103934665603U;
  h = hash_of(h, moxie::SharedExpertMoE<float>({.model_dim = 40,
                                                .experts = 4,
                                                .top_k = 2,
                                                .expert = {.hidden_dim = 72},
                                                .shared = {.hidden_dim = 72},
                                                .balance = {.expert_level = 0.01}}));
  h = hash_of(h, moxie::SoftMoE<float>({.model_dim = 40, .experts = 4, .slots_per_expert = 2, .expert = {.hidden_dim = 72}}));
  return hash_of(h, moxie::ExpertChoiceMoE<double>({.model_dim = 40, .experts = 4, .expert = {.hidden_dim = 72}}));
}

// SPDX-License-Identifier: MIT
#pragma once

#include <benchmarks.hpp>
#include <cmath>
#include <moxie/layer/top_k_moe.hpp>

namespace moxie::bench {

/// How unequal the experts' loads are: as random tokens make them, by Zipf's law with exponent 1.2, or all tokens to one.
enum class Load { even, zipf, one };

/// A layer of SwiGLU experts, and its tokens.
struct Case {
  const char* name;
  Index dim, hidden, experts, top_k, tokens;
  Load load = Load::even;
};

/// Sizes of DiT-MoE's models (Fei et al. 2024), many small experts as in DeepSeekMoE, and few tokens.
inline constexpr Case cases[] = {
    {"S/2-8E2A", 384, 1536, 8, 2, 4096},
    {"B/2-8E2A", 768, 3072, 8, 2, 2048},
    {"S/2-16E2A", 384, 1536, 16, 2, 4096},
    {"XL/2-8E2A", 1152, 4608, 8, 2, 1024},
    {"S/2-64E2A", 384, 1536, 64, 2, 4096},
    {"fine-64E8A", 768, 384, 64, 8, 2048},
    {"zipf-16E2A", 384, 1536, 16, 2, 4096, Load::zipf},
    {"one-8E1A", 384, 1536, 8, 1, 4096, Load::one},
    {"S/2-8E2A-T256", 384, 1536, 8, 2, 256},
    {"S/2-8E2A-T64", 384, 1536, 8, 2, 64},
    {"S/2-8E2A-T16", 384, 1536, 8, 2, 16},
};

/// A layer and tokens. The first feature of a token is 1, so that the first column of the gate sets the load.
template <class Element>
struct Setup {
  using Scalar = float;
  using Layer = TopKMoE<Scalar, SwiGluExperts<Scalar, Element>>;

  Setup(const Case& c, Keep keep)
      : layer({.model_dim = c.dim, .experts = c.experts, .top_k = c.top_k, .expert = {.hidden_dim = c.hidden}}),
        x(c.tokens, c.dim),
        y(c.tokens, c.dim),
        dy(c.tokens, c.dim),
        dx(c.tokens, c.dim),
        grads(layer.parameters().zeros_like()),
        tape(layer.make_tape(c.tokens, keep)) {
    const Rng rng(42);
    layer.initialize(rng.split(0));
    rng.split(1).fill_normal(RowView<Scalar>(x));
    rng.split(2).fill_normal(RowView<Scalar>(dy));
    const auto gate = layer.parameters().view()["gate.weight"];
    gate.eigen() *= Scalar(8);  // well apart, as those of a trained gate
    gate.eigen().col(0).setZero();
    x.col(0).setOnes();
    for (Index e = 0; e < c.experts; ++e) {
      if (c.load == Load::zipf) {
        gate(e, 0) = Scalar(-1.2 * 5 * std::log(double(e + 1)));
      } else if (c.load == Load::one) {
        gate(e, 0) = Scalar(e == 0 ? 100 : 0);
      }
    }
  }

  Layer layer;
  Matrix<Scalar> x, y, dy, dx;
  Parameters<Scalar> grads;
  typename Layer::Tape tape;
};

/// The work of a step: 6RDH flops forward, 18RDH forward and backward; all weights of the experts that have rows, read once
/// (forward), or read twice with the gradients read and written; and the tokens. Frozen weights are Elements, all else floats.
template <class Element = float>
Work work_of(const Case& c, const SparsePlan<float>& plan, bool backward) {
  using Scalar = float;
  double active = 0;
  for (const auto n : plan.tokens_per_expert()) {
    active += n > 0 ? 1 : 0;
  }
  const double product = 2.0 * double(plan.rows()) * double(c.dim) * double(c.hidden);
  const double weights = 3 * active * double(c.dim) * double(c.hidden) * sizeof(Element);
  const double tokens = double(c.tokens) * double(c.dim) * sizeof(Scalar);
  return backward ? Work{9 * product, 4 * weights + 4 * tokens} : Work{3 * product, weights + 2 * tokens};
}

}  // namespace moxie::bench

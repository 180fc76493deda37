// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <dit/configuration.hpp>

namespace dit {

/// What a model costs, by arithmetic; none is made.
struct Cost {
  std::int64_t parameters = 0;            ///< all that `Model` has, which gradients or a selection bias train
  std::int64_t activated = 0;             ///< those that a token meets, on average over the tokens
  std::int64_t linear_multiply_adds = 0;  ///< of the linear layers for one image, biases left out
  std::int64_t multiply_adds = 0;         ///< with q kᵀ and P v
};

/// A feed-forward of L tokens for each image, width D and hidden width H. Of r rows of experts for a token, an expert of
/// P = 3DH numbers and multiply-adds (SwiGLU), or 2DH + H + D and 2DH (GELU):
///
///                      r           parameters                    multiply-adds of a token
///     dense            1           P                             P
///     top-k, shared    K           EP + ED + 3DH' (+ E, a bias)  KP + ED + 3DH'
///     expert-choice    EC / L      EP + ED                       rP + ED            C: the capacity
///     soft             N / L       EP + ND + 1                   rP + 3ND           N: the slots; logits, dispatch, combine
///
/// Activated are r experts and all else. With a capacity, token choice computes at most this.
struct FeedForwardCost {
  double parameters = 0;
  double activated = 0;
  double multiply_adds = 0;
};
inline FeedForwardCost feed_forward_cost(const TrainingConfig& c) {
  const auto dim = double(c.model.dim);
  const auto hidden = double(c.hidden_dim);
  const auto length = double(c.model.tokens());
  const auto experts = double(c.experts);
  const bool gelu = has_gelu_experts(c);
  const double product = (gelu ? 2 : 3) * dim * hidden;
  const double expert = product + (gelu ? hidden + dim : 0);
  if (c.feed_forward == "dense") {
    return {expert, expert, product};
  }
  double rows = double(c.top_k);
  double others = experts * dim;  // parameters
  double work = experts * dim;    // of a token, beside its rows
  if (c.feed_forward == "expert-choice") {
    rows = experts * double(moxie::expert_capacity(c.model.tokens(), c.experts, {.factor = c.capacity_factor})) / length;
  } else if (c.feed_forward == "soft") {
    const double slots = experts * double(c.slots_per_expert);
    const bool learned = c.dispatch == "learned" || c.combine == "learned";
    rows = slots / length;
    others = learned ? slots * dim + 1 : 0;
    work = (learned ? 3 : 2) * slots * dim;
  } else {
    const double shared = c.feed_forward == "shared" ? 3 * dim * double(c.shared_hidden_dim) : 0;
    others += shared + (c.recipe.bias_rate > 0 ? experts : 0);
    work += shared;
  }
  return {experts * expert + others, rows * expert + others, rows * product + work};
}

/// With F the multiply-adds of a token in a block's feed-forward, and of Switch-DiT's K of E experts
///
///     linear    L (Cin p² D + D Cout p² + Σ (4D² + F + KD²)) + blocks (6D² + ED) + 2D² + (256 + D) D
///     attention blocks 2 L² D
///
/// Throws ValueError for a shape of images that no model has; `model_of` refuses the rest.
inline Cost cost_of(const TrainingConfig& c) {
  const ModelConfig& m = c.model;
  m.validate();
  const auto dim = double(m.dim);
  const auto length = double(m.tokens());
  const auto linear = [](Index in, Index out) { return double((in + 1) * out); };
  double parameters = linear(m.patch_dim(), m.dim) + linear(256, m.dim) + linear(m.dim, m.dim) + double(m.classes + 1) * dim +
                      linear(m.dim, 2 * m.dim) + linear(m.dim, m.patch_output_dim());
  double idle = 0;
  double token = double(m.patch_dim() + m.patch_output_dim()) * dim;
  double image = 2 * dim * dim + (256 + dim) * dim;
  for (Index block = 0; block < m.depth; ++block) {
    const FeedForwardCost feed_forward = feed_forward_cost(config_of_block(c, block));
    parameters += linear(m.dim, 6 * m.dim) + linear(m.dim, 3 * m.dim) + linear(m.dim, m.dim) + feed_forward.parameters +
                  (m.qk_norm ? 4 * dim / double(m.heads) : 0);
    idle += feed_forward.parameters - feed_forward.activated;
    token += 4 * dim * dim + feed_forward.multiply_adds;
    image += 6 * dim * dim;
    if (m.switch_experts > 0) {
      const auto experts = double(m.switch_experts);
      parameters += experts * (linear(m.dim, m.dim) + dim + 1);
      idle += (experts - double(m.switch_top_k)) * linear(m.dim, m.dim);
      token += double(m.switch_top_k) * dim * dim;
      image += experts * dim;
    }
  }
  Cost cost;
  cost.parameters = std::llround(parameters);
  cost.activated = std::llround(parameters - idle);
  cost.linear_multiply_adds = std::llround(length * token + image);
  cost.multiply_adds = cost.linear_multiply_adds + std::llround(double(m.depth) * 2 * length * length * dim);
  return cost;
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <dit/checkpoint.hpp>

namespace dit {

/// How a dense model becomes a mixture of experts.
struct UpcyclingOptions {
  Index experts = 8;
  Index top_k = 2;
  /// The weights of a token's experts sum to 1, so that the mixture computes what the dense model computes. Otherwise it is the
  /// start of DiT-MoE's script, whose weights are shares of all experts.
  bool equal = false;
  std::uint64_t seed = 1;
};

/// The configuration of the mixture that a model becomes: a dense DiT one with its kind of experts and no shared ones; a
/// DiT-MoE of one expert, DiT-MoE's script's "dense" model, one with more. Throws ValueError for other models.
inline TrainingConfig upcycled_config(TrainingConfig c, const UpcyclingOptions& options) {
  const bool dense = c.feed_forward == "dense";
  moxie::detail::expect_value(dense || ((c.feed_forward == "shared" || c.feed_forward == "top-k") && c.experts == 1), "upcycle",
                              "the model must be dense, or have one expert");
  if (dense) {
    c.expert = has_gelu_experts(c) ? "gelu" : "swiglu";
    c.feed_forward = "top-k";
  }
  c.experts = options.experts;
  c.top_k = options.top_k;
  c.normalize = options.equal;
  return c;
}

/// Sparse upcycling (Komatsuzaki et al. 2022; DiT-MoE's upcycle.py): every expert of every block starts as a copy of the dense
/// feed-forward, gates are drawn from N(0, 0.02²), and all else stays as it is.
template <class Dense, class Sparse>
moxie::Parameters<float> upcycled(const Dense& dense, const moxie::Parameters<float>& weights, const Sparse& sparse,
                                  const UpcyclingOptions& options) {
  moxie::Parameters<float> p(sparse.layout());
  const auto& tensors = sparse.layout().tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto to = p.view()[Index(i)];
    const Index from = dense.layout().find(tensors[i].name);
    if (from >= 0 && dense.layout().tensors()[std::size_t(from)].shape == tensors[i].shape) {
      to.eigen() = weights.view()[from].eigen();
    } else if (tensors[i].name.ends_with("moe.gate.weight")) {
      Rng(options.seed).split(i).fill_normal(to, 0.02);
    }
  }
  for (Index block = 0; block < sparse.config().depth; ++block) {
    upcycle_feed_forward(dense.feed_forward(block), dense.feed_forward_part(weights.view(), block), sparse.feed_forward(block),
                         sparse.feed_forward_part(p.view(), block));
  }
  return p;
}

/// Writes the upcycled model of a checkpoint, which `dit sample` draws with and `dit train --start-from` goes on from. Returns
/// the number of its parameters. Throws SafetensorsError and ValueError; an old file is then as it was.
inline Index upcycle_checkpoint(const SafetensorsFile& file, const TrainingConfig& config, const UpcyclingOptions& options,
                                const std::filesystem::path& path) {
  const TrainingConfig sparse_config = upcycled_config(config, options);
  const auto dense = model_of(config);
  const moxie::Parameters<float> weights = load_model(file, dense.config(), dense.layout());
  const auto sparse = model_of(sparse_config);
  const moxie::Parameters<float> p = upcycled(dense, weights, sparse, options);
  CheckpointWriter writer;
  writer.add(p);
  writer.add_position_embedding(sparse.config());
  writer.config(sparse_config);
  for (const auto& [key, value] : file.metadata()) {
    if (key.starts_with("class.")) {
      writer.metadata(key, value);
    }
  }
  writer.save(path);
  return sparse.layout().parameter_count();
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <moxie/moxie.hpp>
#include <nn/activation.hpp>
#include <nn/adaln.hpp>
#include <nn/attention.hpp>
#include <nn/embedding.hpp>
#include <nn/linear.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace dit {

using moxie::Buffer;
using moxie::Context;
using moxie::Exec;
using moxie::Index;
using moxie::Layout;
using moxie::Matrix;
using moxie::ParameterView;
using moxie::Rng;
using moxie::RowView;
using moxie::Workspace;
using nn::Attention;
using nn::position_embedding;

/// The plain feed-forward of a dense DiT, the reference's a GELU MLP, with the reference's names of tensors.
template <class S, class Experts = moxie::GeluTanhExperts<S>>
class DenseFeedForward : public moxie::DenseFeedForward<Experts> {
 public:
  struct Config {
    Index model_dim = 0;
    Index hidden_dim = 0;
  };

  explicit DenseFeedForward(const Config& c)
      : moxie::DenseFeedForward<Experts>(
            {.model_dim = c.model_dim, .expert = {.hidden_dim = c.hidden_dim}, .names = {"mlp", false}}) {}
};

/// out -= a ⊙ b.
template <class S>
void subtract_product(RowView<const S> a, RowView<const S> b, RowView<S> out, const Exec& exec) {
  exec.parallel_ranges(out.rows(), 16, [&](Index begin, Index end) {
    const auto part = [&](auto m) { return m.middle_rows(begin, end - begin).eigen().array(); };
    part(out) -= part(a) * part(b);
  });
}

/// The shape of a diffusion transformer.
struct ModelConfig {
  Index image_size = 28;
  Index channels = 1;
  Index patch = 4;
  Index dim = 128;
  Index depth = 4;
  Index heads = 4;
  Index classes = 10;        ///< the label `classes` means "no class"
  bool learn_sigma = false;  ///< a second output for every pixel, in channels after the first ones
  bool qk_norm = false;      ///< attention of the large models

  Index switch_experts = 0;  ///< Switch-DiT: experts before each block, which the timestep chooses; 0 for none
  Index switch_top_k = 2;
  double prior = 1;          ///< weight of the diffusion prior loss of their gates
  Index timesteps = 1000;    ///< that the prior tells apart
  double timestep_unit = 1;  ///< the time t of timestep i is i · unit: 1 for DDPM, 1 / timesteps where t is in [0,1]

  Index out_channels() const { return learn_sigma ? 2 * channels : channels; }
  Index grid() const { return image_size / patch; }
  Index tokens() const { return grid() * grid(); }
  Index patch_dim() const { return channels * patch * patch; }
  Index image_dim() const { return channels * image_size * image_size; }
  Index patch_output_dim() const { return out_channels() * patch * patch; }
  Index output_dim() const { return out_channels() * image_size * image_size; }
  Index timestep(double t) const { return Index(std::clamp(std::floor(t / timestep_unit + 1e-3), 0.0, double(timesteps - 1))); }

  /// Throws ValueError for a shape that no transformer has.
  void validate() const {
    const auto expect = [](bool holds, const std::string& message) {
      moxie::detail::expect_value(holds, "ModelConfig", message);
    };
    const auto number = [](Index n) { return std::to_string(n); };
    expect(patch >= 1 && image_size >= patch && image_size % patch == 0,
           "images of " + number(image_size) + " x " + number(image_size) + " are not made of patches of " + number(patch));
    expect(heads >= 1 && dim >= 4 && dim % 4 == 0 && dim % heads == 0,
           "dim " + number(dim) + " must be a multiple of 4 and of heads, " + number(heads));
    expect(channels >= 1 && depth >= 1 && classes >= 1, "channels, depth and classes must be at least 1");
    expect(switch_experts == 0 || (switch_experts >= 1 && switch_top_k >= 1 && switch_top_k <= switch_experts),
           "switch_top_k must be at least 1 and at most switch_experts");
    expect(timesteps >= 1 && timestep_unit > 0 && std::isfinite(timestep_unit) && prior >= 0 && std::isfinite(prior),
           "timesteps, timestep_unit and prior must be positive and finite");
  }
};

/// A diffusion transformer (Peebles and Xie 2023) whose feed-forward is any moxie layer: DiT-MoE with `SharedExpertMoE`.
///
///     x  = patches W + b + position;   c = SiLU(timestep embedding + label embedding)
///     x += gate1 · attention(modulate(norm x));   x += gate2 · moe(modulate(norm x))     for every block, six modulations from
///     c v  = final(modulate(norm x))
///
/// With `switch_experts`, Switch-DiT (Park et al. 2024): block f runs behind a mask of experts that the timestep chooses,
///
///     y = switch(x, timestep embedding);   out = f(x ⊙ (1 + y)) - x ⊙ y
///
/// and where `match_prior` has been called, the diffusion prior loss is one of the balance losses.
///
/// All parameters live in one block, named as in the reference. Modulations, the final layer and the experts of the masks start
/// at zero, so that every block starts as the identity.
template <class FeedForward, class S = typename FeedForward::Scalar>
class Model {
 public:
  struct BlockTape {
    Buffer<S> modulation;  // (B,6D)
    Buffer<S> h1, projected, middle, h2, mixed, out;
    typename nn::ModulatedNorm<S>::Tape norm1, norm2;
    typename nn::SelfAttention<S>::Tape attention;
    typename FeedForward::Tape feed_forward;
    typename moxie::TimestepMoE<S>::Tape gated;  // Switch-DiT's layer, its output and what it lets through
    Buffer<S> gated_y, masked;
    Buffer<S> dgated_logits;  // of the prior loss
  };
  struct Tape {
    Index batch = 0;
    Buffer<S> patches, condition, active_condition, first, final_modulation, final_h, tokens;
    typename nn::TimestepEmbedding<S>::Tape time;
    std::vector<Index> labels;
    std::vector<BlockTape> blocks;
    typename nn::ModulatedNorm<S>::Tape final_norm;
    Workspace workspace;
    // Of Switch-DiT: the embedding of t, and for the prior the unit of it that each expert plays (none: no prior loss).
    Buffer<S> time_embedding;
    std::vector<Index> prior_of_unit;
    double prior_loss = 0;

    /// Sum of the balance losses of all blocks, and Switch-DiT's prior loss.
    double balance_loss() const {
      double loss = prior_loss;
      for (const BlockTape& block : blocks) {
        loss += block.feed_forward.balance_loss();
      }
      return loss;
    }
  };

  /// `name` is what the tensors of the feed-forward are called in a block: "moe." in DiT-MoE.
  Model(const ModelConfig& config, const FeedForward& feed_forward, const std::string& name)
      : Model(config, std::vector<FeedForward>(std::size_t(std::max<Index>(config.depth, 0)), feed_forward), name) {}
  /// With a feed-forward for each block. Throws ValueError if there are not as many.
  Model(const ModelConfig& config, const std::vector<FeedForward>& feed_forwards, const std::string& name)
      : config_((config.validate(), config)),
        feed_forwards_(feed_forwards),
        patch_embedding_(layout_, "x_embedder.proj", {config.dim, config.channels, config.patch, config.patch}, config.dim),
        time_(layout_, "t_embedder.mlp", config.dim),
        labels_(layout_, "y_embedder.embedding_table", config.classes + 1, config.dim),
        blocks_(declare_blocks(name)),
        final_linear_(layout_, "final_layer.linear", config.dim, config.patch_output_dim()),
        final_modulation_(layout_, "final_layer.adaLN_modulation.1", config.dim, 2 * config.dim),
        position_(position_embedding<S>(config.grid(), config.dim)) {
    moxie::detail::expect_value(Index(feed_forwards.size()) == config.depth, "Model", "one feed-forward a block expected");
    if (config.switch_experts > 0) {
      switch_.emplace(moxie::TimestepMoEConfig<moxie::LinearConfig>{.model_dim = config.dim,
                                                                    .condition_dim = config.dim,
                                                                    .experts = config.switch_experts,
                                                                    .top_k = config.switch_top_k});
      prior_ = moxie::unit_mapping(config.timesteps, config.depth * config.switch_experts,
                                   double(config.switch_top_k) / double(config.switch_experts));
      for (std::size_t i = 0; i < blocks_.size(); ++i) {
        blocks_[i].gated = layout_.add_part("routers." + std::to_string(i) + ".", switch_->layout());
      }
    }
  }

  const ModelConfig& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  const FeedForward& feed_forward(Index block = 0) const { return feed_forwards_[std::size_t(block)]; }
  /// Its part of the parameters in a block.
  template <class T>
  ParameterView<T> feed_forward_part(ParameterView<T> p, Index block) const {
    return p.part(blocks_[std::size_t(block)].feed_forward, feed_forward(block).layout());
  }

  void initialize(ParameterView<S> p, const Rng& rng) const {
    moxie::set_zero(p);
    patch_embedding_.initialize(p, rng);
    time_.initialize(p, rng);
    labels_.initialize(p, rng);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      blocks_[i].attention.initialize(p, rng);
      feed_forwards_[i].initialize(feed_forward_part(p, Index(i)), rng.split(1000 + i));
      if (switch_) {
        const ParameterView<S> gated = p.part(blocks_[i].gated, switch_->layout());
        switch_->initialize(gated, rng.split(2000 + i));
        for (const auto& tensor : switch_->layout().tensors()) {
          if (tensor.name.starts_with("experts.")) {
            gated[tensor.name].eigen().setZero();
          }
        }
      }
    }
  }

  /// Matches the experts of Switch-DiT with the units of the diffusion prior, by what the gates choose at every timestep. From
  /// then on `forward` adds the prior loss. The reference does this in every step of training. Cost: the gates for all
  /// timesteps, and `match_units`.
  void match_prior(ParameterView<const S> p, Tape& tape, const Exec& exec) const {
    if (!switch_) {
      return;
    }
    const Index steps = config_.timesteps;
    std::vector<S> times;
    for (Index i = 0; i < steps; ++i) {
      times.push_back(S(double(i) * config_.timestep_unit));
    }
    const Workspace::Frame frame(tape.workspace);
    const RowView<S> embedding = tape.workspace.template matrix<S>(steps, config_.dim);
    typename nn::TimestepEmbedding<S>::Tape time;
    time_.forward(p, times, embedding, time, exec);
    // As many sequences without tokens.
    const std::vector<Index> starts(std::size_t(steps + 1), 0);
    const Matrix<S> none(0, config_.dim);
    Matrix<S> no_output(0, config_.dim);
    moxie::Tokens<S> in(none, starts);
    in.condition = embedding;
    Matrix<std::uint8_t> chosen(steps, prior_.cols());
    auto gates = switch_->make_tape();
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      switch_->forward(p.part(blocks_[i].gated, switch_->layout()), in, no_output, gates, {tape.workspace, exec});
      moxie::mark_chosen_units(gates.router().choices(), config_.switch_experts, Index(i) * config_.switch_experts, chosen);
    }
    tape.prior_of_unit = moxie::match_units(chosen, prior_).column;
  }

  /// With `Keep::nothing` the feed-forwards keep nothing for a backward, which then throws ValueError.
  Tape make_tape(moxie::Keep keep = moxie::Keep::activations) const {
    Tape tape;
    tape.blocks.resize(blocks_.size());
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      tape.blocks[i].feed_forward = feed_forwards_[i].make_tape(0, keep);
    }
    return tape;
  }

  /// v (B, Cout·H·W) from noisy images x (B, C·H·W), times t (B) and labels (B); the label `classes` is "no class".
  void forward(ParameterView<const S> p, RowView<const S> x, const std::vector<S>& t, const std::vector<Index>& labels,
               RowView<S> v, Tape& tape, const Exec& exec) const {
    const Index batch = x.rows();
    const Index length = config_.tokens();
    const Index rows = batch * length;
    const Index dim = config_.dim;
    moxie::detail::expect_shape("Model::forward", "x", x, -1, config_.image_dim(), "B");
    moxie::detail::expect_at_least("Model::forward", "images", batch, 1);
    moxie::detail::expect_shape("Model::forward", "v", v, batch, config_.output_dim());
    moxie::detail::expect_value(Index(t.size()) == batch && Index(labels.size()) == batch, "Model::forward",
                                "one time and one label an image expected");
    for (const Index label : labels) {
      moxie::detail::expect_value(label >= 0 && label <= config_.classes, "Model::forward", "a label is not a class");
    }
    tape.batch = batch;
    tape.labels = labels;

    const RowView<S> condition = tape.condition.matrix(batch, dim);
    const RowView<S> active = tape.active_condition.matrix(batch, dim);
    time_.forward(p, t, condition, tape.time, exec);
    if (switch_) {
      tape.time_embedding.matrix(batch, dim).eigen() = condition.eigen();
    }
    labels_.add(p, labels, condition);
    nn::activate<moxie::Silu, S>(condition, active);

    const RowView<S> patches = tape.patches.matrix(rows, config_.patch_dim());
    for_each_input([&](Index row, Index feature, Index b, Index pixel) { patches(row, feature) = x(b, pixel); }, batch);
    const RowView<S> first = tape.first.matrix(rows, dim);
    patch_embedding_.forward(p, patches, first, exec);
    for (Index b = 0; b < batch; ++b) {
      first.middle_rows(b * length, length).eigen() += position_;
    }

    RowView<const S> in = first;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      BlockTape& block = tape.blocks[i];
      in = switch_ ? masked_forward(blocks_[i], p, in, active, tape, block, exec)
                   : block_forward(blocks_[i], p, in, active, block, {tape.workspace, exec});
    }
    tape.prior_loss = 0;
    for (BlockTape& block : tape.blocks) {
      block.dgated_logits.resize(0);
    }
    if (!tape.prior_of_unit.empty() && config_.prior > 0) {
      add_prior_loss(t, tape);
    }

    const RowView<S> modulation = tape.final_modulation.matrix(batch, 2 * dim);
    const RowView<S> h = tape.final_h.matrix(rows, dim);
    const RowView<S> tokens = tape.tokens.matrix(rows, config_.patch_output_dim());
    final_modulation_.forward(p, active, modulation, exec);
    norm().forward(in, columns<const S>(modulation, 0), columns<const S>(modulation, 1), h, tape.final_norm, exec);
    final_linear_.forward(p, h, tokens, exec);
    for_each_output([&](Index row, Index feature, Index b, Index pixel) { v(b, pixel) = tokens(row, feature); }, batch);
  }

  /// From the forward's tape: adds to the gradients the gradient of ⟨v, dv⟩ + balance_loss. Images get no gradient unless dx
  /// (B, C·H·W) is given; it is overwritten.
  void backward(ParameterView<const S> p, RowView<const S> dv, ParameterView<S> grads, Tape& tape, const Exec& exec,
                RowView<S> dx = {}) const {
    const Index batch = tape.batch;
    const Index length = config_.tokens();
    const Index rows = batch * length;
    const Index dim = config_.dim;
    moxie::detail::expect_shape("Model::backward", "dv", dv, batch, config_.output_dim());
    const Workspace::Frame frame(tape.workspace);
    const RowView<S> dtokens = tape.workspace.template matrix<S>(rows, config_.patch_output_dim());
    const RowView<S> dh = tape.workspace.template matrix<S>(rows, dim);
    const RowView<S> d = tape.workspace.template matrix<S>(rows, dim);
    const RowView<S> dmodulation = tape.workspace.template matrix<S>(batch, 2 * dim);
    const RowView<S> dactive = tape.workspace.template matrix<S>(batch, dim);
    const RowView<S> dembedding = tape.workspace.template matrix<S>(switch_ ? batch : 0, dim);
    dembedding.eigen().setZero();

    for_each_output([&](Index row, Index feature, Index b, Index pixel) { dtokens(row, feature) = dv(b, pixel); }, batch);
    const RowView<const S> active = tape.active_condition.view(batch, dim);
    final_linear_.backward(p, tape.final_h.view(rows, dim), dtokens, dh, grads, exec);
    d.eigen().setZero();
    const RowView<const S> modulation = tape.final_modulation.view(batch, 2 * dim);
    norm().backward(columns<const S>(modulation, 1), dh, columns<S>(dmodulation, 0), columns<S>(dmodulation, 1), d,
                    tape.final_norm, exec);
    final_modulation_.backward(p, active, dmodulation, dactive, grads, exec);

    for (std::size_t i = blocks_.size(); i-- > 0;) {
      const RowView<const S> in = i == 0 ? tape.first.view(rows, dim) : tape.blocks[i - 1].out.view(rows, dim);
      if (switch_) {
        masked_backward(blocks_[i], p, in, active, d, dactive, dembedding, grads, tape, tape.blocks[i], exec);
      } else {
        block_backward(blocks_[i], p, in, active, d, dactive, grads, tape.blocks[i], {tape.workspace, exec});
      }
    }

    if (dx.size() == 0) {
      patch_embedding_.backward(tape.patches.view(rows, config_.patch_dim()), d, grads, exec);
    } else {
      const RowView<S> dpatches = tape.workspace.template matrix<S>(rows, config_.patch_dim());
      patch_embedding_.backward(p, tape.patches.view(rows, config_.patch_dim()), d, dpatches, grads, exec);
      for_each_input([&](Index row, Index feature, Index b, Index pixel) { dx(b, pixel) = dpatches(row, feature); }, batch);
    }
    nn::activate_backward<moxie::Silu, S>(tape.condition.view(batch, dim), dactive);  // now the gradient of the condition
    labels_.backward(tape.labels, dactive, grads);
    if (switch_) {
      dactive.eigen() += dembedding.eigen();
    }
    time_.backward(p, dactive, grads, tape.time, {tape.workspace, exec});
  }

 private:
  struct Block {
    nn::SelfAttention<S> attention;
    Index feed_forward;  // offset of its part of the block of parameters
    nn::Linear<S> modulation;
    Index number;     // of the block
    Index gated = 0;  // offset of Switch-DiT's part
  };

  std::vector<Block> declare_blocks(const std::string& feed_forward_name) {
    std::vector<Block> blocks;
    for (Index i = 0; i < config_.depth; ++i) {
      const std::string name = "blocks." + std::to_string(i) + ".";
      blocks.push_back(
          {nn::SelfAttention<S>(layout_, name + "attn.", config_.dim, config_.heads, config_.tokens(), config_.qk_norm),
           layout_.add_part(name + feed_forward_name, feed_forward(i).layout()),
           nn::Linear<S>(layout_, name + "adaLN_modulation.1", config_.dim, 6 * config_.dim), i});
    }
    return blocks;
  }

  nn::ModulatedNorm<S> norm() const { return {config_.tokens()}; }
  /// Modulation i, D columns: 0..5 are shift, scale, gate of attention, then of the feed-forward.
  template <class T>
  RowView<T> columns(RowView<T> m, Index i) const {
    return {m.data() + i * config_.dim, m.rows(), config_.dim, m.stride()};
  }
  moxie::Tokens<S> sequences(RowView<const S> x) const { return {x, config_.tokens()}; }

  RowView<const S> block_forward(const Block& block, ParameterView<const S> p, RowView<const S> x, RowView<const S> condition,
                                 BlockTape& tape, const Context& context) const {
    const Index rows = x.rows();
    const Index dim = config_.dim;
    const RowView<S> modulation = tape.modulation.matrix(condition.rows(), 6 * dim);
    const RowView<const S> m = modulation;
    const RowView<S> h1 = tape.h1.matrix(rows, dim);
    const RowView<S> projected = tape.projected.matrix(rows, dim);
    const RowView<S> middle = tape.middle.matrix(rows, dim);
    const RowView<S> h2 = tape.h2.matrix(rows, dim);
    const RowView<S> mixed = tape.mixed.matrix(rows, dim);
    const RowView<S> out = tape.out.matrix(rows, dim);
    block.modulation.forward(p, condition, modulation, context.exec);
    norm().forward(x, columns(m, 0), columns(m, 1), h1, tape.norm1, context.exec);
    block.attention.forward(p, h1, projected, tape.attention, context);
    nn::add_gated<S>(x, columns(m, 2), projected, middle, context.exec);
    norm().forward(middle, columns(m, 3), columns(m, 4), h2, tape.norm2, context.exec);
    feed_forward(block.number).forward(feed_forward_part(p, block.number), sequences(h2), mixed, tape.feed_forward, context);
    nn::add_gated<S>(middle, columns(m, 5), mixed, out, context.exec);
    return out;
  }

  /// Switch-DiT: the block on what the mask lets through, and what it holds back around the block.
  RowView<const S> masked_forward(const Block& block, ParameterView<const S> p, RowView<const S> x, RowView<const S> condition,
                                  Tape& whole, BlockTape& tape, const Exec& exec) const {
    const RowView<S> y = tape.gated_y.matrix(x.rows(), x.cols());
    const RowView<S> masked = tape.masked.matrix(x.rows(), x.cols());
    switch_->forward(p.part(block.gated, switch_->layout()), timed_sequences(x, whole), y, tape.gated, {whole.workspace, exec});
    moxie::timestep_mask<S>(x, y, masked, exec);
    block_forward(block, p, masked, condition, tape, {whole.workspace, exec});
    const RowView<S> out = tape.out.matrix(x.rows(), x.cols());
    subtract_product<S>(x, y, out, exec);
    return out;
  }

  void masked_backward(const Block& block, ParameterView<const S> p, RowView<const S> x, RowView<const S> condition,
                       RowView<S> d, RowView<S> dcondition, RowView<S> dembedding, ParameterView<S> grads, Tape& whole,
                       BlockTape& tape, const Exec& exec) const {
    Workspace& workspace = whole.workspace;
    const Workspace::Frame frame(workspace);
    const auto scratch = [&] { return workspace.matrix<S>(x.rows(), x.cols()); };
    const RowView<const S> y = tape.gated_y.view(x.rows(), x.cols());
    const RowView<S> dout = scratch();
    const RowView<S> dx = scratch();
    const RowView<S> dy = scratch();
    const RowView<S> dcondition_part = workspace.matrix<S>(dembedding.rows(), dembedding.cols());
    dout.eigen() = d.eigen();
    block_backward(block, p, tape.masked.view(x.rows(), x.cols()), condition, d, dcondition, grads, tape, {workspace, exec});
    moxie::timestep_mask_backward<S>(x, y, d, dx, dy, exec);
    subtract_product<S>(dout, y, dx, exec);
    subtract_product<S>(dout, x, dy, exec);
    const bool prior = tape.dgated_logits.size() != 0;
    const RowView<const S> dlogits = prior ? tape.dgated_logits.view(whole.batch, config_.switch_experts) : RowView<S>();
    switch_->backward(p.part(block.gated, switch_->layout()), timed_sequences(x, whole), {dy, dlogits},
                      {{d, dcondition_part}, grads.part(block.gated, switch_->layout())}, tape.gated, {workspace, exec});
    dembedding.eigen() += dcondition_part.eigen();
    d.eigen() += dx.eigen();
  }
  moxie::Tokens<S> timed_sequences(RowView<const S> x, const Tape& tape) const {
    moxie::Tokens<S> in(x, config_.tokens());
    in.condition = tape.time_embedding.view(tape.batch, config_.dim);
    return in;
  }

  /// Computes the prior loss, and leaves its gradient of the gates' logits.
  void add_prior_loss(const std::vector<S>& t, Tape& tape) const {
    const Index experts = config_.switch_experts;
    Matrix<S> scores(tape.batch, prior_.cols());
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      scores.middleCols(Index(i) * experts, experts) = tape.blocks[i].gated.router().scores().eigen();
    }
    std::vector<Index> timesteps;
    timesteps.reserve(t.size());
    for (const S time : t) {
      timesteps.push_back(config_.timestep(double(time)));
    }
    const moxie::DiffusionPrior prior{.blocks = config_.depth, .mapping = prior_, .prior_of_unit = tape.prior_of_unit};
    tape.prior_loss = config_.prior * moxie::diffusion_prior_loss<S>(scores, timesteps, prior);
    Matrix<S> dscores = Matrix<S>::Zero(scores.rows(), scores.cols());
    moxie::diffusion_prior_loss_backward<S>(scores, timesteps, prior, config_.prior, dscores);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      BlockTape& block = tape.blocks[i];
      const RowView<S> dlogits = block.dgated_logits.matrix(tape.batch, experts);
      dlogits.eigen() = dscores.middleCols(Index(i) * experts, experts);
      moxie::softmax_rows_backward(block.gated.router().scores(), dlogits, {});
    }
  }

  /// d: gradient of the block's output in, of its input out. Adds to dcondition.
  void block_backward(const Block& block, ParameterView<const S> p, RowView<const S> x, RowView<const S> condition,
                      RowView<S> d, RowView<S> dcondition, ParameterView<S> grads, BlockTape& tape,
                      const Context& context) const {
    const Index rows = x.rows();
    const Index dim = config_.dim;
    const Workspace::Frame frame(context.workspace);
    const RowView<const S> m = tape.modulation.view(condition.rows(), 6 * dim);
    const RowView<S> dm = context.workspace.matrix<S>(condition.rows(), 6 * dim);
    const RowView<S> df = context.workspace.matrix<S>(rows, dim);
    const RowView<S> dh = context.workspace.matrix<S>(rows, dim);

    nn::add_gated_backward<S>(columns(m, 5), tape.mixed.view(rows, dim), d, df, columns(dm, 5), context.exec);
    feed_forward(block.number)
        .backward(feed_forward_part(p, block.number), sequences(tape.h2.view(rows, dim)), df,
                  {dh, feed_forward_part(grads, block.number)}, tape.feed_forward, context);
    norm().backward(columns(m, 4), dh, columns(dm, 3), columns(dm, 4), d, tape.norm2, context.exec);

    nn::add_gated_backward<S>(columns(m, 2), tape.projected.view(rows, dim), d, df, columns(dm, 2), context.exec);
    block.attention.backward(p, tape.h1.view(rows, dim), df, dh, grads, tape.attention, context);
    norm().backward(columns(m, 1), dh, columns(dm, 0), columns(dm, 1), d, tape.norm1, context.exec);
    block.modulation.backward(p, condition, dm, dcondition, grads, context.exec, true);
  }

  /// f(row of tokens, feature of a patch, image, pixel of the image): features go in as (c,ph,pw), and come out as (ph,pw,c).
  template <class F>
  void for_each_input(F&& f, Index batch) const {
    for_each_pixel([&](Index row, Index c, Index inside, Index b,
                       Index pixel) { f(row, c * config_.patch * config_.patch + inside, b, pixel); },
                   config_.channels, batch);
  }
  template <class F>
  void for_each_output(F&& f, Index batch) const {
    const Index channels = config_.out_channels();
    for_each_pixel([&](Index row, Index c, Index inside, Index b, Index pixel) { f(row, inside * channels + c, b, pixel); },
                   channels, batch);
  }
  /// f(row of tokens, channel, place in the patch, image, pixel).
  template <class F>
  void for_each_pixel(F&& f, Index channels, Index batch) const {
    const Index patch = config_.patch;
    const Index size = config_.image_size;
    for (Index b = 0; b < batch; ++b) {
      for (Index c = 0; c < channels; ++c) {
        for (Index y = 0; y < size; ++y) {
          for (Index x = 0; x < size; ++x) {
            const Index row = (b * config_.grid() + y / patch) * config_.grid() + x / patch;
            f(row, c, y % patch * patch + x % patch, b, (c * size + y) * size + x);
          }
        }
      }
    }
  }

  ModelConfig config_;
  std::vector<FeedForward> feed_forwards_;
  Layout layout_;
  nn::Linear<S> patch_embedding_;
  nn::TimestepEmbedding<S> time_;
  nn::LabelEmbedding<S> labels_;
  std::vector<Block> blocks_;
  std::optional<moxie::TimestepMoE<S>> switch_;
  Matrix<std::uint8_t> prior_;
  nn::Linear<S> final_linear_;
  nn::Linear<S> final_modulation_;
  Matrix<S> position_;
};

/// Experts that a feed-forward chooses from: 0 for a dense one.
inline Index routed_experts(const Layout& feed_forward) {
  Index experts = 0;
  for (const moxie::TensorInfo& tensor : feed_forward.tensors()) {
    experts = std::max(experts, tensor.expert + 1);
  }
  return experts;
}

/// Calls `f(plan)` with the plan of a feed-forward's tape, if it has one.
template <class Tape, class F>
void visit_plan(const Tape& tape, F&& f) {
  if constexpr (requires { tape.plan(); }) {
    f(tape.plan());
  } else if (const auto* const sparse = tape.template get_if<moxie::SparsePlan<float>>(); sparse != nullptr) {
    f(*sparse);
  } else if (const auto* const dense = tape.template get_if<moxie::DensePlan<float>>(); dense != nullptr) {
    f(*dense);
  }
}

/// The tape of the top-k router within a feed-forward's tape; null if there is none.
template <class Tape>
const moxie::TopKRouter<float>::Tape* top_k_tape(const Tape& tape) {
  using Router = moxie::TopKRouter<float>::Tape;
  if constexpr (requires { tape.template get_if<Router>(); }) {
    return tape.template get_if<Router>();
  } else if constexpr (std::is_same_v<std::remove_cvref_t<decltype(tape.router())>, Router>) {
    return &tape.router();
  } else {
    return nullptr;
  }
}

}  // namespace dit

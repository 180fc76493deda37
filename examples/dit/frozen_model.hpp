// SPDX-License-Identifier: MIT
#pragma once

#include <dit/checkpoint.hpp>
#include <memory>

namespace dit {

/// A layer whose weights are packed, those of each block on that block's tape, in the place of the layer: it has no parameters
/// of its own.
template <class Layer>
class FrozenFeedForward {
 public:
  using Scalar = typename Layer::Scalar;
  struct Tape {
    std::shared_ptr<const typename Layer::Frozen> weights;
    typename Layer::Tape tape;

    const auto& plan() const { return tape.plan(); }
  };

  explicit FrozenFeedForward(const Layer& layer) : layer_(layer) {}

  const Layout& layout() const { return layout_; }
  const auto& router() const { return layer_.router(); }
  const Layer& layer() const { return layer_; }
  Tape make_tape(Index /*max_tokens*/, moxie::Keep /*keep*/) const { return {{}, layer_.make_tape(0, moxie::Keep::nothing)}; }
  void forward(ParameterView<const Scalar> /*p*/, const moxie::Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape,
               const moxie::Context& context) const {
    layer_.forward(*tape.weights, in, y, tape.tape, context);
  }

 private:
  Layer layer_;
  Layout layout_;
};

/// A model for inference: the weights of its feed-forwards are packed once, block after block, in the numbers that their
/// experts hold, so that they are never in memory as floats together. Everything else is a `Model`.
template <class Layer>
class FrozenModel {
  using Inner = Model<FrozenFeedForward<Layer>>;

 public:
  using Tape = typename Inner::Tape;

  /// `read(name, view)` gives the weights of each tensor: the reference's name, and where they go.
  template <class Read>
  FrozenModel(const ModelConfig& config, const Layer& layer, const std::string& name, Read&& read, const Exec& exec)
      : model_(config, FrozenFeedForward<Layer>(layer), name), rest_(model_.layout()) {
    read("", rest_);
    moxie::Parameters<float> block(layer.layout());
    for (Index i = 0; i < config.depth; ++i) {
      read("blocks." + std::to_string(i) + "." + name, block);
      blocks_.push_back(std::make_shared<const typename Layer::Frozen>(layer.freeze(block, exec)));
    }
  }

  const ModelConfig& config() const { return model_.config(); }
  const FrozenFeedForward<Layer>& feed_forward(Index block = 0) const { return model_.feed_forward(block); }
  Index parameter_count() const {
    return model_.layout().parameter_count() + config().depth * feed_forward().layer().layout().parameter_count();
  }
  /// All weights but those of the feed-forwards, which `forward` takes.
  const moxie::Parameters<float>& weights() const { return rest_; }
  Tape make_tape(moxie::Keep /*keep*/ = moxie::Keep::nothing) const {
    Tape tape = model_.make_tape();
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      tape.blocks[i].feed_forward.weights = blocks_[i];
    }
    return tape;
  }
  void forward(ParameterView<const float> p, RowView<const float> x, const std::vector<float>& t,
               const std::vector<Index>& labels, RowView<float> v, Tape& tape, const Exec& exec) const {
    model_.forward(p, x, t, labels, v, tape, exec);
  }

 private:
  Inner model_;
  moxie::Parameters<float> rest_;
  std::vector<std::shared_ptr<const typename Layer::Frozen>> blocks_;
};

/// The model of a checkpoint with experts in bfloat16, handed to `f`. Throws SafetensorsError, and ValueError where the experts
/// cannot be.
template <class F>
auto with_bfloat16_model(const SafetensorsFile& file, const TrainingConfig& c, const Exec& exec, F&& f) {
  check_checksums(file);
  with_model(c, [&](const auto& model) {  // names and shapes are those of the whole model
    check_foreign(file, model.config(), model.layout());
    return 0;
  });
  return with_layer<moxie::BFloat16>(c, [&](const auto& layer, const char* name) {
    const std::string prefix = weights_prefix(file);
    const auto read = [&](const std::string& part, moxie::Parameters<float>& to) { load_weights(file, to, prefix + part); };
    return f(FrozenModel<std::decay_t<decltype(layer)>>(shape_of(c), layer, name, read, exec));
  });
}

}  // namespace dit

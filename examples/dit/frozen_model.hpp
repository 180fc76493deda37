// SPDX-License-Identifier: MIT
#pragma once

#include <dit/checkpoint.hpp>
#include <memory>

namespace dit {

/// A layer whose weights are packed, those of each block on that block's tape, in the place of the layer: it has no parameters
/// of its own.
class FrozenFeedForward {
 public:
  using Scalar = float;
  using Layer = moxie::AnyLayer<float>;
  struct Tape {
    Layer::Frozen weights;
    Layer::Tape tape;

    template <class T>
    const T* get_if() const {
      return tape.get_if<T>();
    }
  };

  explicit FrozenFeedForward(Layer layer) : layer_(std::move(layer)) {}

  /// Of its own: none.
  const Layout& layout() const { return layout_; }
  const Layer& layer() const { return layer_; }
  Tape make_tape(Index /*max_tokens*/, moxie::Keep /*keep*/) const { return {{}, layer_.make_tape(0, moxie::Keep::nothing)}; }
  void forward(ParameterView<const float> /*p*/, const moxie::Tokens<float>& in, RowView<float> y, Tape& tape,
               const moxie::Context& context) const {
    layer_.forward(tape.weights, in, y, tape.tape, context);
  }

 private:
  Layer layer_;
  Layout layout_;
};

/// A model for inference: the weights of its feed-forwards are packed once, block after block, in the numbers that their
/// experts hold, so that they are never in memory as floats together. Everything else is a `Model`.
class FrozenModel {
  using Inner = Model<FrozenFeedForward>;

 public:
  using Tape = Inner::Tape;

  /// `read(name, block)` gives the weights of each tensor: the reference's name, and where they go.
  template <class Read>
  FrozenModel(const ModelConfig& config, const moxie::AnyLayer<float>& layer, const std::string& name, Read&& read,
              const Exec& exec)
      : model_(config, FrozenFeedForward(layer), name), rest_(model_.layout()) {
    read("", rest_);
    moxie::Parameters<float> block(layer.layout());
    for (Index i = 0; i < config.depth; ++i) {
      read("blocks." + std::to_string(i) + "." + name, block);
      blocks_.push_back(layer.freeze(block, exec));
    }
  }

  const ModelConfig& config() const { return model_.config(); }
  const moxie::AnyLayer<float>& feed_forward(Index block = 0) const { return model_.feed_forward(block).layer(); }
  Index parameter_count() const {
    return model_.layout().parameter_count() + config().depth * feed_forward().layout().parameter_count();
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
  std::vector<moxie::AnyLayer<float>::Frozen> blocks_;
};

/// The model of a checkpoint with experts in bfloat16. Throws SafetensorsError, and ValueError where the experts cannot be.
inline FrozenModel bfloat16_model_of(const SafetensorsFile& file, const TrainingConfig& c, const Exec& exec) {
  check_checksums(file);
  {
    const auto model = model_of(c);  // names and shapes are those of the whole model
    check_foreign(file, model.config(), model.layout());
  }
  const std::string prefix = weights_prefix(file);
  const auto read = [&](const std::string& part, moxie::Parameters<float>& to) { load_weights(file, to, prefix + part); };
  return {shape_of(c), feed_forward_of(c, ExpertNumbers::bfloat16), feed_forward_name(c), read, exec};
}

}  // namespace dit

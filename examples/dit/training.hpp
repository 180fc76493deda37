// SPDX-License-Identifier: MIT
#pragma once

#include <dit/optimizer.hpp>
#include <dit/rectified_flow.hpp>
#include <map>
#include <moxie/io/safetensors.hpp>
#include <nlohmann/json.hpp>

namespace dit {

/// Everything that decides what a run computes. It is stored in the checkpoint, and a run that goes on must agree with it.
struct TrainingConfig {
  ModelConfig model;
  std::string feed_forward = "shared";  ///< shared, top-k, soft or dense
  Index experts = 8;
  Index top_k = 2;
  Index hidden_dim = 128;         ///< of an expert
  Index shared_hidden_dim = 256;  ///< of the shared experts
  Index slots_per_expert = 1;     ///< soft
  double balance = 0.01;
  Index batch = 48;
  double label_dropout = 0.1;
  double rate = 2e-3;
  std::int64_t warm_up = 200;
  double clip = 1;
  double ema_decay = 0.997;
  std::uint64_t seed = 1;

  nlohmann::json json() const {
    return {{"image_size", model.image_size},
            {"channels", model.channels},
            {"learn_sigma", model.learn_sigma},
            {"qk_norm", model.qk_norm},
            {"patch", model.patch},
            {"dim", model.dim},
            {"depth", model.depth},
            {"heads", model.heads},
            {"classes", model.classes},
            {"feed_forward", feed_forward},
            {"experts", experts},
            {"top_k", top_k},
            {"hidden_dim", hidden_dim},
            {"shared_hidden_dim", shared_hidden_dim},
            {"slots_per_expert", slots_per_expert},
            {"balance", balance},
            {"batch", batch},
            {"label_dropout", label_dropout},
            {"rate", rate},
            {"warm_up", warm_up},
            {"clip", clip},
            {"ema_decay", ema_decay},
            {"seed", seed}};
  }
  /// Throws nlohmann::json::exception for text that is not such a configuration.
  static TrainingConfig from_json(const nlohmann::json& j) {
    TrainingConfig c;
    j.at("image_size").get_to(c.model.image_size);
    j.at("channels").get_to(c.model.channels);
    c.model.learn_sigma = j.value("learn_sigma", false);
    c.model.qk_norm = j.value("qk_norm", false);
    j.at("patch").get_to(c.model.patch);
    j.at("dim").get_to(c.model.dim);
    j.at("depth").get_to(c.model.depth);
    j.at("heads").get_to(c.model.heads);
    j.at("classes").get_to(c.model.classes);
    j.at("feed_forward").get_to(c.feed_forward);
    j.at("experts").get_to(c.experts);
    j.at("top_k").get_to(c.top_k);
    j.at("hidden_dim").get_to(c.hidden_dim);
    j.at("shared_hidden_dim").get_to(c.shared_hidden_dim);
    j.at("slots_per_expert").get_to(c.slots_per_expert);
    j.at("balance").get_to(c.balance);
    j.at("batch").get_to(c.batch);
    j.at("label_dropout").get_to(c.label_dropout);
    j.at("rate").get_to(c.rate);
    j.at("warm_up").get_to(c.warm_up);
    j.at("clip").get_to(c.clip);
    j.at("ema_decay").get_to(c.ema_decay);
    j.at("seed").get_to(c.seed);
    return c;
  }
};

/// The model that a configuration asks for, handed to `f`: its type depends on the feed-forward.
template <class F>
auto with_model(const TrainingConfig& c, F&& f) {
  const Index dim = c.model.dim;
  const moxie::Balance balance{.expert_level = c.balance};
  if (c.feed_forward == "shared") {
    using Layer = moxie::SharedExpertMoE<float>;
    const Layer layer({.model_dim = dim,
                       .experts = c.experts,
                       .top_k = c.top_k,
                       .expert = {.hidden_dim = c.hidden_dim},
                       .shared = {.hidden_dim = c.shared_hidden_dim},
                       .balance = balance});
    return f(Model<Layer>(c.model, layer, "moe."));
  }
  if (c.feed_forward == "top-k") {
    using Layer = moxie::TopKMoE<float>;
    const Layer layer(
        {.model_dim = dim, .experts = c.experts, .top_k = c.top_k, .expert = {.hidden_dim = c.hidden_dim}, .balance = balance});
    return f(Model<Layer>(c.model, layer, "moe."));
  }
  if (c.feed_forward == "soft") {
    using Layer = moxie::SoftMoE<float>;
    const Layer layer({.model_dim = dim,
                       .experts = c.experts,
                       .slots_per_expert = c.slots_per_expert,
                       .expert = {.hidden_dim = c.hidden_dim}});
    return f(Model<Layer>(c.model, layer, "moe."));
  }
  moxie::detail::expect_value(c.feed_forward == "dense", "TrainingConfig", "feed_forward is shared, top-k, soft or dense");
  using Layer = DenseFeedForward<float>;
  return f(Model<Layer>(c.model, Layer({.model_dim = dim, .hidden_dim = c.hidden_dim}), ""));
}

/// What a step says about itself; a row of loss.csv.
struct StepReport {
  float loss;
  float balance_loss;
  float gradient_norm;
};

/// Training state: weights, moments, averages and the history of steps, in one checkpoint file. Step n draws from `seed` and n
/// alone, so a run that goes on from a checkpoint computes what an undisturbed one would.
template <class AnyModel>
class Training {
 public:
  /// `images` is how many the data set has: a run that goes on needs the same set.
  Training(const TrainingConfig& config, const AnyModel& model, std::vector<std::string> class_names, Index images)
      : config_(config),
        class_names_(std::move(class_names)),
        images_(images),
        model_(model),
        weights_(initial(model, config.seed)),
        grads_(weights_.zeros_like()),
        optimizer_({.rate = config.rate, .clip = config.clip, .warm_up = config.warm_up, .ema_decay = config.ema_decay},
                   weights_),
        tape_(model.make_tape()) {}

  std::int64_t steps() const { return optimizer_.steps(); }
  const std::vector<StepReport>& history() const { return history_; }
  const AnyModel& model() const { return model_; }
  /// The averaged weights, which samples are drawn with.
  const moxie::Parameters<float>& averages() { return optimizer_.ema(); }
  typename AnyModel::Tape& tape() { return tape_; }

  /// One step on a batch of its own choice. Throws ValueError if loss or gradient is not finite; the weights are then
  /// unchanged.
  const StepReport& step(RowView<const float> images, const std::vector<std::int64_t>& labels, const Exec& exec) {
    const Rng rng = Rng(config_.seed).split(1).split(std::uint64_t(steps()));
    batch_.draw(images, labels, config_.batch, config_.model.classes, config_.label_dropout, rng, exec);
    v_.resize(config_.batch, config_.model.image_dim());
    dv_.resize(config_.batch, config_.model.image_dim());
    model_.forward(weights_, batch_.images, batch_.times, batch_.labels, v_, tape_, exec);
    const double loss = batch_.loss(v_, dv_);
    moxie::detail::expect_value(std::isfinite(loss), "Training::step", "the loss is not finite");
    set_zero(grads_, exec);
    model_.backward(weights_, dv_, grads_, tape_, exec);
    const double norm = optimizer_.step(weights_, grads_, exec);
    history_.push_back({float(loss), float(tape_.balance_loss()), float(norm)});
    return history_.back();
  }

  /// Writes everything, atomically. Throws SafetensorsError; the old file is then as it was.
  void save(const std::filesystem::path& path) {
    static_assert(sizeof(StepReport) == 3 * sizeof(float));
    moxie::SafetensorsWriter writer;
    writer.add_parameters(weights_, "weights.");
    writer.add_parameters(optimizer_.ema(), "ema.");
    writer.add_parameters(optimizer_.m(), "m.");
    writer.add_parameters(optimizer_.v(), "v.");
    const auto* values = reinterpret_cast<const float*>(history_.data());
    writer.add("history", {Index(history_.size()), 3}, std::span<const float>(values, 3 * history_.size()));
    writer.metadata("format", "moxie dit 1");
    writer.metadata("config", config_.json().dump());
    for (std::size_t i = 0; i < class_names_.size(); ++i) {
      writer.metadata("class." + std::to_string(i), class_names_[i]);
    }
    writer.metadata("images", std::to_string(images_));
    writer.metadata("steps", std::to_string(steps()));
    writer.save(path);
  }

  /// Goes on from a file. Throws SafetensorsError if it is not a checkpoint of this configuration and data set; nothing has
  /// changed then.
  void load(const moxie::SafetensorsFile& file) {
    const std::int64_t steps = file.info("history").shape.empty() ? -1 : file.info("history").shape.front();
    file.expect<float>("history", std::array<Index, 2>{steps, 3});
    const auto said = file.metadata().find("steps");
    if (said == file.metadata().end() || said->second != std::to_string(steps)) {
      throw moxie::SafetensorsError(file.path().string() + ": its history is not as long as its number of steps");
    }
    const auto expect_entry = [&](const std::string& key, const std::string& expected) {
      const auto entry = file.metadata().find(key);
      if (entry == file.metadata().end() || entry->second != expected) {
        throw moxie::SafetensorsError(file.path().string() + ": was trained on another data set: its " + key + " is '" +
                                      (entry == file.metadata().end() ? "" : entry->second) + "', here it is '" + expected +
                                      "'");
      }
    };
    expect_entry("images", std::to_string(images_));
    for (std::size_t i = 0; i < class_names_.size(); ++i) {
      expect_entry("class." + std::to_string(i), class_names_[i]);
    }
    const auto blocks = std::array{std::pair{"weights.", &weights_}, std::pair{"ema.", &optimizer_.ema()},
                                   std::pair{"m.", &optimizer_.m()}, std::pair{"v.", &optimizer_.v()}};
    for (const auto& [prefix, block] : blocks) {
      moxie::check_parameters(file, *block, prefix);
    }
    const std::vector<float> history = file.read<float>("history");
    for (const auto& [prefix, block] : blocks) {
      moxie::load_parameters(file, *block, prefix);
    }
    history_.resize(std::size_t(steps));
    for (std::size_t i = 0; i < history_.size(); ++i) {
      history_[i] = {history[3 * i], history[3 * i + 1], history[3 * i + 2]};
    }
    optimizer_.set_steps(steps);
  }

 private:
  static moxie::Parameters<float> initial(const AnyModel& model, std::uint64_t seed) {
    moxie::Parameters<float> p(model.layout());
    model.initialize(p, Rng(seed).split(0));
    return p;
  }

  TrainingConfig config_;
  std::vector<std::string> class_names_;
  Index images_;
  AnyModel model_;
  moxie::Parameters<float> weights_;
  moxie::Parameters<float> grads_;
  AdamW<float> optimizer_;
  std::vector<StepReport> history_;
  typename AnyModel::Tape tape_;
  FlowBatch<float> batch_;
  Matrix<float> v_;
  Matrix<float> dv_;
};

/// The configuration that a checkpoint was trained with. Throws SafetensorsError if the file has none.
inline TrainingConfig config_of(const moxie::SafetensorsFile& file) {
  const auto text = file.metadata().find("config");
  try {
    if (text != file.metadata().end()) {
      return TrainingConfig::from_json(nlohmann::json::parse(text->second));
    }
  } catch (const nlohmann::json::exception& error) {
    throw moxie::SafetensorsError(file.path().string() + ": its configuration cannot be read: " + error.what());
  }
  throw moxie::SafetensorsError(file.path().string() + ": is not a checkpoint of this program");
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <deque>
#include <dit/checkpoint.hpp>
#include <dit/data_set.hpp>
#include <dit/process.hpp>
#include <nn/adamw.hpp>

namespace dit {

/// What a step says about itself.
struct StepReport {
  float loss;
  float balance_loss;
  float gradient_norm;
  float max_load;  ///< of the busiest expert, in multiples of an even share; the mean over the layers, 1 without experts
};

/// Tells when a loss has left where it was: the mean of the last steps, as many as have 480 images and at least 10, is `factor`
/// times the lowest such mean before. A factor of 0 never tells.
class SpikeGuard {
 public:
  SpikeGuard(double factor, Index batch) : factor_(factor), window_(std::size_t(std::max<Index>(10, 480 / batch))) {}

  /// Whether it has with this loss.
  bool add(double loss) {
    last_.push_back(loss);
    if (last_.size() > window_) {
      last_.pop_front();
    }
    if (last_.size() < window_) {
      return false;
    }
    mean_ = std::accumulate(last_.begin(), last_.end(), 0.0) / double(window_);
    lowest_ = std::min(lowest_, mean_);
    return factor_ > 0 && mean_ >= factor_ * lowest_;
  }
  /// Whether it may be on its way: the mean is √factor times the lowest. What is saved then should not replace anything.
  bool rising() const { return factor_ > 0 && mean_ >= std::sqrt(factor_) * lowest_; }

 private:
  double factor_;
  std::size_t window_;
  std::deque<double> last_;
  double mean_ = 0;
  double lowest_ = std::numeric_limits<double>::infinity();
};

/// Training state: weights, moments, averages and the history of steps, in one checkpoint file. Step n draws from `seed` and n
/// alone, so a run that goes on from a checkpoint computes what an undisturbed one would. Model and data have to live as long.
template <class AnyModel>
class Training {
 public:
  /// Throws ValueError if the data set is not of the model's images and classes, or if micro-batches do not make up the batch.
  Training(const TrainingConfig& config, const AnyModel& model, const DataSet& data)
      : config_(config),
        process_(process_of(config)),
        data_(data),
        identity_(identity_of(data)),
        model_(model),
        weights_(initial(model, config.recipe.seed)),
        grads_(weights_.zeros_like()),
        optimizer_(config.recipe.optimizer, weights_),
        tape_(model.make_tape()) {
    const Recipe& recipe = config.recipe;
    moxie::detail::expect_value(
        data.images.cols() == model.config().image_dim() && Index(data.class_names.size()) == model.config().classes,
        "Training", "the model is for other images or classes than the data set has");
    moxie::detail::expect_value(recipe.batch >= 1 && recipe.micro_batch >= 0 && recipe.batch % micro_batch() == 0, "Training",
                                "the batch, " + std::to_string(recipe.batch) + ", must be a multiple of the micro-batch, " +
                                    std::to_string(recipe.micro_batch));
    moxie::detail::expect_value(
        config.process != "ddpm" || model.config().switch_experts == 0 || model.config().timesteps == config.diffusion_steps,
        "Training", "the prior tells other timesteps apart than the diffusion has");
  }

  std::int64_t steps() const { return optimizer_.steps(); }
  const std::vector<StepReport>& history() const { return history_; }
  const Process& process() const { return process_; }
  /// The averaged weights, which samples are drawn with.
  const moxie::Parameters<float>& averages() { return optimizer_.ema(); }

  /// One step on a batch of its own choice. Micro-batches are computed one after the other, and the step is that of the mean of
  /// their losses: that of the whole batch, but for the balance losses, which are each of its own images. Throws ValueError if
  /// loss or gradient is not finite; the weights are then unchanged.
  const StepReport& step(const Exec& exec) {
    StepReport report = compute(exec);
    report.gradient_norm = float(optimizer_.step(weights_, grads_, exec));
    update_selection_biases();
    history_.push_back(report);
    return history_.back();
  }
  /// Computes the next step without taking it: whether there is the memory for it is known then. Throws as `step` does.
  void rehearse(const Exec& exec) { compute(exec); }

 private:
  // The gradients of the next step.
  StepReport compute(const Exec& exec) {
    const Recipe& recipe = config_.recipe;
    const Rng rng = Rng(recipe.seed).split(1).split(std::uint64_t(steps()));
    batch_.draw(process_, recipe.stratified, data_.images, data_.labels, recipe.batch, config_.model.classes,
                recipe.label_dropout, rng, exec);
    const Index part = micro_batch();
    const Index count = recipe.batch / part;
    const auto parts = float(count);
    v_.resize(part, model_.config().output_dim());
    dv_.resize(part, model_.config().output_dim());
    nn::set_zero(grads_, exec);
    model_.match_prior(weights_, tape_, exec);
    chosen_.assign(tape_.blocks.size(), {});
    StepReport report{};
    for (Index first = 0; first < recipe.batch; first += part) {
      const auto range = [&](const auto& all) { return std::decay_t<decltype(all)>(&all[0] + first, &all[0] + first + part); };
      model_.forward(weights_, RowView<const float>(batch_.images).middle_rows(first, part), range(batch_.times),
                     range(batch_.labels), v_, tape_, exec);
      const double loss = batch_.loss(process_, first, v_, dv_);
      moxie::detail::expect_value(std::isfinite(loss), "Training::step", "the loss is not finite");
      model_.backward(weights_, dv_, grads_, tape_, exec);
      report.loss += float(loss) / parts;
      report.balance_loss += float(tape_.balance_loss()) / parts;
      report.max_load += max_load() / parts;
      count_choices();
    }
    if (parts > 1) {
      nn::scale(grads_, 1 / parts, exec);
    }
    return report;
  }

 public:
  /// Writes everything, atomically. Throws SafetensorsError, and ValueError if a weight is not finite; the old file is then as
  /// it was.
  void save(const std::filesystem::path& path) {
    moxie::detail::expect_value(weights_.flat().isFinite().all(), "Training::save", "a weight is not finite");
    static_assert(sizeof(StepReport) == 4 * sizeof(float));
    CheckpointWriter writer;
    writer.add(weights_);
    writer.add_position_embedding(model_.config());
    writer.add(optimizer_.ema(), "ema.");
    writer.add(optimizer_.m(), "m.");
    writer.add(optimizer_.v(), "v.");
    const auto* values = reinterpret_cast<const float*>(history_.data());
    writer.add("history", {Index(history_.size()), 4}, std::span<const float>(values, 4 * history_.size()));
    writer.config(config_);
    for (const auto& [key, value] : identity_) {
      writer.metadata(key, value);
    }
    writer.metadata("steps", std::to_string(steps()));
    writer.save(path);
  }

  /// Goes on from a file. Throws SafetensorsError if it is not a checkpoint of this configuration and data set; nothing has
  /// changed then, unless somebody changes the file at the same time.
  void load(const SafetensorsFile& file) {
    check_checksums(file);
    check_foreign(file, model_.config(), model_.layout());
    const std::int64_t steps = file.info("history").shape.empty() ? -1 : file.info("history").shape.front();
    file.expect<float>("history", std::array<Index, 2>{steps, 4});
    const auto said = file.metadata().find("steps");
    if (said == file.metadata().end() || said->second != std::to_string(steps)) {
      detail::fail(file, "its history is not as long as its number of steps");
    }
    for (const auto& [key, expected] : identity_) {
      const auto entry = file.metadata().find(key);
      const std::string found = entry == file.metadata().end() ? "" : entry->second;
      if (found != expected) {
        detail::fail(file, "was trained on another data set: its " + moxie::printable(key) + " is '" + moxie::printable(found) +
                               "', here it is '" + moxie::printable(expected) + "'");
      }
    }
    const auto blocks = std::array{std::pair{"", &weights_}, std::pair{"ema.", &optimizer_.ema()},
                                   std::pair{"m.", &optimizer_.m()}, std::pair{"v.", &optimizer_.v()}};
    for (const auto& [prefix, block] : blocks) {
      check_weights(file, block->layout(), prefix);
    }
    const std::vector<float> history = file.read<float>("history");
    for (const auto& [prefix, block] : blocks) {
      detail::copy_weights(file, *block, prefix);
    }
    history_.resize(std::size_t(steps));
    for (std::size_t i = 0; i < history_.size(); ++i) {
      history_[i] = {history[4 * i], history[4 * i + 1], history[4 * i + 2], history[4 * i + 3]};
    }
    optimizer_.set_steps(steps);
  }

  /// Starts from the weights of another checkpoint of the same shape (a converted reference, an upcycled model). Throws
  /// SafetensorsError; nothing has changed then.
  void start_from(const SafetensorsFile& file) {
    weights_ = load_model(file, model_.config(), model_.layout());
    optimizer_.ema() = weights_;
  }

 private:
  static moxie::Parameters<float> initial(const AnyModel& model, std::uint64_t seed) {
    moxie::Parameters<float> p(model.layout());
    model.initialize(p, Rng(seed).split(0));
    return p;
  }
  Index micro_batch() const {
    const Recipe& recipe = config_.recipe;
    return recipe.micro_batch == 0 ? recipe.batch : recipe.micro_batch;
  }

  static constexpr const char* selection_bias = "gate.e_score_correction_bias";
  bool has_selection_bias(std::size_t block) const {
    return config_.recipe.bias_rate > 0 && model_.feed_forward(Index(block)).layout().find(selection_bias) >= 0;
  }
  // How often each expert of each block was chosen, in this batch.
  void count_choices() {
    for (std::size_t block = 0; block < chosen_.size(); ++block) {
      const auto* const router = top_k_tape(tape_.blocks[block].feed_forward);
      if (router != nullptr && has_selection_bias(block)) {
        const std::vector<std::int64_t> counts = router->times_chosen();
        chosen_[block].resize(counts.size());
        std::transform(counts.begin(), counts.end(), chosen_[block].begin(), chosen_[block].begin(), std::plus<>());
      }
    }
  }
  void update_selection_biases() {
    for (std::size_t block = 0; block < chosen_.size(); ++block) {
      if (has_selection_bias(block)) {
        moxie::update_selection_bias(model_.feed_forward_part(weights_.view(), Index(block))[selection_bias],
                                     std::span<const std::int64_t>(chosen_[block]), config_.recipe.bias_rate);
      }
    }
  }

  float max_load() const {
    double sum = 0;
    for (const auto& block : tape_.blocks) {
      sum += 1 + block.feed_forward.statistics().max_violation;
    }
    return float(sum / double(tape_.blocks.size()));
  }

  TrainingConfig config_;
  Process process_;
  const DataSet& data_;
  std::map<std::string, std::string> identity_;
  const AnyModel& model_;
  moxie::Parameters<float> weights_;
  moxie::Parameters<float> grads_;
  nn::AdamW<float> optimizer_;
  std::vector<StepReport> history_;
  typename AnyModel::Tape tape_;
  Batch<float> batch_;
  std::vector<std::vector<std::int64_t>> chosen_;  // of each block, where a bias balances the load
  Matrix<float> v_;
  Matrix<float> dv_;
};

}  // namespace dit

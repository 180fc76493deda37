// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <dit/commands.hpp>
#include <dit/data_set.hpp>
#include <dit/drawing.hpp>
#include <dit/output_folder.hpp>
#include <dit/text.hpp>
#include <dit/training_log.hpp>

namespace dit::commands {

namespace {

Series curve(const std::string& name, const std::vector<StepReport>& history, float StepReport::*value) {
  Series series{name, {}, {}};
  for (std::size_t i = 0; i < history.size(); ++i) {
    series.x.push_back(double(i + 1));
    series.y.push_back(double(history[i].*value));
  }
  return series;
}

/// What does not look as data should.
void print_data(const DataSet& data, bool latents) {
  const float low = data.images.minCoeff();
  std::cout << "Data: " << terminal_text(data.origin) << ", values from " << low << " to " << data.images.maxCoeff() << "\n";
  if (latents) {
    std::cout << "They are taken for latents: pixels have 1 or 3 channels and values in [-1,1]\n";
  } else if (low >= 0) {
    std::cout << "Note: no value is below 0, and pixels are expected in [-1,1]\n";
  }
  std::vector<bool> seen(data.class_names.size());
  for (const std::int64_t label : data.labels) {
    seen[std::size_t(label)] = true;
  }
  if (const auto none = std::find(seen.begin(), seen.end(), false); none != seen.end()) {
    std::cout << "Note: " << std::count(none, seen.end(), false) << " of " << seen.size() << " classes have no image, '"
              << shown(data.class_names[std::size_t(none - seen.begin())]) << "' the first of them\n";
  }
}

/// Gives the model the shape of the images. A model that has weights already must have it, and may know more classes.
void fit(TrainingConfig& config, DataSet& data, const TrainingOptions& options, bool resumed) {
  while ((options.start_from || resumed) && Index(data.class_names.size()) < config.model.classes) {
    data.class_names.push_back("class " + std::to_string(data.class_names.size()));
  }
  const TrainingConfig before = config;
  config.model.image_size = data.height;
  config.model.channels = data.channels;
  config.model.classes = Index(data.class_names.size());
  const std::string text = differences(before, config);
  if (options.start_from && !text.empty()) {
    throw std::runtime_error(options.start_from->string() + ": its model is for other images: " + text);
  }
  config.latents = (data.channels != 1 && data.channels != 3) || data.images.cwiseAbs().maxCoeff() > 1.0F;
  print_data(data, config.latents);
  if (data.height != data.width) {
    throw std::runtime_error("images must be square, and in the order (N,C,H,W): " + data.origin);
  }
  if (config.latents && options.draw_every > 0) {
    throw std::runtime_error("--draw-every: latents are no pixels, which could be drawn");
  }
}

/// Throws std::runtime_error where a run would overwrite what it reads, or begin where another one ended.
void expect_free_folder(const OutputFolder& files, const TrainingOptions& options) {
  for (const std::optional<fs::path>& read : {options.data, options.start_from}) {
    if (read && fs::exists(*read)) {
      expect_another_file(*read, files("samples.safetensors"));
    }
  }
  const fs::path checkpoint = files("checkpoint.safetensors");
  if (!options.resume && fs::exists(checkpoint)) {
    throw std::runtime_error(checkpoint.string() + " exists: go on with --resume, or choose another --out");
  }
}

void print_model(const TrainingConfig& config, Index parameters, const Exec& exec) {
  std::cout << "Model: " << config.feed_forward << ", " << parameters << " parameters, " << exec.thread_count() << " threads\n";
  const moxie::kernel::InstructionSet built = moxie::kernel::built_for();
  const moxie::kernel::InstructionSet machine = moxie::kernel::machine_offers();
  if (machine != built) {
    std::cout << "Built for " << built.name << ", but this machine has " << machine.name
              << ": the preset `release` makes a faster program\n";
  }
}

/// A training in its folder, from its first files to its last.
template <class AnyModel>
class Run {
 public:
  Run(const TrainingConfig& config, const TrainingOptions& options, const DrawingOptions& drawing, const OutputFolder& files,
      const AnyModel& model, const DataSet& data, const Exec& exec)
      : config_(config),
        options_(options),
        drawing_(drawing),
        files_(files),
        checkpoint_(files("checkpoint.safetensors")),
        model_(model),
        data_(data),
        exec_(exec),
        training_(config, model, data),
        guard_(options.spike, config.recipe.batch) {}

  /// Everything that could stop the run later is found out now: a sampler or a class that cannot be, another data set, want of
  /// memory or of room.
  void begin(bool resumed) {
    const auto drawn = std::uintmax_t(drawing_.labels(config_.model.classes).size());
    [[maybe_unused]] const Sampler<AnyModel, float> checked(training_.process(), drawing_.sampler_for(config_), model_);
    if (resumed) {
      go_on();
    } else if (options_.start_from) {
      training_.start_from(SafetensorsFile(*options_.start_from));
    }
    if (training_.steps() < options_.steps) {
      training_.rehearse(exec_);
    }
    // A second checkpoint is complete before the first one goes.
    const auto bytes = 4 * sizeof(float) * std::uintmax_t(model_.layout().parameter_count());
    const auto samples = drawn * sizeof(float) * std::uintmax_t(config_.model.image_dim());
    files_.expect_room_for("checkpoint.safetensors", (resumed ? 1 : 2) * bytes + samples);
    files_.expect_room_for("samples.safetensors", 0);
    log_.emplace(files_("log.jsonl"), training_.steps());
    if (!resumed) {
      training_.save(checkpoint_);
    }
    print_model(config_, model_.layout().parameter_count(), exec_);
    for (const StepReport& report : training_.history()) {
      guard_.add(double(report.loss));
    }
    saved_ = training_.steps();
    progress_.emplace(ProgressOptions{.steps = std::max(options_.steps, training_.steps()),
                                      .first_step = training_.steps(),
                                      .images_per_step = config_.recipe.batch});
  }

  /// Trains to the last step, or until it is interrupted. Returns the exit status.
  int train() {
    while (training_.steps() < options_.steps && interrupted == 0) {
      step();
      if (training_.steps() < options_.steps && training_.steps() % options_.checkpoint_every == 0) {
        save();
      }
      if (options_.draw_every > 0 && training_.steps() < options_.steps && training_.steps() % options_.draw_every == 0) {
        draw_some();
      }
    }
    progress_->finish();
    const fs::path last = save();
    if (interrupted != 0) {
      std::cout << "Interrupted at step " << training_.steps() << "; --resume goes on from step " << saved_ << "\n";
      return 130;
    }
    std::cout << "Written:\n  " << last.string() << "\n  " << files_("log.jsonl").string() << "\n";
    return 0;
  }

  /// Draws what the run has learned, and what became of its loss.
  void finish() {
    const std::vector<StepReport>& history = training_.history();
    const Series loss = curve("loss", history, &StepReport::loss);
    if (!loss.x.empty()) {
      draw_or_say(files_("loss.png"), [&](const fs::path& path) { draw_curve(path, "Training loss", "step", {loss}); });
    }
    Report report;
    report.title = "Training of a diffusion transformer";
    report.facts = {{"Data", data_.origin},
                    {"Process", config_.process},
                    {"Feed-forward", config_.feed_forward},
                    {"Parameters", std::to_string(model_.layout().parameter_count())},
                    {"Steps", std::to_string(training_.steps()) + " of " + std::to_string(config_.recipe.batch) + " images"}};
    report.curves.push_back({"Training loss", "step", "loss", {loss}});
    report.curves.push_back(
        {"Balance loss", "step", "balance loss", {curve("balance loss", history, &StepReport::balance_loss)}});
    report.curves.push_back(
        {"Load of the busiest expert", "step", "multiples of an even share", {curve("load", history, &StepReport::max_load)}});
    write_drawing(draw(model_, training_.averages().view(), config_, drawing_, exec_), config_, data_.class_names, files_,
                  report);
  }

 private:
  void go_on() {
    const SafetensorsFile file(checkpoint_);
    if (const std::string text = differences(config_of(file), config_); !text.empty()) {
      throw std::runtime_error(checkpoint_.string() + " was trained with other options: " + text);
    }
    training_.load(file);  // refuses another data set
    std::cout << "Going on from step " << training_.steps() << "\n";
  }

  void step() {
    const auto good = [&] { return "; " + checkpoint_.string() + " is the last good checkpoint"; };
    const auto start = std::chrono::steady_clock::now();
    StepReport report{};
    try {
      report = training_.step(exec_);
    } catch (const moxie::ValueError& error) {
      throw std::runtime_error("step " + std::to_string(training_.steps() + 1) + ": " + error.what() + good());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const bool spike = guard_.add(double(report.loss));
    try {
      log_->add(training_.steps(), report, double(config_.recipe.batch) / seconds.count());
    } catch (const std::runtime_error&) {
      save();
      throw;
    }
    progress_->update(training_.steps(), double(report.loss), double(report.balance_loss), double(report.max_load));
    if (spike) {
      throw std::runtime_error("step " + std::to_string(training_.steps()) + ": the loss has risen to " +
                               general(options_.spike, 6) + " times what it was" + good() +
                               " (--spike 0 goes on whatever happens)");
    }
  }

  /// While the loss rises, beside the last good checkpoint. Returns where.
  fs::path save() {
    fs::path path = guard_.rising() ? files_("rising.safetensors") : checkpoint_;
    std::error_code ignored;
    fs::remove(files_("rising.safetensors"), ignored);  // an older one: there is room for two
    training_.save(path);
    if (guard_.rising()) {
      progress_->finish();
      std::cout << "The loss is rising: step " << training_.steps() << " is in " << path.string() << ", "
                << checkpoint_.string() << " stays that of step " << saved_ << "\n";
    } else {
      saved_ = training_.steps();
    }
    return path;
  }

  /// An interruption ends the drawing, and then the training, which saves its state.
  void draw_some() {
    progress_->finish();
    DrawingOptions few = drawing_;
    few.per_class = std::min(drawing_.per_class, Index{8});
    try {
      draw_or_say(files_("samples-" + std::to_string(training_.steps()) + ".png"), [&](const fs::path& path) {
        draw_grid(path, draw(model_, training_.averages().view(), config_, few, exec_), config_, data_.class_names);
      });
    } catch (const Interrupted& reason) {
      std::cout << reason.what() << "\n";
    }
  }

  const TrainingConfig& config_;
  const TrainingOptions& options_;
  const DrawingOptions& drawing_;
  const OutputFolder& files_;
  const fs::path checkpoint_;
  const AnyModel& model_;
  const DataSet& data_;
  const Exec& exec_;
  Training<AnyModel> training_;
  SpikeGuard guard_;
  std::int64_t saved_ = 0;  // the step of the checkpoint
  std::optional<TrainingLog> log_;
  std::optional<Progress> progress_;
};

}  // namespace

int train(TrainingConfig config, const TrainingOptions& options, const DrawingOptions& drawing, const fs::path& folder,
          const Exec& exec) {
  const OutputFolder files(folder);
  expect_free_folder(files, options);
  DataSet data = load_data_set(options.data);
  const bool resumed = options.resume && fs::exists(files("checkpoint.safetensors"));
  fit(config, data, options, resumed);
  const auto model = model_of(config);
  Run run(config, options, drawing, files, model, data, exec);
  run.begin(resumed);
  const int status = run.train();
  if (status == 0) {
    run.finish();
  }
  return status;
}

}  // namespace dit::commands

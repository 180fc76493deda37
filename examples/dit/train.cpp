// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <dit/commands.hpp>
#include <dit/data_set.hpp>
#include <dit/drawing.hpp>
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

/// The only run in a folder, as long as it lives. Throws std::runtime_error where there is another one.
class FolderLock {
 public:
  explicit FolderLock(const fs::path& folder) : descriptor_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (descriptor_ >= 0 && ::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(descriptor_);
      throw std::runtime_error(folder.string() + ": another run is going on in this folder");
    }
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  ~FolderLock() {
    if (descriptor_ >= 0) {
      ::close(descriptor_);
    }
  }

 private:
  int descriptor_;
};

/// What a run that was killed while it saved has left.
void remove_cut_off_saves(const fs::path& folder) {
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".moxie-") && name.ends_with(".tmp")) {
      fs::remove(entry.path());
    }
  }
}

}  // namespace

TrainingConfig started_from(const fs::path& path, const ForeignOptions& foreign, const TrainingConfig& run) {
  TrainingConfig config = config_of(moxie::SafetensorsFile(path), foreign);
  config.balance = run.balance;
  config.times = run.times;
  config.stratified = run.stratified;
  config.batch = run.batch;
  config.micro_batch = run.micro_batch;
  config.label_dropout = run.label_dropout;
  config.rate = run.rate;
  config.warm_up = run.warm_up;
  config.weight_decay = run.weight_decay;
  config.clip = run.clip;
  config.ema_decay = run.ema_decay;
  config.seed = run.seed;
  return config;
}

int train(TrainingConfig config, const TrainingOptions& options, const DrawingOptions& drawing, const Files& files,
          const Exec& exec) {
  fs::create_directories(files.folder);
  const fs::path checkpoint = files("checkpoint.safetensors");
  const FolderLock lock(files.folder);
  if (options.data && fs::exists(*options.data) && fs::exists(files("samples.safetensors")) &&
      fs::equivalent(*options.data, files("samples.safetensors"))) {
    throw std::runtime_error(options.data->string() + " would be overwritten by the samples of this run: choose another --out");
  }
  if (!options.resume && fs::exists(checkpoint)) {
    throw std::runtime_error(checkpoint.string() + " exists: go on with --resume, or choose another --out");
  }
  const DataSet data = load_data_set(options.data);
  std::cout << "Data: " << data.origin << "\n";
  ModelConfig images = config.model;
  images.image_size = data.height;
  images.channels = data.channels;
  images.classes = Index(data.class_names.size());
  if (options.start_from && nlohmann::json(images) != nlohmann::json(config.model)) {
    throw std::runtime_error(options.start_from->string() +
                             ": its model is for other images: " + nlohmann::json::diff(config.model, images).dump());
  }
  config.model = images;
  config.latents = (data.channels != 1 && data.channels != 3) || data.images.cwiseAbs().maxCoeff() > 1.0F;
  if (data.height != data.width) {
    throw std::runtime_error("images must be square: " + data.origin);
  }
  return with_model(config, [&](const auto& model) {
    using AnyModel = std::decay_t<decltype(model)>;
    Training training(config, model, data.class_names, data.count());
    // A sampler or a class that cannot be is found out now.
    static_cast<void>(drawing.labels(config.model.classes));
    [[maybe_unused]] const Sampler<AnyModel, float> checked(training.process(), drawing.sampler_for(training.process()), model);
    remove_cut_off_saves(files.folder);
    const bool resumed = options.resume && fs::exists(checkpoint);
    if (resumed) {
      const moxie::SafetensorsFile file(checkpoint);
      const nlohmann::json now = config;
      const nlohmann::json before = config_of(file);
      if (before != now) {
        throw std::runtime_error(checkpoint.string() +
                                 " was trained with other options: " + nlohmann::json::diff(now, before).dump());
      }
      training.load(file);  // refuses another data set
      std::cout << "Going on from step " << training.steps() << "\n";
    } else if (options.start_from) {
      training.start_from(moxie::SafetensorsFile(*options.start_from));
    }
    TrainingLog log(files("log.jsonl"), training.steps());
    if (!resumed) {
      training.save(checkpoint);  // a folder that cannot be written is found out now
    }
    std::cout << "Model: " << config.feed_forward << ", " << model.layout().parameter_count() << " parameters, "
              << exec.thread_count() << " threads\n";
    const moxie::kernel::InstructionSet built = moxie::kernel::built_for();
    const moxie::kernel::InstructionSet machine = moxie::kernel::machine_offers();
    if (machine != built) {
      std::cout << "Built for " << built.name << ", but this machine has " << machine.name
                << ": the preset `release` makes a faster program\n";
    }
    SpikeGuard guard(options.spike);
    for (const StepReport& report : training.history()) {
      guard.add(double(report.loss));
    }
    Progress progress({.steps = options.steps, .first_step = training.steps(), .images_per_step = config.batch});
    const auto good = [&] { return "; " + checkpoint.string() + " is the last good checkpoint"; };
    while (training.steps() < options.steps && interrupted == 0) {
      const auto start = std::chrono::steady_clock::now();
      StepReport report{};
      try {
        report = training.step(data.images, data.labels, exec);
      } catch (const moxie::ValueError& error) {
        throw std::runtime_error("step " + std::to_string(training.steps() + 1) + ": " + error.what() + good());
      }
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      log.add(training.steps(), report, double(config.batch) / seconds.count());
      progress.update(training.steps(), double(report.loss), double(report.balance_loss), double(report.max_load));
      if (guard.add(double(report.loss))) {
        throw std::runtime_error("step " + std::to_string(training.steps()) + ": the loss has risen to " +
                                 std::to_string(options.spike) + " times what it was" + good() +
                                 " (--spike 0 goes on whatever happens)");
      }
      if (training.steps() % options.checkpoint_every == 0 && !guard.rising()) {
        training.save(checkpoint);
      }
      if (options.draw_every > 0 && training.steps() % options.draw_every == 0 && training.steps() < options.steps) {
        progress.finish();
        DrawingOptions few = drawing;
        few.per_class = std::min(drawing.per_class, Index{8});
        const std::string name = "samples-" + std::to_string(training.steps()) + ".png";
        draw_or_say(files(name), [&](const fs::path& path) {
          draw_grid(path, draw(model, training.averages().view(), config, few, exec), config, data.class_names);
        });
      }
    }
    progress.finish();
    training.save(checkpoint);
    if (interrupted != 0) {
      std::cout << "Interrupted at step " << training.steps() << "; --resume goes on from there\n";
      return 130;
    }
    std::cout << "Written:\n  " << checkpoint.string() << "\n  " << files("log.jsonl").string() << "\n";
    const Series loss = curve("loss", training.history(), &StepReport::loss);
    draw_or_say(files("loss.png"), [&](const fs::path& path) { draw_curve(path, "Training loss", "step", {loss}); });
    Report report;
    report.title = "Training of a diffusion transformer";
    report.facts = {{"Data", data.origin},
                    {"Process", config.process},
                    {"Feed-forward", config.feed_forward},
                    {"Parameters", std::to_string(model.layout().parameter_count())},
                    {"Steps", std::to_string(training.steps()) + " of " + std::to_string(config.batch) + " images"}};
    report.curves.push_back({"Training loss", "step", "loss", {loss}});
    report.curves.push_back(
        {"Balance loss", "step", "balance loss", {curve("balance loss", training.history(), &StepReport::balance_loss)}});
    report.curves.push_back({"Load of the busiest expert",
                             "step",
                             "multiples of an even share",
                             {curve("load", training.history(), &StepReport::max_load)}});
    write_drawing(draw(model, training.averages().view(), config, drawing, exec), config, data.class_names, files, report);
    return 0;
  });
}

}  // namespace dit::commands

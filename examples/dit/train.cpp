// SPDX-License-Identifier: MIT
#include <chrono>
#include <dit/commands.hpp>
#include <dit/data_set.hpp>
#include <dit/drawing.hpp>
#include <dit/output_folder.hpp>
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
  std::cout << "Data: " << data.origin << ", values from " << low << " to " << data.images.maxCoeff() << "\n";
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
              << data.class_names[std::size_t(none - seen.begin())] << "' the first of them\n";
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

}  // namespace

int train(TrainingConfig config, const TrainingOptions& options, const DrawingOptions& drawing, const fs::path& folder,
          const Exec& exec) {
  const OutputFolder files(folder);
  const fs::path checkpoint = files("checkpoint.safetensors");
  for (const std::optional<fs::path>& read : {options.data, options.start_from}) {
    if (read && fs::exists(*read)) {
      expect_another_file(*read, files("samples.safetensors"));
    }
  }
  if (!options.resume && fs::exists(checkpoint)) {
    throw std::runtime_error(checkpoint.string() + " exists: go on with --resume, or choose another --out");
  }
  DataSet data = load_data_set(options.data);
  const bool resumed = options.resume && fs::exists(checkpoint);
  fit(config, data, options, resumed);
  return with_model(config, [&](const auto& model) {
    using AnyModel = std::decay_t<decltype(model)>;
    Training training(config, model, data);
    // A sampler or a class that cannot be is found out now.
    const auto drawn = std::uintmax_t(drawing.labels(config.model.classes).size());
    [[maybe_unused]] const Sampler<AnyModel, float> checked(training.process(), drawing.sampler_for(config), model);
    if (resumed) {
      const moxie::SafetensorsFile file(checkpoint);
      if (const std::string text = differences(config_of(file), config); !text.empty()) {
        throw std::runtime_error(checkpoint.string() + " was trained with other options: " + text);
      }
      training.load(file);  // refuses another data set
      std::cout << "Going on from step " << training.steps() << "\n";
    } else if (options.start_from) {
      training.start_from(moxie::SafetensorsFile(*options.start_from));
    }
    // And so is want of memory, or of room for a second checkpoint, which is complete before the first goes, and samples.
    if (training.steps() < options.steps) {
      training.rehearse(exec);
    }
    const auto bytes = 4 * sizeof(float) * std::uintmax_t(model.layout().parameter_count());
    const auto samples = drawn * sizeof(float) * std::uintmax_t(config.model.image_dim());
    files.expect_room_for("checkpoint.safetensors", (resumed ? 1 : 2) * bytes + samples);
    files.expect_room_for("samples.safetensors", 0);
    TrainingLog log(files("log.jsonl"), training.steps());
    if (!resumed) {
      training.save(checkpoint);
    }
    std::cout << "Model: " << config.feed_forward << ", " << model.layout().parameter_count() << " parameters, "
              << exec.thread_count() << " threads\n";
    const moxie::kernel::InstructionSet built = moxie::kernel::built_for();
    const moxie::kernel::InstructionSet machine = moxie::kernel::machine_offers();
    if (machine != built) {
      std::cout << "Built for " << built.name << ", but this machine has " << machine.name
                << ": the preset `release` makes a faster program\n";
    }
    SpikeGuard guard(options.spike, config.recipe.batch);
    for (const StepReport& report : training.history()) {
      guard.add(double(report.loss));
    }
    Progress progress({.steps = std::max(options.steps, training.steps()),
                       .first_step = training.steps(),
                       .images_per_step = config.recipe.batch});
    std::int64_t saved = training.steps();
    // While the loss rises, beside the last good checkpoint. Returns where.
    const auto save = [&] {
      fs::path path = guard.rising() ? files("rising.safetensors") : checkpoint;
      std::error_code ignored;
      fs::remove(files("rising.safetensors"), ignored);  // an older one: there is room for two
      training.save(path);
      if (guard.rising()) {
        progress.finish();
        std::cout << "The loss is rising: step " << training.steps() << " is in " << path.string() << ", "
                  << checkpoint.string() << " stays that of step " << saved << "\n";
      } else {
        saved = training.steps();
      }
      return path;
    };
    const auto good = [&] { return "; " + checkpoint.string() + " is the last good checkpoint"; };
    while (training.steps() < options.steps && interrupted == 0) {
      const auto start = std::chrono::steady_clock::now();
      StepReport report{};
      try {
        report = training.step(exec);
      } catch (const moxie::ValueError& error) {
        throw std::runtime_error("step " + std::to_string(training.steps() + 1) + ": " + error.what() + good());
      }
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      const bool spike = guard.add(double(report.loss));
      try {
        log.add(training.steps(), report, double(config.recipe.batch) / seconds.count());
      } catch (const std::runtime_error&) {
        save();
        throw;
      }
      progress.update(training.steps(), double(report.loss), double(report.balance_loss), double(report.max_load));
      if (spike) {
        throw std::runtime_error("step " + std::to_string(training.steps()) + ": the loss has risen to " +
                                 std::to_string(options.spike) + " times what it was" + good() +
                                 " (--spike 0 goes on whatever happens)");
      }
      if (training.steps() % options.checkpoint_every == 0 && training.steps() < options.steps) {
        save();
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
    const fs::path last = save();
    if (interrupted != 0) {
      std::cout << "Interrupted at step " << training.steps() << "; --resume goes on from step " << saved << "\n";
      return 130;
    }
    std::cout << "Written:\n  " << last.string() << "\n  " << files("log.jsonl").string() << "\n";
    const Series loss = curve("loss", training.history(), &StepReport::loss);
    if (!loss.x.empty()) {
      draw_or_say(files("loss.png"), [&](const fs::path& path) { draw_curve(path, "Training loss", "step", {loss}); });
    }
    Report report;
    report.title = "Training of a diffusion transformer";
    report.facts = {{"Data", data.origin},
                    {"Process", config.process},
                    {"Feed-forward", config.feed_forward},
                    {"Parameters", std::to_string(model.layout().parameter_count())},
                    {"Steps", std::to_string(training.steps()) + " of " + std::to_string(config.recipe.batch) + " images"}};
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

// SPDX-License-Identifier: MIT
//
// Trains a diffusion transformer with a mixture-of-experts feed-forward, draws with it, and looks at its routing.
//
//     dit train --out DIR [--resume] [...]         trains, then draws; everything it writes is in DIR
//     dit sample --checkpoint FILE --out DIR       draws with a checkpoint, ours or one of the references
//     dit analyse --checkpoint FILE --out DIR      the same, and who was routed where, by class, position and timestep
//     dit upcycle --checkpoint FILE --out FILE     a dense model becomes a mixture of experts
//     dit predict --checkpoint FILE --input FILE --out FILE    the network's output for given inputs
//     dit zoo                                      the named models of the papers, and what they cost
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <csignal>
#include <dit/analysis_output.hpp>
#include <dit/data_set.hpp>
#include <dit/frozen_model.hpp>
#include <dit/pictures.hpp>
#include <dit/progress.hpp>
#include <dit/report.hpp>
#include <dit/sampling.hpp>
#include <dit/training_log.hpp>
#include <dit/upcycling.hpp>
#include <dit/zoo.hpp>
#include <fstream>
#include <iostream>
#include <optional>

namespace {

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
namespace fs = std::filesystem;

volatile std::sig_atomic_t interrupted = 0;
void interrupt(int /*signal*/) { interrupted = 1; }

struct DrawingOptions {
  Index per_class = 100;
  std::vector<Index> classes;  // none: all
  dit::SamplerConfig sampler{.steps = ""};
  std::uint64_t seed = 1;
  Index bins = 10;  // of the way from noise to image, that the analysis tells apart

  /// With the process's own number of steps, where nobody gave one.
  dit::SamplerConfig sampler_for(const dit::Process& process) const {
    dit::SamplerConfig config = sampler;
    if (config.steps.empty()) {
      config.steps = std::holds_alternative<dit::RectifiedFlow>(process) ? "25" : "250";
    }
    return config;
  }
};

struct TrainingOptions {
  std::int64_t steps = 2000;
  std::int64_t checkpoint_every = 250;
  std::int64_t draw_every = 0;
  double spike = 4;
  bool resume = false;
  std::optional<fs::path> start_from;
  std::optional<fs::path> data;
};

/// Files of a run, all in its folder.
struct Files {
  fs::path folder;
  fs::path operator()(const std::string& name) const { return folder / name; }
};

/// A picture is worth having, but a run does not fail for want of gnuplot.
template <class Draw>
void draw_or_say(const fs::path& path, Draw&& draw) {
  try {
    draw(path);
    std::cout << "  " << path.string() << "\n";
  } catch (const std::exception& error) {
    std::cout << "  no " << path.filename().string() << ": " << error.what() << "\n";
  }
}

dit::Series curve(const std::string& name, const std::vector<dit::StepReport>& history, float dit::StepReport::*value) {
  dit::Series series{name, {}, {}};
  for (std::size_t i = 0; i < history.size(); ++i) {
    series.x.push_back(double(i + 1));
    series.y.push_back(double(history[i].*value));
  }
  return series;
}

/// Images drawn, and who was routed where meanwhile.
struct Drawing {
  Matrix<float> images;
  std::vector<std::int64_t> labels;
  std::optional<dit::RoutingCounts> counts;
};

template <class AnyModel>
constexpr bool routes = requires(const typename AnyModel::Tape& tape) {
  tape.blocks[0].feed_forward.plan();
};

/// Draws the same number of images of each class. An interruption throws.
template <class AnyModel>
Drawing draw(const AnyModel& model, dit::ParameterView<const float> weights, const dit::TrainingConfig& config,
             const DrawingOptions& options, const Exec& exec) {
  const dit::ModelConfig& shape = model.config();
  const dit::Process process = dit::process_of(config);
  const dit::Sampler<AnyModel, float> sampler(process, options.sampler_for(process), model);
  std::vector<Index> classes = options.classes;
  for (Index i = 0; classes.size() < std::size_t(shape.classes) && options.classes.empty(); ++i) {
    classes.push_back(i);
  }
  Drawing drawing;
  const Index total = options.per_class * Index(classes.size());
  for (Index i = 0; i < total; ++i) {
    const Index label = classes[std::size_t(i) % classes.size()];
    moxie::detail::expect_value(label >= 0 && label < shape.classes, "dit",
                                "class " + std::to_string(label) + " is not one of " + std::to_string(shape.classes));
    drawing.labels.push_back(label);
  }
  std::cout << "Drawing " << total << " images, " << sampler.steps() << " steps of " << sampler.config().method << ", guidance "
            << sampler.config().guidance << "\n";
  drawing.images.resize(total, shape.image_dim());
  if constexpr (routes<AnyModel>) {
    drawing.counts.emplace(dit::RoutingCounts::Shape{.layers = shape.depth,
                                                     .experts = model.feed_forward().router().experts(),
                                                     .classes = shape.classes,
                                                     .positions = shape.tokens(),
                                                     .bins = options.bins});
  }
  auto tape = model.make_tape();
  dit::Progress progress({.steps = total, .images_per_step = 1});
  constexpr Index batch = 50;
  for (Index first = 0; first < total; first += batch) {
    const Index n = std::min(batch, total - first);
    const std::vector<Index> part(drawing.labels.begin() + first, drawing.labels.begin() + first + n);
    drawing.images.middleRows(first, n) =
        sampler(weights, part, Rng(options.seed).split(2), std::uint64_t(first), tape, exec, [&](double way, auto...) {
          if (interrupted != 0) {
            throw std::runtime_error("interrupted while drawing; the checkpoint can be drawn with again");
          }
          if constexpr (routes<AnyModel>) {
            const Index bin = std::min(Index(std::ceil(way * double(options.bins) - 1e-9)) - 1, options.bins - 1);
            for (Index layer = 0; layer < shape.depth; ++layer) {
              drawing.counts->add(layer, std::max(bin, Index{0}), tape.blocks[std::size_t(layer)].feed_forward.plan(), part);
            }
          }
        });
    progress.update(first + n);
  }
  progress.finish();
  if (!config.latents) {
    drawing.images = drawing.images.array().max(-1.0F).min(1.0F);
  }
  return drawing;
}

/// A grid of the images, if they are pixels.
void draw_grid(const fs::path& path, const Drawing& drawing, const dit::TrainingConfig& config,
               const std::vector<std::string>& class_names) {
  if (config.latents) {
    throw std::runtime_error("latents are no pixels; their decoder draws them");
  }
  const dit::ModelConfig& shape = config.model;
  dit::draw_samples(path, drawing.images, drawing.labels, class_names, shape.channels, shape.image_size, shape.image_size);
}

/// samples.safetensors, pictures and the report.
void write_drawing(const Drawing& drawing, const dit::TrainingConfig& config, const std::vector<std::string>& class_names,
                   const Files& files, dit::Report report) {
  const dit::ModelConfig& shape = config.model;
  const Index total = drawing.images.rows();
  moxie::SafetensorsWriter writer;
  writer.add("images", {total, shape.channels, shape.image_size, shape.image_size},
             std::span<const float>(drawing.images.data(), std::size_t(drawing.images.size())));
  writer.add("labels", {total}, std::span<const std::int64_t>(drawing.labels));
  for (std::size_t i = 0; i < class_names.size(); ++i) {
    writer.metadata("class." + std::to_string(i), class_names[i]);
  }
  writer.save(files("samples.safetensors"));
  std::cout << "  " << files("samples.safetensors").string() << "\n";
  draw_or_say(files("samples.png"), [&](const fs::path& path) { draw_grid(path, drawing, config, class_names); });
  if (drawing.counts) {
    draw_or_say(files("expert_load.png"), [&](const fs::path& path) { dit::draw_expert_load(path, drawing.counts->load()); });
  }
  draw_or_say(files("report.html"), [&](const fs::path& path) {
    report.facts.emplace_back("Images drawn", std::to_string(total));
    if (!config.latents && fs::exists(files("samples.png"))) {
      report.pictures.push_back({"Samples", "Images drawn, a row for each class", files("samples.png")});
    }
    if (drawing.counts) {
      report.routing = &*drawing.counts;
      report.class_names = class_names;
    }
    dit::write_report(path, report);
  });
}

/// The files and the table of `dit analyse`.
void write_analysis(const dit::RoutingCounts& counts, const std::vector<std::string>& class_names, const Files& files) {
  dit::save_counts(files("routing.safetensors"), counts);
  dit::write_counts_csv(files("routing.csv"), counts);
  std::cout << "  " << files("routing.safetensors").string() << "\n  " << files("routing.csv").string() << "\n";
  draw_or_say(files("routing_by_class.png"),
              [&](const fs::path& path) { dit::draw_routing_by_class(path, counts, class_names); });
  draw_or_say(files("routing_by_position.png"), [&](const fs::path& path) { dit::draw_routing_by_position(path, counts); });
  draw_or_say(files("routing_by_timestep.png"), [&](const fs::path& path) { dit::draw_routing_by_timestep(path, counts); });
  std::cout << "\n";
  dit::print_information(std::cout, counts);
}

/// Class names for a checkpoint that is drawn with without its data.
std::vector<std::string> names_of(const moxie::SafetensorsFile& file, Index classes) {
  std::vector<std::string> names;
  for (Index i = 0; i < classes; ++i) {
    const auto found = file.metadata().find("class." + std::to_string(i));
    names.push_back(found == file.metadata().end() ? "class " + std::to_string(i) : found->second);
  }
  return names;
}

/// The model and the process of a checkpoint, with a run's own options of training.
dit::TrainingConfig started_from(const fs::path& path, const dit::ForeignOptions& foreign, const dit::TrainingConfig& run) {
  dit::TrainingConfig config = dit::config_of(moxie::SafetensorsFile(path), foreign);
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

/// What a run that was killed while it saved has left.
void remove_cut_off_saves(const fs::path& folder) {
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".moxie-") && name.ends_with(".tmp")) {
      fs::remove(entry.path());
    }
  }
}

int train(dit::TrainingConfig config, const TrainingOptions& options, const DrawingOptions& drawing, const Files& files,
          const Exec& exec) {
  fs::create_directories(files.folder);
  const fs::path checkpoint = files("checkpoint.safetensors");
  if (!options.resume && fs::exists(checkpoint)) {
    throw std::runtime_error(checkpoint.string() + " exists: go on with --resume, or choose another --out");
  }
  const dit::DataSet data = dit::load_data_set(options.data);
  std::cout << "Data: " << data.origin << "\n";
  dit::ModelConfig images = config.model;
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
  return dit::with_model(config, [&](const auto& model) {
    using AnyModel = std::decay_t<decltype(model)>;
    dit::Training training(config, model, data.class_names, data.count());
    // A sampler that cannot be is found out now.
    dit::Sampler<AnyModel, float>(training.process(), drawing.sampler_for(training.process()), model);
    if (options.resume && fs::exists(checkpoint)) {
      remove_cut_off_saves(files.folder);
      const moxie::SafetensorsFile file(checkpoint);
      const nlohmann::json now = config;
      const nlohmann::json before = dit::config_of(file);
      if (before != now) {
        throw std::runtime_error(checkpoint.string() +
                                 " was trained with other options: " + nlohmann::json::diff(now, before).dump());
      }
      training.load(file);  // refuses another data set
      std::cout << "Going on from step " << training.steps() << "\n";
    } else {
      if (options.start_from) {
        training.start_from(moxie::SafetensorsFile(*options.start_from));
      }
      training.save(checkpoint);  // a folder that cannot be written is found out now
    }
    dit::TrainingLog log(files("log.jsonl"), training.steps());
    std::cout << "Model: " << config.feed_forward << ", " << model.layout().parameter_count() << " parameters, "
              << exec.thread_count() << " threads\n";
    const moxie::kernel::InstructionSet built = moxie::kernel::built_for();
    const moxie::kernel::InstructionSet machine = moxie::kernel::machine_offers();
    if (machine != built) {
      std::cout << "Built for " << built.name << ", but this machine has " << machine.name
                << ": the preset `release` makes a faster program\n";
    }
    dit::SpikeGuard guard(options.spike);
    for (const dit::StepReport& report : training.history()) {
      guard.add(double(report.loss));
    }
    dit::Progress progress({.steps = options.steps, .first_step = training.steps(), .images_per_step = config.batch});
    const auto good = [&] { return "; " + checkpoint.string() + " is the last good checkpoint"; };
    while (training.steps() < options.steps && interrupted == 0) {
      const auto start = std::chrono::steady_clock::now();
      dit::StepReport report{};
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
      if (training.steps() % options.checkpoint_every == 0) {
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
    const dit::Series loss = curve("loss", training.history(), &dit::StepReport::loss);
    draw_or_say(files("loss.png"), [&](const fs::path& path) { dit::draw_curve(path, "Training loss", "step", {loss}); });
    dit::Report report;
    report.title = "Training of a diffusion transformer";
    report.facts = {{"Data", data.origin},
                    {"Process", config.process},
                    {"Feed-forward", config.feed_forward},
                    {"Parameters", std::to_string(model.layout().parameter_count())},
                    {"Steps", std::to_string(training.steps()) + " of " + std::to_string(config.batch) + " images"}};
    report.curves.push_back({"Training loss", "step", "loss", {loss}});
    report.curves.push_back(
        {"Balance loss", "step", "balance loss", {curve("balance loss", training.history(), &dit::StepReport::balance_loss)}});
    report.curves.push_back({"Load of the busiest expert",
                             "step",
                             "multiples of an even share",
                             {curve("load", training.history(), &dit::StepReport::max_load)}});
    write_drawing(draw(model, training.averages().view(), config, drawing, exec), config, data.class_names, files, report);
    return 0;
  });
}

/// The model of a checkpoint and its weights, handed to `f`; with experts in bfloat16, if asked for.
template <class F>
int with_checkpoint(const moxie::SafetensorsFile& file, const dit::TrainingConfig& config, bool bfloat16, const Exec& exec,
                    F&& f) {
  if (bfloat16) {
    return dit::with_bfloat16_model(
        file, config, exec, [&](const auto& model) { return f(model, model.weights().view(), model.parameter_count()); });
  }
  return dit::with_model(config, [&](const auto& model) {
    const moxie::Parameters<float> weights = dit::load_model(file, model.config(), model.layout());
    return f(model, weights.view(), model.layout().parameter_count());
  });
}

int sample(const fs::path& checkpoint, const dit::ForeignOptions& foreign, const DrawingOptions& drawing, bool bfloat16,
           bool analyse, const Files& files, const Exec& exec) {
  const moxie::SafetensorsFile file(checkpoint);
  const dit::TrainingConfig config = dit::config_of(file, foreign);
  if (analyse && config.feed_forward == "dense") {
    throw std::runtime_error(checkpoint.string() + ": is a dense model, which routes nothing");
  }
  fs::create_directories(files.folder);
  return with_checkpoint(file, config, bfloat16, exec,
                         [&](const auto& model, dit::ParameterView<const float> weights, Index parameters) {
                           const std::vector<std::string> class_names = names_of(file, config.model.classes);
                           dit::Report report;
                           report.title = analyse ? "Routing of a diffusion transformer" : "Samples of a diffusion transformer";
                           report.facts = {{"Checkpoint", checkpoint.string()},
                                           {"Feed-forward", config.feed_forward + (bfloat16 ? ", experts in bfloat16" : "")},
                                           {"Parameters", std::to_string(parameters)}};
                           const Drawing drawn = draw(model, weights, config, drawing, exec);
                           write_drawing(drawn, config, class_names, files, report);
                           if (analyse) {
                             write_analysis(*drawn.counts, class_names, files);
                           }
                           return 0;
                         });
}

int upcycle(const fs::path& checkpoint, const dit::ForeignOptions& foreign, const dit::UpcyclingOptions& options,
            const fs::path& out) {
  const moxie::SafetensorsFile file(checkpoint);
  const Index parameters = dit::upcycle_checkpoint(file, dit::config_of(file, foreign), options, out);
  std::cout << "Written:\n  " << out.string() << ", " << options.experts << " experts, " << parameters << " parameters\n";
  return 0;
}

/// Of tensors x (B,C,H,W), t (B) and y (B), the network's output (B,Cout,H,W).
int predict(const fs::path& checkpoint, const dit::ForeignOptions& foreign, bool bfloat16, const fs::path& input,
            const fs::path& out, const Exec& exec) {
  const moxie::SafetensorsFile file(checkpoint);
  const moxie::SafetensorsFile in(input);
  return with_checkpoint(
      file, dit::config_of(file, foreign), bfloat16, exec,
      [&](const auto& model, dit::ParameterView<const float> weights, Index /*parameters*/) {
        const dit::ModelConfig& shape = model.config();
        const std::vector<Index> images = in.info("x").shape;
        const Index batch = images.empty() ? 0 : images.front();
        in.expect<float>("x", std::array<Index, 4>{batch, shape.channels, shape.image_size, shape.image_size});
        std::vector<float> t;
        if (moxie::detail::reads_as<float>(in.info("t").dtype)) {
          t = in.read<float>("t");
        } else {
          for (const std::int64_t step : in.read<std::int64_t>("t")) {
            t.push_back(float(step));
          }
        }
        const std::vector<std::int64_t> labels = in.read<std::int64_t>("y");
        const std::vector<float> values = in.read<float>("x");
        Matrix<float> output(batch, shape.output_dim());
        auto tape = model.make_tape();
        model.forward(weights, dit::RowView<const float>(values.data(), batch, shape.image_dim()), t,
                      {labels.begin(), labels.end()}, output, tape, exec);
        moxie::SafetensorsWriter writer;
        writer.add("output", {batch, shape.out_channels(), shape.image_size, shape.image_size},
                   std::span<const float>(output.data(), std::size_t(output.size())));
        writer.save(out);
        std::cout << "Written:\n  " << out.string() << "\n";
        return 0;
      });
}

/// Makes a named mixture with random weights, the same in every block, and times a forward of one image.
template <class Element>
int measure(const dit::NamedModel& named, const Exec& exec) {
  dit::TrainingConfig config;
  dit::apply(named, config);
  return dit::with_layer<Element>(config, [&](const auto& layer, const char* name) -> int {
    using Layer = std::decay_t<decltype(layer)>;
    if constexpr (requires { layer.router(); }) {
      Index of_layer = 0;
      const auto read = [&](const std::string& part, moxie::Parameters<float>& to) {
        for (Index i = 0; i < Index(to.layout().tensors().size()) && (part.empty() || of_layer == 0); ++i) {
          Rng(1).split(std::uint64_t(i)).fill_uniform(to.view()[i], -0.03, 0.03);
        }
        of_layer += part.empty() ? 0 : 1;
      };
      const dit::FrozenModel<Layer> model(config.model, layer, name, read, exec);
      const Matrix<float> x = moxie::random_normal<float>(1, config.model.image_dim(), Rng(2));
      Matrix<float> v(1, config.model.output_dim());
      auto tape = model.make_tape();
      std::cout << named.name << ": " << model.parameter_count() << " trained parameters\n";
      for (const char* which : {"first", "second"}) {
        const auto start = std::chrono::steady_clock::now();
        model.forward(model.weights(), x, {0.5F}, {0}, v, tape, exec);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::cout << which << " forward of one image: " << seconds.count() << " s\n";
      }
      if (!v.allFinite()) {
        throw std::runtime_error("the output is not finite");
      }
      rusage usage{};
      getrusage(RUSAGE_SELF, &usage);
      std::cout << "memory at most: " << double(usage.ru_maxrss) / double(1 << 20) << " GiB\n";
      return 0;
    } else {
      throw std::runtime_error("only mixtures are measured");
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a diffusion transformer with a mixture of experts, draws with it, and looks at its routing.");
  app.require_subcommand(1);
  dit::TrainingConfig config;
  TrainingOptions training;
  DrawingOptions drawing;
  dit::ForeignOptions foreign;
  dit::UpcyclingOptions upcycling;
  std::optional<bool> learn_sigma;
  Files files{"out"};
  fs::path checkpoint;
  fs::path input;
  fs::path out_file;
  bool bfloat16 = false;
  std::string measured;
  Exec exec;

  const CLI::Validator finite(
      [](const std::string& text) {
        double value = 0;
        return CLI::detail::lexical_cast(text, value) && std::isfinite(value) ? std::string()
                                                                              : text + " is not a finite number";
      },
      "FINITE");
  const CLI::Validator model_name(
      [](const std::string& text) {
        try {
          dit::named_model(text);
          return std::string();
        } catch (const moxie::ValueError& error) {
          return std::string(error.what());
        }
      },
      "NAME");
  CLI::App* train_command = app.add_subcommand("train", "train, then draw");
  CLI::App* sample_command = app.add_subcommand("sample", "draw with a checkpoint");
  CLI::App* analyse_command = app.add_subcommand("analyse", "draw, and look at who is routed where");
  CLI::App* upcycle_command = app.add_subcommand("upcycle", "make a mixture of experts of a dense checkpoint");
  CLI::App* predict_command = app.add_subcommand("predict", "the network's output for tensors x, t and y");
  CLI::App* zoo_command = app.add_subcommand("zoo", "the named models of the papers: parameters, multiply-adds, memory");

  for (CLI::App* command : {train_command, sample_command, analyse_command}) {
    command->add_option("--out", files.folder, "folder for everything that is written")->capture_default_str();
    command->add_option("--samples-per-class", drawing.per_class)->capture_default_str()->check(CLI::PositiveNumber);
    command->add_option("--classes", drawing.classes, "numbers of the classes to draw; by default all")->delimiter(',');
    command->add_option("--sampler", drawing.sampler.method, "euler or heun (flow), ddpm or ddim (ddpm)")
        ->check(CLI::IsMember({"euler", "heun", "ddpm", "ddim"}));
    command->add_option("--sampling-steps", drawing.sampler.steps,
                        "by default 25 (flow) or 250 (ddpm); of ddpm also \"10,15,20\" or \"ddim50\"");
    command->add_option("--guidance", drawing.sampler.guidance, "classifier-free guidance; 1 is none")
        ->capture_default_str()
        ->check(finite);
    command
        ->add_option("--guide-channels", drawing.sampler.guided_channels,
                     "the first ones alone; 3 is what the reference's sampler of latents does")
        ->check(CLI::PositiveNumber);
    command->add_option("--eta", drawing.sampler.eta, "noise of ddim")
        ->capture_default_str()
        ->check(CLI::Range(0.0, 1.0) & finite);
    command->add_flag("--clip", drawing.sampler.clip, "the images that ddpm and ddim predict, to [-1,1]");
    command->add_option("--seed", config.seed)->capture_default_str();
  }
  for (CLI::App* command : {train_command, sample_command, analyse_command, predict_command, zoo_command}) {
    command->add_option("--threads", exec.threads, "0: all cores")->capture_default_str()->check(CLI::NonNegativeNumber);
  }
  for (CLI::App* command : {sample_command, analyse_command, upcycle_command, predict_command}) {
    command->add_option("--checkpoint", checkpoint, "of `dit train`, or a reference's state dict in safetensors")
        ->required()
        ->check(CLI::ExistingFile);
    command->add_option("--heads", foreign.heads, "of a state dict whose size has no name")->check(CLI::PositiveNumber);
    command->add_option("--process", foreign.process, "of a state dict")
        ->capture_default_str()
        ->check(CLI::IsMember({"flow", "ddpm"}));
  }
  for (CLI::App* command : {sample_command, analyse_command, predict_command}) {
    command->add_option("--top-k", foreign.top_k, "of a state dict")->capture_default_str()->check(CLI::PositiveNumber);
  }
  for (CLI::App* command : {sample_command, analyse_command, predict_command, zoo_command}) {
    command->add_flag("--bf16", bfloat16, "experts in bfloat16: half their memory, and faster where the processor has it");
  }
  zoo_command->add_option("--measure", measured, "times a forward of this model, with random weights")->check(model_name);
  analyse_command->add_option("--bins", drawing.bins, "stretches of the way from noise to image")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  for (CLI::App* command : {upcycle_command, predict_command}) {
    command->add_option("--out", out_file, "the file that is written")->required();
  }
  predict_command->add_option("--input", input, "a safetensors file")->required()->check(CLI::ExistingFile);
  upcycle_command->add_option("--experts", upcycling.experts)->capture_default_str()->check(CLI::PositiveNumber);
  upcycle_command->add_option("--top-k", upcycling.top_k)->capture_default_str()->check(CLI::PositiveNumber);
  upcycle_command->add_flag("--equal", upcycling.equal,
                            "normalized weights, so that it computes what the dense model computes");
  upcycle_command->add_option("--seed", upcycling.seed, "of the gates")->capture_default_str();

  // Options are read in this order, so that those after --model change the named model.
  train_command
      ->add_option_function<std::string>(
          "--model", [&](const std::string& name) { dit::apply(dit::named_model(name), config); },
          "the shape of a named model (`dit zoo`), which the options below change")
      ->check(model_name);
  train_command->add_option("--data", training.data,
                            "IDX files (a folder, or the images of one set) or a safetensors file with images and labels; by "
                            "default Fashion-MNIST in " +
                                std::string(dit::fashion_mnist_directory));
  train_command->add_flag("--resume", training.resume, "go on from the checkpoint in the folder");
  train_command
      ->add_option("--start-from", training.start_from,
                   "begin with the weights of this checkpoint; its model and process replace the options of these")
      ->check(CLI::ExistingFile);
  train_command->add_option("--steps", training.steps)->capture_default_str()->check(CLI::NonNegativeNumber);
  train_command->add_option("--checkpoint-every", training.checkpoint_every, "steps between checkpoints")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train_command->add_option("--draw-every", training.draw_every, "steps between grids of samples; 0: only at the end")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  train_command
      ->add_option("--spike", training.spike, "stop where ten steps have this many times the lowest loss; 0 never does")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber & finite);
  train_command->add_option("--process", config.process, "rectified flow or DDPM")
      ->capture_default_str()
      ->check(CLI::IsMember({"flow", "ddpm"}));
  train_command->add_option("--times", config.times, "of rectified flow")
      ->capture_default_str()
      ->check(CLI::IsMember({"logit-normal", "uniform"}));
  train_command->add_flag("--stratified", config.stratified, "a batch's times are spread evenly");
  train_command->add_option("--schedule", config.schedule, "of DDPM")
      ->capture_default_str()
      ->check(CLI::IsMember({"linear", "cosine"}));
  train_command->add_option("--diffusion-steps", config.diffusion_steps, "of DDPM")
      ->capture_default_str()
      ->check(CLI::Range(Index{2}, Index{1000000}));
  train_command->add_flag("--learn-sigma,!--no-learn-sigma", learn_sigma, "by default DDPM learns its variance");
  train_command->add_option("--feed-forward", config.feed_forward)
      ->capture_default_str()
      ->check(CLI::IsMember({"shared", "top-k", "expert-choice", "soft", "dense"}));
  train_command->add_option("--dim", config.model.dim)->capture_default_str();
  train_command->add_option("--depth", config.model.depth)->capture_default_str();
  train_command->add_option("--heads", config.model.heads)->capture_default_str();
  train_command->add_option("--patch", config.model.patch)->capture_default_str();
  train_command->add_flag("--qk-norm", config.model.qk_norm, "attention of DiT-MoE's large models");
  train_command->add_option("--experts", config.experts)->capture_default_str();
  train_command->add_option("--top-k", config.top_k)->capture_default_str();
  train_command->add_option("--hidden-dim", config.hidden_dim, "of an expert")->capture_default_str();
  train_command->add_option("--shared-hidden-dim", config.shared_hidden_dim, "of the shared experts")->capture_default_str();
  train_command->add_option("--expert", config.expert, "of top-k")
      ->capture_default_str()
      ->check(CLI::IsMember({"swiglu", "gelu"}));
  train_command->add_flag("--normalize", config.normalize, "the weights of a token's experts sum to 1");
  train_command->add_option("--slots-per-expert", config.slots_per_expert, "soft")->capture_default_str();
  train_command->add_option("--capacity-factor", config.capacity_factor, "expert-choice: experts of a token, on average")
      ->capture_default_str()
      ->check(CLI::PositiveNumber & finite);
  train_command->add_option("--switch-experts", config.model.switch_experts, "Switch-DiT: experts before each block; 0: none")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  train_command->add_option("--switch-top-k", config.model.switch_top_k)->capture_default_str();
  train_command->add_option("--prior", config.model.prior, "weight of Switch-DiT's diffusion prior loss")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber & finite);
  train_command->add_option("--balance", config.balance, "weight of the balance loss")->capture_default_str()->check(finite);
  train_command->add_option("--batch", config.batch)->capture_default_str()->check(CLI::PositiveNumber);
  train_command->add_option("--micro-batch", config.micro_batch, "images of a batch that are computed at once; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  train_command->add_option("--rate", config.rate, "learning rate")->capture_default_str()->check(CLI::PositiveNumber & finite);
  train_command->add_option("--weight-decay", config.weight_decay)
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber & finite);
  train_command->add_option("--label-dropout", config.label_dropout, "share of labels that become \"no class\"")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0) & finite);
  train_command->add_option("--ema-decay", config.ema_decay, "of the averaged weights, which samples are drawn with")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0) & finite);
  train_command->add_option("--warm-up", config.warm_up, "steps")->capture_default_str()->check(CLI::NonNegativeNumber);
  CLI11_PARSE(app, argc, argv);

  config.model.learn_sigma = learn_sigma.value_or(config.process == "ddpm");
  drawing.seed = config.seed;
  std::signal(SIGINT, interrupt);
  std::signal(SIGTERM, interrupt);
  try {
    if (zoo_command->parsed()) {
      if (!measured.empty()) {
        const dit::NamedModel named = dit::named_model(measured);
        return bfloat16 ? measure<moxie::BFloat16>(named, exec) : measure<float>(named, exec);
      }
      dit::print_zoo(std::cout);
      return 0;
    }
    if (train_command->parsed()) {
      if (training.start_from) {
        foreign.heads = train_command->count("--heads") > 0 ? config.model.heads : 0;
        foreign.process = train_command->count("--process") > 0 ? config.process : foreign.process;
        foreign.top_k = config.top_k;
        config = started_from(*training.start_from, foreign, config);
      }
      return train(config, training, drawing, files, exec);
    }
    if (upcycle_command->parsed()) {
      return upcycle(checkpoint, foreign, upcycling, out_file);
    }
    if (predict_command->parsed()) {
      return predict(checkpoint, foreign, bfloat16, input, out_file, exec);
    }
    return sample(checkpoint, foreign, drawing, bfloat16, analyse_command->parsed(), files, exec);
  } catch (const std::exception& error) {
    std::cerr << "dit: " << error.what() << "\n";
    return 1;
  }
}

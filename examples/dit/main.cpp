// SPDX-License-Identifier: MIT
//
// Trains a diffusion transformer with a mixture-of-experts feed-forward and draws with it.
//
//     dit train --out DIR [--resume] [...]     trains, then samples; everything it writes is in DIR
//     dit sample --checkpoint FILE --out DIR   samples from a checkpoint
//     dit zoo                                  the named models of the papers, and what they cost
#include <CLI/CLI.hpp>
#include <cmath>
#include <csignal>
#include <dit/data_set.hpp>
#include <dit/pictures.hpp>
#include <dit/progress.hpp>
#include <dit/report.hpp>
#include <dit/training.hpp>
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

struct SamplingOptions {
  Index per_class = 100;
  Index steps = 25;
  double guidance = 3;
};

/// Files of a run, all in its folder.
struct Files {
  fs::path folder;
  fs::path operator()(const char* name) const { return folder / name; }
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

/// loss.csv, complete or not at all.
void write_history(const fs::path& path, const std::vector<dit::StepReport>& history) {
  const fs::path part = path.string() + ".part";
  std::ofstream out(part);
  out << "step,loss,balance_loss,gradient_norm\n";
  for (std::size_t i = 0; i < history.size(); ++i) {
    out << i + 1 << ',' << history[i].loss << ',' << history[i].balance_loss << ',' << history[i].gradient_norm << '\n';
  }
  out.close();
  if (!out) {
    fs::remove(part);
    throw std::runtime_error(path.string() + ": cannot be written");
  }
  fs::rename(part, path);
}

dit::Series curve(const std::string& name, const std::vector<dit::StepReport>& history, float dit::StepReport::*value) {
  dit::Series series{name, {}, {}};
  for (std::size_t i = 0; i < history.size(); ++i) {
    series.x.push_back(double(i + 1));
    series.y.push_back(double(history[i].*value));
  }
  return series;
}

/// Stretches of the way from noise to image that the report tells apart.
constexpr Index timestep_bins = 10;

/// An empty table for a model whose layers choose experts.
template <class AnyModel>
std::optional<dit::RoutingCounts> routing_counts(const AnyModel& model) {
  if constexpr (requires { model.feed_forward().router(); }) {
    const dit::ModelConfig& config = model.config();
    return dit::RoutingCounts({.layers = config.depth,
                               .experts = model.feed_forward().router().experts(),
                               .classes = config.classes,
                               .positions = config.tokens(),
                               .bins = timestep_bins});
  } else {
    return std::nullopt;
  }
}

template <class AnyModel>
void write_samples(const AnyModel& model, dit::ParameterView<const float> weights, const std::vector<std::string>& class_names,
                   const SamplingOptions& options, std::uint64_t seed, const Files& files, dit::Report report,
                   const Exec& exec) {
  const dit::ModelConfig& config = model.config();
  const Index total = options.per_class * config.classes;
  std::cout << "Sampling " << total << " images, " << options.steps << " steps, guidance " << options.guidance << "\n";
  Matrix<float> images(total, config.image_dim());
  std::vector<std::int64_t> labels(static_cast<std::size_t>(total));
  for (Index i = 0; i < total; ++i) {
    labels[std::size_t(i)] = i % config.classes;
  }
  auto counts = routing_counts(model);
  auto tape = model.make_tape();
  dit::Progress progress({.steps = total, .images_per_step = 1});
  constexpr Index batch = 50;
  for (Index first = 0; first < total; first += batch) {
    const Index n = std::min(batch, total - first);
    const std::vector<Index> part(labels.begin() + first, labels.begin() + first + n);
    images.middleRows(first, n) = dit::sample(model, weights, part, options.steps, options.guidance, Rng(seed).split(2),
                                              std::uint64_t(first), tape, exec, [&](Index step, auto...) {
                                                if constexpr (requires { tape.blocks[0].feed_forward.plan(); }) {
                                                  for (Index layer = 0; layer < config.depth; ++layer) {
                                                    counts->add(layer, (step - 1) * timestep_bins / options.steps,
                                                                tape.blocks[std::size_t(layer)].feed_forward.plan(), part);
                                                  }
                                                }
                                              });
    progress.update(first + n);
    if (interrupted != 0 && first + n < total) {
      throw std::runtime_error("interrupted while sampling; the checkpoint can be sampled again");
    }
  }
  progress.finish();
  images = images.array().max(-1.0F).min(1.0F);

  moxie::SafetensorsWriter writer;
  writer.add("images", {total, config.channels, config.image_size, config.image_size},
             std::span<const float>(images.data(), std::size_t(images.size())));
  writer.add("labels", {total}, std::span<const std::int64_t>(labels));
  writer.save(files("samples.safetensors"));
  std::cout << "  " << files("samples.safetensors").string() << "\n";
  draw_or_say(files("samples.png"), [&](const fs::path& path) {
    dit::draw_samples(path, images, labels, class_names, config.channels, config.image_size, config.image_size);
  });
  if (counts) {
    draw_or_say(files("expert_load.png"), [&](const fs::path& path) { dit::draw_expert_load(path, counts->load()); });
  }
  draw_or_say(files("report.html"), [&](const fs::path& path) {
    report.facts.emplace_back("Parameters", std::to_string(model.layout().parameter_count()));
    report.facts.emplace_back("Samples",
                              std::to_string(total) + ", " + std::to_string(options.steps) + " steps of Euler's method");
    if (fs::exists(files("samples.png"))) {
      report.pictures.push_back({"Samples", "Images drawn, a row for each class", files("samples.png")});
    }
    if (counts) {
      report.routing = &*counts;
      report.class_names = class_names;
    }
    dit::write_report(path, report);
  });
}

/// Class names for a checkpoint that is sampled without its data.
std::vector<std::string> names_of(const moxie::SafetensorsFile& file, Index classes) {
  std::vector<std::string> names;
  for (Index i = 0; i < classes; ++i) {
    const auto found = file.metadata().find("class." + std::to_string(i));
    names.push_back(found == file.metadata().end() ? "class " + std::to_string(i) : found->second);
  }
  return names;
}

int train(dit::TrainingConfig config, std::int64_t steps, std::int64_t checkpoint_every, bool resume,
          const std::optional<fs::path>& data_folder, const SamplingOptions& sampling, const Files& files, const Exec& exec) {
  fs::create_directories(files.folder);
  const fs::path checkpoint = files("checkpoint.safetensors");
  if (!resume && fs::exists(checkpoint)) {
    throw std::runtime_error(checkpoint.string() + " exists: go on with --resume, or choose another --out");
  }
  // Shapes are generated where nobody named a folder, and the usual one is absent.
  const dit::DataSet data = data_folder ? dit::fashion_mnist(*data_folder) : dit::load_data_set();
  std::cout << "Data: " << data.origin << "\n";
  config.model.image_size = data.height;
  config.model.channels = data.channels;
  config.model.classes = Index(data.class_names.size());
  if (data.height != data.width) {
    throw std::runtime_error("images must be square");
  }
  return dit::with_model(config, [&](const auto& model) {
    dit::Training training(config, model, data.class_names, data.count());
    if (resume && fs::exists(checkpoint)) {
      const moxie::SafetensorsFile file(checkpoint);
      const nlohmann::json before = dit::config_of(file).json();
      if (before != config.json()) {
        throw std::runtime_error(checkpoint.string() +
                                 " was trained with other options: " + nlohmann::json::diff(config.json(), before).dump());
      }
      training.load(file);  // refuses another data set
      std::cout << "Going on from step " << training.steps() << "\n";
    } else {
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
    dit::Progress progress({.steps = steps, .first_step = training.steps(), .images_per_step = config.batch});
    const auto save = [&] {
      training.save(checkpoint);
      write_history(files("loss.csv"), training.history());
    };
    while (training.steps() < steps && interrupted == 0) {
      const dit::StepReport& report = training.step(data.images, data.labels, exec);
      progress.update(training.steps(), double(report.loss), double(report.balance_loss));
      if (training.steps() % checkpoint_every == 0) {
        save();
      }
    }
    progress.finish();
    save();
    if (interrupted != 0) {
      std::cout << "Interrupted at step " << training.steps() << "; --resume goes on from there\n";
      return 130;
    }
    std::cout << "Written:\n  " << checkpoint.string() << "\n  " << files("loss.csv").string() << "\n";
    const dit::Series loss = curve("loss", training.history(), &dit::StepReport::loss);
    draw_or_say(files("loss.png"), [&](const fs::path& path) { dit::draw_curve(path, "Training loss", "step", {loss}); });
    dit::Report report;
    report.title = "Training of a diffusion transformer";
    report.facts = {{"Data", data.origin},
                    {"Feed-forward", config.feed_forward},
                    {"Steps", std::to_string(training.steps()) + " of " + std::to_string(config.batch) + " images"}};
    report.curves.push_back({"Training loss", "step", "loss", {loss}});
    report.curves.push_back(
        {"Balance loss", "step", "balance loss", {curve("balance loss", training.history(), &dit::StepReport::balance_loss)}});
    write_samples(model, training.averages().view(), data.class_names, sampling, config.seed, files, report, exec);
    return 0;
  });
}

int sample(const fs::path& checkpoint, const SamplingOptions& sampling, std::uint64_t seed, const Files& files,
           const Exec& exec) {
  const moxie::SafetensorsFile file(checkpoint);
  const dit::TrainingConfig config = dit::config_of(file);
  fs::create_directories(files.folder);
  return dit::with_model(config, [&](const auto& model) {
    moxie::Parameters<float> weights(model.layout());
    moxie::load_parameters(file, weights, "ema.");
    dit::Report report;
    report.title = "Samples of a diffusion transformer";
    report.facts = {{"Checkpoint", checkpoint.string()}};
    write_samples(model, weights.view(), names_of(file, config.model.classes), sampling, seed, files, report, exec);
    return 0;
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a diffusion transformer with a mixture of experts, and draws with it.");
  app.require_subcommand(1);
  dit::TrainingConfig config;
  SamplingOptions sampling;
  Files files{"out"};
  std::optional<fs::path> data_folder;
  fs::path checkpoint;
  std::int64_t steps = 2000;
  std::int64_t checkpoint_every = 250;
  bool resume = false;
  Exec exec;

  const CLI::Validator finite(
      [](const std::string& text) {
        double value = 0;
        return CLI::detail::lexical_cast(text, value) && std::isfinite(value) ? std::string()
                                                                              : text + " is not a finite number";
      },
      "FINITE");
  CLI::App* train_command = app.add_subcommand("train", "train, then sample");
  CLI::App* sample_command = app.add_subcommand("sample", "sample from a checkpoint");
  const CLI::App* zoo_command = app.add_subcommand("zoo", "the named models of the papers: parameters, multiply-adds, memory");
  for (CLI::App* command : {train_command, sample_command}) {
    command->add_option("--out", files.folder, "folder for everything that is written")->capture_default_str();
    command->add_option("--samples-per-class", sampling.per_class)->capture_default_str()->check(CLI::PositiveNumber);
    command->add_option("--sampling-steps", sampling.steps, "steps of Euler's method")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    command->add_option("--guidance", sampling.guidance, "classifier-free guidance; 1 is none")
        ->capture_default_str()
        ->check(finite);
    command->add_option("--seed", config.seed)->capture_default_str();
    command->add_option("--threads", exec.threads, "0: all cores")->capture_default_str()->check(CLI::NonNegativeNumber);
  }
  sample_command->add_option("--checkpoint", checkpoint)->required()->check(CLI::ExistingFile);
  train_command->add_option("--data", data_folder,
                            "folder with Fashion-MNIST's IDX files; by default " + std::string(dit::fashion_mnist_directory));
  train_command->add_flag("--resume", resume, "go on from the checkpoint in the folder");
  train_command->add_option("--steps", steps)->capture_default_str()->check(CLI::NonNegativeNumber);
  train_command->add_option("--checkpoint-every", checkpoint_every, "steps between checkpoints")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train_command->add_option("--feed-forward", config.feed_forward)
      ->capture_default_str()
      ->check(CLI::IsMember({"shared", "top-k", "soft", "dense"}));
  train_command->add_option("--dim", config.model.dim)->capture_default_str();
  train_command->add_option("--depth", config.model.depth)->capture_default_str();
  train_command->add_option("--heads", config.model.heads)->capture_default_str();
  train_command->add_option("--patch", config.model.patch)->capture_default_str();
  train_command->add_option("--experts", config.experts)->capture_default_str();
  train_command->add_option("--top-k", config.top_k)->capture_default_str();
  train_command->add_option("--hidden-dim", config.hidden_dim, "of an expert")->capture_default_str();
  train_command->add_option("--shared-hidden-dim", config.shared_hidden_dim, "of the shared experts")->capture_default_str();
  train_command->add_option("--slots-per-expert", config.slots_per_expert, "soft")->capture_default_str();
  train_command->add_option("--balance", config.balance, "weight of the balance loss")->capture_default_str()->check(finite);
  train_command->add_option("--batch", config.batch)->capture_default_str()->check(CLI::PositiveNumber);
  train_command->add_option("--rate", config.rate, "learning rate")->capture_default_str()->check(CLI::PositiveNumber & finite);
  train_command->add_option("--ema-decay", config.ema_decay, "of the averaged weights, which samples are drawn with")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0) & finite);
  train_command->add_option("--warm-up", config.warm_up, "steps")->capture_default_str()->check(CLI::NonNegativeNumber);
  CLI11_PARSE(app, argc, argv);

  std::signal(SIGINT, interrupt);
  std::signal(SIGTERM, interrupt);
  try {
    if (zoo_command->parsed()) {
      dit::print_zoo(std::cout);
      return 0;
    }
    return train_command->parsed() ? train(config, steps, checkpoint_every, resume, data_folder, sampling, files, exec)
                                   : sample(checkpoint, sampling, config.seed, files, exec);
  } catch (const std::exception& error) {
    std::cerr << "dit: " << error.what() << "\n";
    return 1;
  }
}

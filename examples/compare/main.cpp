// SPDX-License-Identifier: MIT
//
// Trains one diffusion transformer with many feed-forwards, sparse and soft, and measures them alike.
//
//     compare run [--experiment FILE] [--out DIR]     trains what is not in DIR/results.jsonl yet
//     compare time [--experiment FILE] [--out DIR]    measures steps of the first group in turn, into DIR/times.jsonl
//     compare cost [--experiment FILE]                what the runs cost, by arithmetic
#include <CLI/CLI.hpp>
#include <compare/runner.hpp>
#include <csignal>
#include <dit/options.hpp>
#include <dit/output_folder.hpp>
#include <iostream>

namespace {

namespace fs = std::filesystem;
using compare::Classifier;
using compare::Exec;
using compare::Experiment;
using compare::Index;
using compare::Matrix;
using compare::Run;

void stop_if_interrupted() {
  dit::commands::stop_if_interrupted("interrupted; the same command goes on with the runs that are not finished");
}

/// The shape of the images, which the file of runs does not say.
void fit(Experiment& experiment, const dit::DataSet& data) {
  for (Run& run : experiment.runs) {
    run.config.model.image_size = data.height;
    run.config.model.channels = data.channels;
    run.config.model.classes = Index(data.class_names.size());
  }
}

/// Images that nothing is trained on: Fashion-MNIST's test set, or other generated ones.
dit::DataSet test_set(const dit::DataSet& data) {
  if (data.origin.find("generated shapes") != std::string::npos) {
    return dit::generated_shapes(10000, moxie::Rng{2});
  }
  dit::DataSet test = dit::read_idx(nn::idx_file(dit::fashion_mnist_directory, {"t10k-images-idx3-ubyte"}));
  if (test.images.cols() != data.images.cols() || test.class_names != data.class_names) {
    throw std::runtime_error(test.origin + ": is not the test set of " + data.origin);
  }
  return test;
}

void print_cost(const Experiment& experiment) {
  std::cout << "| run | parameters | activated | multiply-adds an image |\n|---|--:|--:|--:|\n";
  std::set<std::string> seen;
  for (const Run& run : experiment.runs) {
    if (seen.insert(run.name).second) {
      dit::model_of(run.config);  // refuses what no model is
      const dit::Cost cost = dit::cost_of(run.config);
      std::cout << "| " << run.name << " | " << cost.parameters << " | " << cost.activated << " | " << cost.multiply_adds
                << " |\n";
    }
  }
}

/// The classifier of the folder, or one that is trained now and stays there.
moxie::Parameters<float> classifier_weights(const Classifier<float>& classifier, const dit::DataSet& data, std::int64_t steps,
                                            const fs::path& path, const Exec& exec) {
  std::map<std::string, std::string> identity = dit::identity_of(data);
  identity["steps"] = std::to_string(steps);
  if (fs::exists(path)) {
    const moxie::SafetensorsFile file(path);
    if (file.metadata() != identity) {
      throw std::runtime_error(path.string() + ": is a classifier of other images or steps: choose another --out");
    }
    moxie::Parameters<float> weights(classifier.layout());
    moxie::load_parameters(file, weights);
    return weights;
  }
  std::cout << "Training the classifier\n";
  dit::Progress progress({.steps = steps, .images_per_step = compare::ClassifierTraining{}.batch});
  moxie::Parameters<float> weights =
      compare::train_classifier(classifier, data, {.steps = steps}, exec, [&](std::int64_t step, double loss) {
        stop_if_interrupted();
        progress.update(step, loss, 0, 1);
      });
  progress.finish();
  moxie::save_parameters(path, weights, identity);
  return weights;
}

int time(Experiment experiment, const fs::path& folder, Index rounds, const Exec& exec) {
  const dit::OutputFolder files(folder);
  const dit::DataSet data = dit::load_data_set();
  fit(experiment, data);
  experiment.leave_first_group();
  std::vector<std::int64_t> memory;
  for (const Run& run : experiment.runs) {
    memory.push_back(compare::step_memory(run, data, exec));
  }
  constexpr Index steps = 10;
  const auto count = std::int64_t(experiment.runs.size());
  dit::Progress progress(
      {.steps = rounds * (steps + 3) * count, .images_per_step = experiment.runs.front().config.recipe.batch});
  std::int64_t done = 0;
  const auto times = compare::step_times(experiment.runs, data, rounds, steps, exec, [&] {
    stop_if_interrupted();
    progress.update(++done);
  });
  progress.finish();
  moxie::ReplacementFile file(files("times.jsonl"));
  for (std::size_t i = 0; i < times.size(); ++i) {
    const double median = compare::detail::median(times[i]);
    std::cout << experiment.runs[i].name << ": " << median << " ms, " << memory[i] / 1048576 << " MiB\n";
    const nlohmann::json entry{{"name", experiment.runs[i].name},
                               {"group", experiment.runs[i].group},
                               {"config", experiment.runs[i].config},
                               {"step_milliseconds", median},
                               {"rounds", times[i]},
                               {"peak_memory", memory[i]},
                               {"data", data.origin},
                               {"threads", exec.thread_count()},
                               {"instructions", moxie::kernel::built_for().name}};
    const std::string line = entry.dump() + "\n";
    file.write(line.data(), line.size());
  }
  file.commit();
  return 0;
}

int run(Experiment experiment, const fs::path& folder, const Exec& exec) {
  const dit::OutputFolder files(folder);
  compare::Results results(files("results.jsonl"));
  const dit::DataSet data = dit::load_data_set();
  const dit::DataSet test = test_set(data);
  std::cout << "Data: " << data.origin << "\n";
  fit(experiment, data);
  dit::DataSet one;  // stands for all of it where options are looked at
  one.channels = data.channels;
  one.height = data.height;
  one.width = data.width;
  one.class_names = data.class_names;
  one.images = data.images.topRows(1);
  one.labels.resize(1);
  Index left = 0;
  for (const Run& run : experiment.runs) {  // what cannot be is found out now
    left += results.has(run) ? 0 : 1;
    dit::cost_of(run.config);
    const auto model = dit::model_of(run.config);
    compare::sampler_of(run, experiment.measures, model);
    const dit::Training training(run.config, model, one);
  }
  moxie::detail::expect_value(std::max(experiment.measures.samples, experiment.measures.validation) <= test.count(), "measures",
                              "there are no more than " + std::to_string(test.count()) + " images to compare with");
  const nlohmann::json measures = experiment.measures;
  for (const nlohmann::json& entry : results.entries()) {
    if (entry.value("measures", nlohmann::json()) != measures || entry.value("data", "") != data.origin) {
      throw std::runtime_error(files("results.jsonl").string() + ": is of other data or measures: choose another --out");
    }
  }
  std::cout << left << " of " << experiment.runs.size() << " runs are left\n";

  const Classifier<float> classifier(
      {.side = data.height, .channels = data.channels, .classes = Index(data.class_names.size())});
  const moxie::Parameters<float> weights =
      classifier_weights(classifier, data, experiment.measures.classifier_steps, files("classifier.safetensors"), exec);
  const compare::Judgement all = compare::judge(classifier, weights, test.images, exec);
  std::cout << "The classifier knows " << 100 * all.agreement(test.labels) << "% of " << test.count() << " test images\n";
  for (const nlohmann::json& entry : results.entries()) {
    if (entry.value("classifier_accuracy", all.agreement(test.labels)) != all.agreement(test.labels)) {
      throw std::runtime_error(files("results.jsonl").string() + ": was judged by another classifier, which knew " +
                               std::to_string(100 * entry.value("classifier_accuracy", 0.0)) +
                               "%: another machine's, maybe; choose another --out");
    }
  }
  const compare::Judge judge{classifier, weights, all.features.topRows(std::min(experiment.measures.samples, test.count()))};

  for (const Run& run : experiment.runs) {
    if (results.has(run)) {
      continue;
    }
    std::cout << "== " << run.group << ": " << run.name << ", seed " << run.config.recipe.seed << "\n";
    dit::Progress progress({.steps = run.steps, .images_per_step = run.config.recipe.batch});
    nlohmann::json result = compare::execute(run, experiment.measures, data, test, judge, exec, [&](std::int64_t step) {
      stop_if_interrupted();
      progress.update(step);
    });
    progress.finish();
    result["measures"] = experiment.measures;
    result["classifier_accuracy"] = all.agreement(test.labels);
    result["data"] = data.origin;
    result["threads"] = exec.thread_count();
    result["instructions"] = moxie::kernel::built_for().name;
    results.add(result);
    if (result.contains("error")) {
      std::cout << "diverged: " << result["error"] << "\n";
    } else {
      std::cout << "validation loss " << result["validation_loss"] << ", agreement " << result["agreement"] << ", Fréchet "
                << result["frechet"] << "\n";
    }
  }
  std::cout << "All " << experiment.runs.size() << " runs are in " << files("results.jsonl").string() << "\n";
  return 0;
}

int run_program(int argc, char** argv) {
  CLI::App app("Compares feed-forwards, sparse and soft, in one diffusion transformer.");
  app.require_subcommand(1);
  fs::path file = "examples/compare/comparison.json";
  fs::path folder = "out/compare";
  Exec exec;
  CLI::App* run_command = app.add_subcommand("run", "train and measure what is not in the results yet");
  CLI::App* cost_command = app.add_subcommand("cost", "what the runs cost, by arithmetic");
  CLI::App* time_command = app.add_subcommand("time", "measure the steps of the first group in turn, into times.jsonl");
  for (CLI::App* command : {run_command, time_command, cost_command}) {
    command->add_option("--experiment", file, "the runs")->capture_default_str();
  }
  Index rounds = 10;
  time_command->add_option("--rounds", rounds, "times that each run is begun")
      ->capture_default_str()
      ->transform(dit::whole<Index>(1, 1'000'000));
  for (CLI::App* command : {run_command, time_command}) {
    command->add_option("--out", folder, "folder of the results")->capture_default_str();
    command->add_option("--threads", exec.threads, "0: all")->capture_default_str()->transform(dit::whole(0, 65536));
  }
  bool quick = false;
  run_command->add_flag("--quick", quick,
                        "the first group with one seed and a twentieth of the steps: minutes, and says little");
  try {
    app.parse(argc, argv);
    std::signal(SIGINT, dit::commands::interrupt);
    std::signal(SIGTERM, dit::commands::interrupt);
    // A limit of file sizes, and a reader that has gone away, are errors of a write.
    std::signal(SIGXFSZ, SIG_IGN);
    std::signal(SIGPIPE, SIG_IGN);
    Experiment experiment = Experiment::read(file);
    if (quick) {
      experiment.shorten();
    }
    if (cost_command->parsed()) {
      fit(experiment, dit::load_data_set());
      print_cost(experiment);
      return 0;
    }
    if (time_command->parsed()) {
      return time(std::move(experiment), folder, rounds, exec);
    }
    return run(std::move(experiment), folder, exec);
  } catch (const CLI::ParseError& error) {  // among them the request for help
    return app.exit(error);
  } catch (const std::exception& error) {
    std::cerr << "compare: " << dit::terminal_text(error.what()) << "\n";
    return dit::commands::interrupted != 0 ? 130 : 1;
  }
}

}  // namespace

int main(int argc, char** argv) { return dit::finished(run_program(argc, argv), std::cout, "compare"); }

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
#include <CLI/CLI.hpp>
#include <cmath>
#include <csignal>
#include <dit/commands.hpp>
#include <dit/data_set.hpp>
#include <dit/zoo.hpp>
#include <iostream>
#include <optional>

namespace {

using dit::Exec;
using dit::Index;
namespace fs = std::filesystem;

/// The first signal ends a command where nothing is lost, a second one at once.
void interrupt(int signal) {
  dit::commands::interrupted = 1;
  std::signal(signal, SIG_DFL);
}

/// Throws ValueError for options that what is trained has no use for.
void expect_no_idle_options(const CLI::App& train, const dit::TrainingConfig& config) {
  const auto expect = [&](bool useful, std::initializer_list<const char*> names) {
    for (const char* name : names) {
      moxie::detail::expect_value(useful || train.count(name) == 0, name, "this run has no use for it");
    }
  };
  const auto is = [&](const char* feed_forward) { return config.feed_forward == feed_forward; };
  expect(config.process == "ddpm", {"--schedule", "--diffusion-steps"});
  expect(config.process == "flow", {"--times"});
  expect(!is("dense"), {"--experts"});
  expect(is("shared") || is("top-k"), {"--top-k", "--normalize", "--balance", "--score", "--bias-rate", "--token-capacity"});
  expect(config.token_capacity > 0, {"--batch-priority"});
  expect(is("shared"), {"--shared-hidden-dim"});
  expect(is("top-k") || is("soft") || is("dense"), {"--expert"});
  expect(is("soft"), {"--slots-per-expert", "--dispatch", "--combine"});
  expect(is("expert-choice"), {"--capacity-factor"});
  expect(config.model.switch_experts > 0, {"--switch-top-k", "--prior"});
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a diffusion transformer with a mixture of experts, draws with it, and looks at its routing.");
  app.require_subcommand(1);
  dit::TrainingConfig config;
  dit::commands::TrainingOptions training;
  dit::commands::DrawingOptions drawing;
  dit::ForeignOptions foreign;
  dit::UpcyclingOptions upcycling;
  std::optional<bool> learn_sigma;
  fs::path folder = "out";
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
    command->add_option("--out", folder, "folder for everything that is written")->capture_default_str();
    command->add_option("--samples-per-class", drawing.per_class)
        ->capture_default_str()
        ->check(CLI::Range(Index{1}, Index{1000000}));
    command->add_option("--classes", drawing.classes, "numbers of the classes to draw; by default all")
        ->delimiter(',')
        ->check(CLI::NonNegativeNumber);
    command->add_option("--sampler", drawing.sampler.method, "euler or heun (flow), ddpm or ddim (ddpm)")
        ->check(CLI::IsMember({"euler", "heun", "ddpm", "ddim"}));
    command->add_option("--sampling-steps", drawing.sampler.steps,
                        "by default 25 (flow) or 250 (ddpm); of ddpm also \"10,15,20\" or \"ddim50\"");
    command
        ->add_option("--guidance", drawing.guidance,
                     "classifier-free guidance; 1 is none. By default 3, if the model can do with and without classes")
        ->check(finite);
    command
        ->add_option("--guide-channels", drawing.sampler.guided_channels,
                     "the first ones alone; 3 is what the reference's sampler of latents does")
        ->check(CLI::PositiveNumber);
    command->add_option("--eta", drawing.sampler.eta, "noise of ddim")
        ->capture_default_str()
        ->check(CLI::Range(0.0, 1.0) & finite);
    command->add_flag("--clip", drawing.sampler.clip, "the images that ddpm and ddim predict, to [-1,1]");
    command->add_option("--seed", config.recipe.seed)->capture_default_str();
  }
  for (CLI::App* command : {train_command, sample_command, analyse_command, predict_command, zoo_command}) {
    command->add_option("--threads", exec.threads, "0: all cores")->capture_default_str()->check(CLI::NonNegativeNumber);
  }
  for (CLI::App* command : {sample_command, analyse_command, upcycle_command, predict_command}) {
    command->add_option("--checkpoint", checkpoint, "of `dit train`, or a reference's state dict in safetensors")
        ->required()
        ->check(CLI::ExistingFile);
    command->add_option("--heads", foreign.heads, "of a state dict whose size has no name")->check(CLI::PositiveNumber);
    command->add_option("--process", foreign.process, "of a state dict, by default ddpm")
        ->check(CLI::IsMember({"flow", "ddpm"}));
  }
  for (CLI::App* command : {sample_command, analyse_command, predict_command}) {
    command->add_option("--top-k", foreign.top_k, "of a state dict, by default 2")->check(CLI::PositiveNumber);
    command->add_option("--switch-top-k", foreign.switch_top_k, "of a Switch-DiT's state dict, by default 2")
        ->check(CLI::PositiveNumber);
  }
  for (CLI::App* command : {sample_command, analyse_command, predict_command, zoo_command}) {
    command->add_flag("--bf16", bfloat16, "experts in bfloat16: half their memory, and faster where the processor has it");
  }
  zoo_command->add_option("--measure", measured, "times a forward of this model, with random weights")->check(model_name);
  analyse_command->add_option("--bins", drawing.bins, "stretches of the way from noise to image")
      ->capture_default_str()
      ->check(CLI::Range(Index{1}, Index{1000}));
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
      ->add_option("--start-from", training.start_from, "begin with the weights of this checkpoint; its model and process stay")
      ->check(CLI::ExistingFile);
  train_command->add_option("--steps", training.steps)->capture_default_str()->check(CLI::NonNegativeNumber);
  train_command->add_option("--checkpoint-every", training.checkpoint_every, "steps between checkpoints")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  train_command->add_option("--draw-every", training.draw_every, "steps between grids of samples; 0: only at the end")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  train_command
      ->add_option("--spike", training.spike,
                   "stop where ten steps, at least 480 images, have this many times the lowest loss; 0 never does")
      ->capture_default_str()
      ->check(finite & CLI::Validator(
                           [](const std::string& text) {
                             const double value = std::stod(text);
                             return value == 0 || value > 1 ? std::string() : text + " is neither 0 nor more than 1";
                           },
                           "0 or >1"));
  train_command->add_option("--process", config.process, "rectified flow or DDPM")
      ->capture_default_str()
      ->check(CLI::IsMember({"flow", "ddpm"}));
  train_command->add_option("--times", config.recipe.times, "of rectified flow")
      ->capture_default_str()
      ->check(CLI::IsMember({"logit-normal", "uniform"}));
  train_command->add_flag("--stratified", config.recipe.stratified, "a batch's times are spread evenly");
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
  train_command->add_option("--expert", config.expert, "of top-k, soft and dense; by default gelu for soft and dense")
      ->check(CLI::IsMember({"swiglu", "gelu"}));
  train_command->add_flag("--normalize", config.normalize, "the weights of a token's experts sum to 1");
  train_command->add_option("--score", config.score, "of a logit, by which experts are chosen (shared, top-k)")
      ->capture_default_str()
      ->check(CLI::IsMember({"softmax", "sigmoid"}));
  train_command
      ->add_option("--token-capacity", config.token_capacity,
                   "room of an expert, in even shares of an image's tokens; 0: no token is dropped (shared, top-k)")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber & finite);
  train_command->add_flag("--batch-priority", config.batch_priority, "tokens of larger weight get the room first (V-MoE)");
  train_command->add_option("--slots-per-expert", config.slots_per_expert, "soft")->capture_default_str();
  for (const auto& [name, value] : {std::pair{"--dispatch", &config.dispatch}, std::pair{"--combine", &config.combine}}) {
    train_command->add_option(name, *value, "soft")->capture_default_str()->check(CLI::IsMember({"learned", "uniform"}));
  }
  train_command->add_option("--capacity-factor", config.capacity_factor, "expert-choice: experts of a token, on average")
      ->capture_default_str()
      ->check(CLI::PositiveNumber & finite);
  train_command->add_option("--switch-experts", config.model.switch_experts, "Switch-DiT: experts before each block; 0: none")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  train_command->add_option("--switch-top-k", config.model.switch_top_k)->capture_default_str();
  train_command->add_option("--prior", config.recipe.prior, "weight of Switch-DiT's diffusion prior loss")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber & finite);
  train_command->add_option("--balance", config.recipe.balance, "weight of the balance loss")
      ->capture_default_str()
      ->check(finite);
  train_command
      ->add_option("--bias-rate", config.recipe.bias_rate,
                   "of the selection bias, which balances without a loss (DeepSeek-V3: 0.001, with --balance 0); 0: none")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber & finite);
  train_command->add_option("--batch", config.recipe.batch)->capture_default_str()->check(CLI::PositiveNumber);
  train_command->add_option("--micro-batch", config.recipe.micro_batch, "images of a batch that are computed at once; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  train_command->add_option("--rate", config.recipe.optimizer.rate, "learning rate")
      ->capture_default_str()
      ->check(CLI::PositiveNumber & finite);
  train_command->add_option("--weight-decay", config.recipe.optimizer.weight_decay)
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber & finite);
  train_command->add_option("--label-dropout", config.recipe.label_dropout, "share of labels that become \"no class\"")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0) & finite);
  train_command
      ->add_option("--ema-decay", config.recipe.optimizer.ema_decay, "of the averaged weights, which samples are drawn with")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0) & finite);
  train_command->add_option("--warm-up", config.recipe.optimizer.warm_up, "steps")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  for (const char* shape : {"--model",
                            "--feed-forward",
                            "--dim",
                            "--depth",
                            "--patch",
                            "--qk-norm",
                            "--experts",
                            "--hidden-dim",
                            "--shared-hidden-dim",
                            "--expert",
                            "--normalize",
                            "--score",
                            "--bias-rate",
                            "--token-capacity",
                            "--batch-priority",
                            "--slots-per-expert",
                            "--dispatch",
                            "--combine",
                            "--capacity-factor",
                            "--switch-experts",
                            "--learn-sigma",
                            "--schedule",
                            "--diffusion-steps"}) {
    train_command->get_option("--start-from")->excludes(train_command->get_option(shape));
  }
  zoo_command->get_option("--bf16")->needs(zoo_command->get_option("--measure"));
  CLI11_PARSE(app, argc, argv);

  config.model.learn_sigma = learn_sigma.value_or(config.process == "ddpm" || train_command->count("--model") > 0);
  const fs::path last = folder / "checkpoint.safetensors";
  if (std::error_code ignored; training.resume && fs::exists(last, ignored)) {
    try {
      config = dit::config_of(moxie::SafetensorsFile(last));
    } catch (const std::exception& error) {
      std::cerr << "dit: " << error.what() << "\n";
      return 1;
    }
    learn_sigma = config.model.learn_sigma;
    const dit::ModelConfig stored = config.model;
    CLI11_PARSE(app, argc, argv);  // what is said now must be what was said then
    config.model.learn_sigma = *learn_sigma;
    config.model.image_size = stored.image_size;  // which no option says, but --model changes
    config.model.channels = stored.channels;
    config.model.classes = stored.classes;
    training.start_from.reset();
  }
  drawing.seed = config.recipe.seed;
  if (train_command->parsed() || sample_command->parsed() || analyse_command->parsed()) {
    std::signal(SIGINT, interrupt);
    std::signal(SIGTERM, interrupt);
  }
  // A limit of file sizes, and a reader that has gone away, are errors of a write.
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
  try {
    if (zoo_command->parsed()) {
      if (!measured.empty()) {
        return dit::commands::measure(dit::named_model(measured), bfloat16, exec);
      }
      dit::print_zoo(std::cout);
      return 0;
    }
    if (train_command->parsed()) {
      if (training.start_from) {
        foreign.heads = train_command->count("--heads") > 0 ? config.model.heads : 0;
        foreign.process = train_command->count("--process") > 0 ? config.process : foreign.process;
        foreign.top_k = train_command->count("--top-k") > 0 ? config.top_k : 0;
        foreign.switch_top_k = train_command->count("--switch-top-k") > 0 ? config.model.switch_top_k : 0;
        const dit::Recipe recipe = config.recipe;
        config = dit::config_of(moxie::SafetensorsFile(*training.start_from), foreign);
        const double bias_rate = config.recipe.bias_rate;  // whether there are biases is a matter of the model
        config.recipe = recipe;
        config.recipe.bias_rate = bias_rate;
      }
      expect_no_idle_options(*train_command, config);
      return dit::commands::train(config, training, drawing, folder, exec);
    }
    if (upcycle_command->parsed()) {
      return dit::commands::upcycle(checkpoint, foreign, upcycling, out_file);
    }
    if (predict_command->parsed()) {
      return dit::commands::predict(checkpoint, foreign, bfloat16, input, out_file, exec);
    }
    return dit::commands::sample(checkpoint, foreign, drawing, bfloat16, analyse_command->parsed(), folder, exec);
  } catch (const std::bad_alloc&) {
    std::cerr << "dit: there is not enough memory\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "dit: " << error.what() << "\n";
    return 1;
  }
}

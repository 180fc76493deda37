// SPDX-License-Identifier: MIT
#include <algorithm>
#include <dit/command_line.hpp>
#include <dit/data_set.hpp>
#include <dit/options.hpp>
#include <dit/zoo.hpp>
#include <initializer_list>
#include <iostream>
#include <utility>

namespace dit {

namespace {

namespace fs = std::filesystem;

constexpr std::int64_t most_steps = 1'000'000'000'000;
constexpr Index most_experts = 65536;
constexpr Index most_features = 10'000'000;

/// A weight of a loss, a rate or a factor: what float can multiply with.
CLI::Validator weight() { return real(0, 1e6); }

CLI::Validator model_name() {
  return {[](const std::string& text) {
            try {
              named_model(text);
              return std::string();
            } catch (const moxie::ValueError& error) {
              return terminal_text(error.what());
            }
          },
          "NAME"};
}

}  // namespace

CommandLine::CommandLine()
    : app("Trains a diffusion transformer with a mixture of experts, draws with it, and looks at its routing."),
      train_(app.add_subcommand("train", "train, then draw")),
      sample_(app.add_subcommand("sample", "draw with a checkpoint")),
      analyse_(app.add_subcommand("analyse", "draw, and look at who is routed where")),
      upcycle_(app.add_subcommand("upcycle", "make a mixture of experts of a dense checkpoint")),
      predict_(app.add_subcommand("predict", "the network's output for tensors x, t and y")),
      zoo_(app.add_subcommand("zoo", "the named models of the papers: parameters, multiply-adds, memory")) {
  app.require_subcommand(1);
  add_drawing_options();
  add_machine_options();
  add_checkpoint_options();
  add_upcycling_options();
  // Options are read in this order, so that those after --model change the named model.
  train_
      ->add_option_function<std::string>(
          "--model", [&](const std::string& name) { apply(named_model(name), config_); },
          "the shape of a named model (`dit zoo`), which the options below change")
      ->check(model_name());
  add_run_options();
  add_process_options();
  add_model_options();
  add_feed_forward_options();
  add_recipe_options();
  exclude_shape_options();
}

void CommandLine::add_drawing_options() {
  for (CLI::App* command : {train_, sample_, analyse_}) {
    command->add_option("--out", folder_, "folder for everything that is written")->capture_default_str();
    command->add_option("--samples-per-class", drawing_.per_class)
        ->capture_default_str()
        ->transform(whole<Index>(1, 1'000'000));
    command->add_option("--classes", drawing_.classes, "numbers of the classes to draw; by default all")
        ->delimiter(',')
        ->transform(whole<Index>(0, 1'000'000));
    command->add_option("--sampler", drawing_.sampler.method, "euler or heun (flow), ddpm or ddim (ddpm)")
        ->check(CLI::IsMember({"euler", "heun", "ddpm", "ddim"}));
    command->add_option("--sampling-steps", drawing_.sampler.steps,
                        "by default 25 (flow) or 250 (ddpm); of ddpm also \"10,15,20\" or \"ddim50\"");
    command
        ->add_option("--guidance", drawing_.guidance,
                     "classifier-free guidance; 1 is none. By default 3, if the model can do with and without classes")
        ->transform(real(-1e6, 1e6));
    command
        ->add_option("--guide-channels", drawing_.sampler.guided_channels,
                     "the first ones only; 3 is what the reference's sampler of latents does")
        ->transform(whole<Index>(1, 65536));
    command->add_option("--eta", drawing_.sampler.eta, "noise of ddim")->capture_default_str()->transform(real(0, 1));
    command->add_flag("--clip", drawing_.sampler.clip, "the images that ddpm and ddim predict, to [-1,1]");
    command->add_option("--seed", config_.recipe.seed)->capture_default_str()->transform(whole<std::uint64_t>(0));
  }
  analyse_->add_option("--bins", drawing_.bins, "stretches of the way from noise to image")
      ->capture_default_str()
      ->transform(whole<Index>(1, 1000));
}

void CommandLine::add_machine_options() {
  for (CLI::App* command : {train_, sample_, analyse_, predict_, zoo_}) {
    command->add_option("--threads", exec_.threads, "0: all cores")->capture_default_str()->transform(whole(0, 65536));
  }
  for (CLI::App* command : {sample_, analyse_, predict_, zoo_}) {
    command->add_flag("--bf16", bfloat16_, "experts in bfloat16: half their memory, and faster where the processor has it");
  }
  zoo_->add_option("--measure", measured_, "times a forward of this model, with random weights")->check(model_name());
  zoo_->get_option("--bf16")->needs(zoo_->get_option("--measure"));
}

void CommandLine::add_checkpoint_options() {
  for (CLI::App* command : {sample_, analyse_, upcycle_, predict_}) {
    command->add_option("--checkpoint", checkpoint_, "of `dit train`, or a reference's state dict in safetensors")
        ->required()
        ->check(CLI::ExistingFile);
    command->add_option("--heads", foreign_.heads, "of a state dict whose size has no name")
        ->transform(whole<Index>(1, most_features));
    command->add_option("--process", foreign_.process, "of a state dict, by default ddpm")
        ->check(CLI::IsMember({"flow", "ddpm"}));
  }
  for (CLI::App* command : {sample_, analyse_, predict_}) {
    command->add_option("--top-k", foreign_.top_k, "of a state dict, by default 2")->transform(whole<Index>(1, most_experts));
    command->add_option("--switch-top-k", foreign_.switch_top_k, "of a Switch-DiT's state dict, by default 2")
        ->transform(whole<Index>(1, most_experts));
  }
}

void CommandLine::add_upcycling_options() {
  for (CLI::App* command : {upcycle_, predict_}) {
    command->add_option("--out", out_file_, "the file that is written")->required();
  }
  predict_->add_option("--input", input_, "a safetensors file")->required()->check(CLI::ExistingFile);
  upcycle_->add_option("--experts", upcycling_.experts)->capture_default_str()->transform(whole<Index>(1, most_experts));
  upcycle_->add_option("--top-k", upcycling_.top_k)->capture_default_str()->transform(whole<Index>(1, most_experts));
  upcycle_->add_flag("--equal", upcycling_.equal, "normalized weights, so that it computes what the dense model computes");
  upcycle_->add_option("--seed", upcycling_.seed, "of the gates")->capture_default_str()->transform(whole<std::uint64_t>(0));
}

void CommandLine::add_run_options() {
  train_->add_option("--data", training_.data,
                     "IDX files (a folder, or the images of one set) or a safetensors file with images and labels; by "
                     "default Fashion-MNIST in " +
                         std::string(fashion_mnist_directory));
  train_->add_flag("--resume", training_.resume, "go on from the checkpoint in the folder");
  train_
      ->add_option("--start-from", training_.start_from,
                   "begin with the weights of this checkpoint; its model and process stay")
      ->check(CLI::ExistingFile);
  train_->add_option("--steps", training_.steps)->capture_default_str()->transform(whole<std::int64_t>(0, most_steps));
  train_->add_option("--checkpoint-every", training_.checkpoint_every, "steps between checkpoints")
      ->capture_default_str()
      ->transform(whole<std::int64_t>(1, most_steps));
  train_->add_option("--draw-every", training_.draw_every, "steps between grids of samples; 0: only at the end")
      ->capture_default_str()
      ->transform(whole<std::int64_t>(0, most_steps));
  train_
      ->add_option("--spike", training_.spike,
                   "stop where ten steps, at least 480 images, have this many times the lowest loss; 0 never does")
      ->capture_default_str()
      ->transform(weight() & CLI::Validator(
                                 [](const std::string& text) {
                                   const double value = number_in<double>(text).value_or(1);
                                   return value == 0 || value > 1 ? std::string() : text + " is neither 0 nor more than 1";
                                 },
                                 "0 or >1"));
}

void CommandLine::add_process_options() {
  train_->add_option("--process", config_.process, "rectified flow or DDPM")
      ->capture_default_str()
      ->check(CLI::IsMember({"flow", "ddpm"}));
  train_->add_option("--times", config_.recipe.times, "of rectified flow")
      ->capture_default_str()
      ->check(CLI::IsMember({"logit-normal", "uniform"}));
  train_->add_flag("--stratified", config_.recipe.stratified, "a batch's times are spread evenly");
  train_->add_option("--schedule", config_.schedule, "of DDPM")
      ->capture_default_str()
      ->check(CLI::IsMember({"linear", "cosine"}));
  train_->add_option("--diffusion-steps", config_.diffusion_steps, "of DDPM")
      ->capture_default_str()
      ->transform(whole<Index>(2, 1'000'000));
  train_->add_flag("--learn-sigma,!--no-learn-sigma", learn_sigma_, "by default DDPM learns its variance");
}

void CommandLine::add_model_options() {
  const auto size = [&](const char* name, Index& value, Index most) {
    train_->add_option(name, value)->capture_default_str()->transform(whole<Index>(1, most));
  };
  train_->add_option("--feed-forward", config_.feed_forward)
      ->capture_default_str()
      ->check(CLI::IsMember({"shared", "top-k", "expert-choice", "soft", "dense"}));
  size("--dim", config_.model.dim, most_features);
  size("--depth", config_.model.depth, 10'000);
  size("--heads", config_.model.heads, most_features);
  size("--patch", config_.model.patch, 32768);
  train_->add_flag("--qk-norm", config_.model.qk_norm, "attention of DiT-MoE's large models");
  train_->add_option("--switch-experts", config_.model.switch_experts, "Switch-DiT: experts before each block; 0: none")
      ->capture_default_str()
      ->transform(whole<Index>(0, most_experts));
  size("--switch-top-k", config_.model.switch_top_k, most_experts);
}

void CommandLine::add_feed_forward_options() {
  const auto size = [&](const char* name, Index& value, Index most, const char* text = "") {
    train_->add_option(name, value, text)->capture_default_str()->transform(whole<Index>(1, most));
  };
  size("--experts", config_.experts, most_experts);
  size("--top-k", config_.top_k, most_experts);
  size("--hidden-dim", config_.hidden_dim, most_features, "of an expert");
  size("--shared-hidden-dim", config_.shared_hidden_dim, most_features, "of the shared experts");
  train_->add_option("--expert", config_.expert, "of top-k, soft and dense; by default gelu for soft and dense")
      ->check(CLI::IsMember({"swiglu", "gelu"}));
  train_->add_flag("--normalize", config_.normalize, "the weights of a token's experts sum to 1");
  train_->add_option("--score", config_.score, "of a logit, by which experts are chosen (shared, top-k)")
      ->capture_default_str()
      ->check(CLI::IsMember({"softmax", "sigmoid"}));
  train_
      ->add_option("--token-capacity", config_.token_capacity,
                   "room of an expert, in even shares of an image's tokens; 0: no token is dropped (shared, top-k)")
      ->capture_default_str()
      ->transform(weight());
  train_->add_flag("--batch-priority", config_.batch_priority, "tokens of larger weight get the room first (V-MoE)");
  size("--slots-per-expert", config_.slots_per_expert, 1'000'000, "soft");
  for (const auto& [name, value] : {std::pair{"--dispatch", &config_.dispatch}, std::pair{"--combine", &config_.combine}}) {
    train_->add_option(name, *value, "soft")->capture_default_str()->check(CLI::IsMember({"learned", "uniform"}));
  }
  train_->add_option("--capacity-factor", config_.capacity_factor, "expert-choice: experts of a token, on average")
      ->capture_default_str()
      ->transform(positive(1e6));
}

void CommandLine::add_recipe_options() {
  Recipe& recipe = config_.recipe;
  train_->add_option("--prior", recipe.prior, "weight of Switch-DiT's diffusion prior loss")
      ->capture_default_str()
      ->transform(weight());
  train_->add_option("--balance", recipe.balance, "weight of the balance loss")->capture_default_str()->transform(weight());
  train_
      ->add_option("--bias-rate", recipe.bias_rate,
                   "of the selection bias, which balances without a loss (DeepSeek-V3: 0.001, with --balance 0); 0: none")
      ->capture_default_str()
      ->transform(weight());
  train_->add_option("--batch", recipe.batch)->capture_default_str()->transform(whole<Index>(1, 1'000'000));
  train_->add_option("--micro-batch", recipe.micro_batch, "images of a batch that are computed at once; 0: all")
      ->capture_default_str()
      ->transform(whole<Index>(0, 1'000'000));
  train_->add_option("--rate", recipe.optimizer.rate, "learning rate")->capture_default_str()->transform(positive(1e6));
  train_->add_option("--weight-decay", recipe.optimizer.weight_decay)->capture_default_str()->transform(weight());
  train_->add_option("--label-dropout", recipe.label_dropout, "share of labels that become \"no class\"")
      ->capture_default_str()
      ->transform(real(0, 1));
  train_->add_option("--ema-decay", recipe.optimizer.ema_decay, "of the averaged weights, which samples are drawn with")
      ->capture_default_str()
      ->transform(real(0, 1));
  train_->add_option("--warm-up", recipe.optimizer.warm_up, "steps")
      ->capture_default_str()
      ->transform(whole<std::int64_t>(0, most_steps));
}

void CommandLine::exclude_shape_options() {
  for (const char* shape : {"--model",
                            "--feed-forward",
                            "--dim",
                            "--depth",
                            "--patch",
                            "--qk-norm",
                            "--experts",
                            "--hidden-dim",
                            "--expert",
                            "--shared-hidden-dim",
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
    train_->get_option("--start-from")->excludes(train_->get_option(shape));
  }
}

void CommandLine::parse(int argc, char** argv) {
  app.parse(argc, argv);
  config_.model.learn_sigma = learn_sigma_.value_or(config_.process == "ddpm" || train_->count("--model") > 0);
  std::error_code ignored;
  if (training_.resume && fs::exists(folder_ / "checkpoint.safetensors", ignored)) {
    resume(argc, argv);
  }
  drawing_.seed = config_.recipe.seed;
  if (train_->parsed()) {
    if (training_.start_from) {
      start_from(*training_.start_from);
    }
    expect_no_idle_options();
  }
}

/// Options that are said now must be what was said then, so they are read again, on top of the checkpoint's.
void CommandLine::resume(int argc, char** argv) {
  config_ = config_of(SafetensorsFile(folder_ / "checkpoint.safetensors"));
  learn_sigma_ = config_.model.learn_sigma;
  const ModelConfig stored = config_.model;
  app.parse(argc, argv);
  config_.model.learn_sigma = *learn_sigma_;
  config_.model.image_size = stored.image_size;  // which no option says, but --model changes
  config_.model.channels = stored.channels;
  config_.model.classes = stored.classes;
  training_.start_from.reset();
}

/// The model and the process are the checkpoint's, the recipe is that of the options.
void CommandLine::start_from(const fs::path& checkpoint) {
  foreign_.heads = train_->count("--heads") > 0 ? config_.model.heads : 0;
  foreign_.process = train_->count("--process") > 0 ? config_.process : foreign_.process;
  foreign_.top_k = train_->count("--top-k") > 0 ? config_.top_k : 0;
  foreign_.switch_top_k = train_->count("--switch-top-k") > 0 ? config_.model.switch_top_k : 0;
  const Recipe recipe = config_.recipe;
  config_ = config_of(SafetensorsFile(checkpoint), foreign_);
  const double bias_rate = config_.recipe.bias_rate;  // whether there are biases is a matter of the model
  config_.recipe = recipe;
  config_.recipe.bias_rate = bias_rate;
}

/// Throws ValueError for options that what is trained has no use for.
void CommandLine::expect_no_idle_options() const {
  const auto expect = [&](bool useful, std::initializer_list<const char*> names) {
    for (const char* name : names) {
      moxie::detail::expect_value(useful || train_->count(name) == 0, name, "this run has no use for it");
    }
  };
  const auto is = [&](const char* feed_forward) { return config_.feed_forward == feed_forward; };
  expect(config_.process == "ddpm", {"--schedule", "--diffusion-steps"});
  expect(config_.process == "flow", {"--times"});
  expect(!is("dense"), {"--experts"});
  expect(is("shared") || is("top-k"), {"--top-k", "--normalize", "--balance", "--score", "--bias-rate", "--token-capacity"});
  expect(config_.token_capacity > 0, {"--batch-priority"});
  expect(is("shared"), {"--shared-hidden-dim"});
  expect(is("top-k") || is("soft") || is("dense"), {"--expert"});
  expect(is("soft"), {"--slots-per-expert", "--dispatch", "--combine"});
  expect(is("expert-choice"), {"--capacity-factor"});
  expect(config_.model.switch_experts > 0, {"--switch-top-k", "--prior"});
}

int CommandLine::run() const {
  if (zoo_->parsed()) {
    if (!measured_.empty()) {
      return commands::measure(named_model(measured_), bfloat16_, exec_);
    }
    print_zoo(std::cout);
    return 0;
  }
  if (upcycle_->parsed()) {
    return commands::upcycle(checkpoint_, foreign_, upcycling_, out_file_);
  }
  if (predict_->parsed()) {
    return commands::predict(checkpoint_, foreign_, bfloat16_, input_, out_file_, exec_);
  }
  // These write several files, and end where nothing is lost.
  std::signal(SIGINT, commands::interrupt);
  std::signal(SIGTERM, commands::interrupt);
  if (train_->parsed()) {
    return commands::train(config_, training_, drawing_, folder_, exec_);
  }
  return commands::sample(checkpoint_, foreign_, drawing_, bfloat16_, analyse_->parsed(), folder_, exec_);
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <CLI/CLI.hpp>
#include <dit/commands.hpp>
#include <optional>
#include <string>

namespace dit {

/// The options of `dit` and of its subcommands, and their values.
class CommandLine {
 public:
  CommandLine();
  CommandLine(const CommandLine&) = delete;
  CommandLine& operator=(const CommandLine&) = delete;

  /// Reads the options. A training that goes on starts from the options of its checkpoint, and one that starts from another
  /// checkpoint has that one's model. Throws CLI::ParseError, SafetensorsError, ValueError and std::runtime_error.
  void parse(int argc, char** argv);

  /// Runs the subcommand that was asked for, and returns the exit status. Throws what stops it.
  int run() const;

  CLI::App app;

 private:
  void add_drawing_options();
  void add_checkpoint_options();
  void add_machine_options();
  void add_upcycling_options();
  void add_run_options();
  void add_process_options();
  void add_model_options();
  void add_feed_forward_options();
  void add_recipe_options();
  void exclude_shape_options();
  void resume(int argc, char** argv);
  void start_from(const std::filesystem::path& checkpoint);
  void expect_no_idle_options() const;

  CLI::App* train_;
  CLI::App* sample_;
  CLI::App* analyse_;
  CLI::App* upcycle_;
  CLI::App* predict_;
  CLI::App* zoo_;

  TrainingConfig config_;
  commands::TrainingOptions training_;
  commands::DrawingOptions drawing_;
  ForeignOptions foreign_;
  UpcyclingOptions upcycling_;
  std::optional<bool> learn_sigma_;
  std::filesystem::path folder_ = "out";
  std::filesystem::path checkpoint_;
  std::filesystem::path input_;
  std::filesystem::path out_file_;
  bool bfloat16_ = false;
  std::string measured_;
  Exec exec_;
};

}  // namespace dit

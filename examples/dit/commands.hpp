// SPDX-License-Identifier: MIT
#pragma once

#include <csignal>
#include <dit/checkpoint.hpp>
#include <dit/sampling.hpp>
#include <dit/upcycling.hpp>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

/// What the subcommands of `dit` do; command_line.cpp reads their options. They return the exit status, and throw what stops
/// them.
namespace dit::commands {

namespace fs = std::filesystem;

/// Set by Ctrl-C: a command ends where nothing is lost.
inline volatile std::sig_atomic_t interrupted = 0;

/// For `std::signal`: the first signal ends a command where nothing is lost, a second one ends it at once.
inline void interrupt(int signal) {
  interrupted = 1;
  std::signal(signal, SIG_DFL);
}

/// Thrown where an interrupted command ends: something is missing that it was to write.
struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void stop_if_interrupted(const std::string& what) {
  if (interrupted != 0) {
    throw Interrupted(what);
  }
}

struct DrawingOptions {
  Index per_class = 100;
  std::vector<Index> classes = {};  // none: all
  SamplerConfig sampler = {.steps = ""};
  std::optional<double> guidance = {};  // none: 3, or 1 where the model has not learned to do without classes
  std::uint64_t seed = 1;
  Index bins = 10;  // of the way from noise to image, that the analysis tells apart

  /// A label for each image, class after class in turn. Throws ValueError for classes that there are not.
  std::vector<std::int64_t> labels(Index count) const {
    std::vector<Index> drawn = classes;
    for (Index i = 0; i < count && classes.empty(); ++i) {
      drawn.push_back(i);
    }
    std::vector<std::int64_t> labels;
    for (Index i = 0; i < per_class * Index(drawn.size()); ++i) {
      const Index label = drawn[std::size_t(i) % drawn.size()];
      moxie::detail::expect_value(label >= 0 && label < count, "--classes",
                                  std::to_string(label) + " is not one of " + std::to_string(count) + " classes");
      labels.push_back(label);
    }
    return labels;
  }

  /// With the process's own number of steps, where nobody gave one. Throws ValueError for guidance that cannot be.
  SamplerConfig sampler_for(const TrainingConfig& trained) const {
    SamplerConfig config = sampler;
    if (config.steps.empty()) {
      config.steps = std::to_string(trained.process == "flow" ? 25 : std::min<Index>(250, trained.diffusion_steps));
    }
    const bool both = trained.recipe.label_dropout > 0 && trained.recipe.label_dropout < 1;
    config.guidance = guidance.value_or(both ? 3 : 1);
    moxie::detail::expect_value(both || config.guidance == 1, "--guidance",
                                "the model was not trained both with and without classes (--label-dropout): it can be 1 only");
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

int train(TrainingConfig config, const TrainingOptions& options, const DrawingOptions& drawing, const fs::path& folder,
          const Exec& exec);
/// With `analyse`, who was routed where, too.
int sample(const fs::path& checkpoint, const ForeignOptions& foreign, const DrawingOptions& drawing, bool bfloat16,
           bool analyse, const fs::path& folder, const Exec& exec);
int upcycle(const fs::path& checkpoint, const ForeignOptions& foreign, const UpcyclingOptions& options, const fs::path& out);
/// Of tensors x (B,C,H,W), t (B) and y (B), the network's output (B,Cout,H,W).
int predict(const fs::path& checkpoint, const ForeignOptions& foreign, bool bfloat16, const fs::path& input,
            const fs::path& out, const Exec& exec);
/// Makes a named mixture with random weights, the same in every block, and times a forward of one image.
int measure(const NamedModel& named, bool bfloat16, const Exec& exec);

}  // namespace dit::commands

// SPDX-License-Identifier: MIT
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <compare/classifier.hpp>
#include <compare/distance.hpp>
#include <compare/results.hpp>
#include <dit/analysis_output.hpp>
#include <dit/cost.hpp>
#include <dit/drawing.hpp>
#include <dit/training.hpp>
#include <fstream>
#include <locale>

namespace compare {

/// Images with noise and times that are the same for every run: parts of one time each, the times evenly spread over the
/// quantiles of the process's own.
class Validation {
 public:
  static constexpr Index part = 50;

  Validation(const dit::TrainingConfig& config, const dit::DataSet& data, Index images, const Exec& exec)
      : process_(dit::process_of(config)) {
    moxie::detail::expect_value(
        images >= 1 && images <= data.count(), "Validation",
        "there are " + std::to_string(data.count()) + " images, and " + std::to_string(images) + " are asked for");
    const Index parts = (images + part - 1) / part;
    for (Index i = 0; i < parts; ++i) {
      const Index first = i * part;
      const Index n = std::min(part, images - first);
      dit::Batch<float> batch;
      batch.clean = data.images.middleRows(first, n);
      batch.noise = moxie::random_normal<float>(n, data.images.cols(), Rng(20).split(std::uint64_t(i)));
      const double quantile = (double(i) + 0.5) / double(parts);
      const double time = std::visit([&](const auto& p) { return double(p.time(quantile)); }, process_);
      batch.times.assign(std::size_t(n), float(time));
      batch.labels.assign(data.labels.begin() + first, data.labels.begin() + first + n);
      batch.add_noise(process_, exec);
      parts_.push_back(std::move(batch));
    }
  }

  /// The mean loss. `observe(time, labels)` is called after each part's forward, on the tape.
  template <class AnyModel, class Observe>
  double operator()(const AnyModel& model, ParameterView<const float> weights, typename AnyModel::Tape& tape, const Exec& exec,
                    Observe&& observe) const {
    double sum = 0;
    Index count = 0;
    Matrix<float> v, dv;
    for (const dit::Batch<float>& batch : parts_) {
      v.resize(batch.size(), model.config().output_dim());
      dv.resize(batch.size(), model.config().output_dim());
      model.forward(weights, batch.images, batch.times, batch.labels, v, tape, exec);
      sum += batch.loss(process_, 0, v, dv) * double(batch.size());
      count += batch.size();
      observe(double(batch.times.front()), batch.labels);
    }
    return sum / double(count);
  }

 private:
  dit::Process process_;
  std::vector<dit::Batch<float>> parts_;
};

/// What judges drawn images: a classifier, and the features of real ones.
struct Judge {
  const Classifier<float>& classifier;
  const moxie::Parameters<float>& weights;
  Matrix<float> real;  ///< features of as many images as are drawn
};

namespace detail {

/// Whether the system counts this process's peak memory anew from now on.
inline bool reset_peak_memory() {
  std::ofstream file("/proc/self/clear_refs");
  file << '5' << std::flush;
  return bool(file);
}
/// Bytes of this process: now ("VmRSS:"), or at most since the reset ("VmHWM:").
inline std::int64_t memory(const std::string& which) {
  std::ifstream status("/proc/self/status");
  status.imbue(std::locale::classic());
  for (std::string word; status >> word;) {
    if (word == which) {
      std::int64_t kilobytes = 0;
      status >> kilobytes;
      return kilobytes * 1024;
    }
  }
  return 0;
}

/// Experts that each block's tokens are routed to: those of its feed-forward, or where that is dense, of Switch-DiT's mask.
template <class AnyModel>
std::vector<Index> experts_of_blocks(const AnyModel& model) {
  std::vector<Index> experts;
  for (Index block = 0; block < model.config().depth; ++block) {
    const Index routed = dit::routed_experts(model.feed_forward(block).layout());
    experts.push_back(routed > 0 ? routed : model.config().switch_experts);
  }
  return experts;
}

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace detail

/// Counts who was routed where in a layer's forward: choices that a capacity dropped, too.
template <class Tape>
void count_routing(dit::RoutingCounts& counts, Index block, Index bin, const Tape& tape, const std::vector<Index>& labels) {
  dit::visit_plan(tape, [&](const auto& plan) {
    if (const auto* const router = dit::top_k_tape(tape); router != nullptr) {
      const std::span<const Index> choices = router->choices();
      moxie::SparsePlan<float> all;
      all.build(plan.tokens(), plan.experts(), router->top_k(), choices, std::vector<float>(choices.size(), 1.0F));
      counts.add(block, bin, all, labels);
    } else {
      counts.add(block, bin, plan, labels);
    }
  });
}

/// Share of the tokens that no expert computes.
template <class Plan>
double unserved(const Plan& plan) {
  if constexpr (requires { plan.token(Index{0}); }) {
    std::vector<char> served(std::size_t(plan.tokens()), 0);
    for (Index r = 0; r < plan.rows(); ++r) {
      served[std::size_t(plan.token(r))] = 1;
    }
    return double(std::count(served.begin(), served.end(), 0)) / double(std::max<Index>(plan.tokens(), 1));
  }
  return 0;
}

/// How a run's images are drawn. Throws ValueError, or std::invalid_argument for steps that cannot be read.
template <class AnyModel>
dit::Sampler<AnyModel, float> sampler_of(const Run& run, const Measures& measures, const AnyModel& model) {
  const double dropout = run.config.recipe.label_dropout;
  moxie::detail::expect_value(measures.guidance == 1 || (dropout > 0 && dropout < 1), run.name,
                              "is not trained both with and without classes (label_dropout): guidance can be 1 alone");
  return {dit::process_of(run.config),
          {.steps = measures.sampling_steps, .guidance = measures.guidance, .clip = run.config.process == "ddpm"},
          model};
}

/// Milliseconds of a training step of each run: in every round each run is begun anew and takes three steps and then `steps`
/// more, whose median counts, so that what else the machine does meets all alike. A run's times, a round each.
/// `observe()` is called after each step, and may throw.
template <class Observe>
std::vector<std::vector<double>> step_times(std::span<const Run> runs, const dit::DataSet& data, Index rounds, Index steps,
                                            const Exec& exec, Observe&& observe) {
  using Clock = std::chrono::steady_clock;
  std::vector<std::vector<double>> times(runs.size());
  for (Index round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < runs.size(); ++i) {
      const auto model = dit::model_of(runs[i].config);
      dit::Training training(runs[i].config, model, data);
      std::vector<double> milliseconds;
      for (Index step = -3; step < steps; ++step) {
        const auto start = Clock::now();
        training.step(exec);
        const std::chrono::duration<double, std::milli> time = Clock::now() - start;
        if (step >= 0) {
          milliseconds.push_back(time.count());
        }
        observe();
      }
      times[i].push_back(detail::median(milliseconds));
    }
  }
  return times;
}

/// Bytes that the process takes for three steps of a run, at most at once, beside what it has: measured in a child of this
/// process, so that what others left behind does not count. No thread may have been started before (a child has none of them).
/// 0 where the system does not say.
inline std::int64_t step_memory(const Run& run, const dit::DataSet& data, const Exec& exec) {
  std::array<int, 2> pipe{};
  if (::pipe(pipe.data()) != 0) {
    return 0;
  }
  const pid_t child = ::fork();
  if (child == 0) {
    std::int64_t bytes = 0;
    try {
      const bool counts = detail::reset_peak_memory();
      const std::int64_t before = detail::memory("VmRSS:");
      const auto model = dit::model_of(run.config);
      dit::Training training(run.config, model, data);
      for (int step = 0; step < 3; ++step) {
        training.step(exec);
      }
      bytes = counts ? detail::memory("VmHWM:") - before : 0;
    } catch (const std::exception&) {  // then it is not known
    }
    const bool written = ::write(pipe[1], &bytes, sizeof bytes) == ssize_t{sizeof bytes};
    std::_Exit(written ? 0 : 1);
  }
  ::close(pipe[1]);
  std::int64_t bytes = 0;
  if (child < 0 || ::read(pipe[0], &bytes, sizeof bytes) != ssize_t{sizeof bytes}) {
    bytes = 0;
  }
  ::close(pipe[0]);
  if (child > 0) {
    int status = 0;
    ::waitpid(child, &status, 0);
  }
  return bytes;
}

namespace detail {

/// Who is routed where in the validation: counts of blocks, and how many choices and tokens no expert took.
class BlockRouting {
 public:
  template <class AnyModel>
  BlockRouting(const AnyModel& model, double latest)
      : experts_(experts_of_blocks(model)),
        most_(*std::max_element(experts_.begin(), experts_.end())),
        of_mask_(dit::routed_experts(model.feed_forward().layout()) == 0),
        latest_(latest),
        counts_({model.config().depth, most_, model.config().classes, model.config().tokens(), bins}),
        dropped_(experts_.size(), 0.0),
        unserved_(experts_.size(), 0.0) {}

  /// Of a forward's tape.
  template <class Tape>
  void add(double time, const std::vector<Index>& labels, const Tape& tape) {
    const Index bin = std::clamp(Index(time / latest_ * double(bins)), Index{0}, bins - 1);
    for (std::size_t block = 0; block < experts_.size(); ++block) {
      if (experts_[block] == most_) {
        const auto look = [&](const auto& layer) {
          count_routing(counts_, Index(block), bin, layer, labels);
          dropped_[block] += layer.statistics().dropped;
          dit::visit_plan(layer, [&](const auto& plan) { unserved_[block] += unserved(plan); });
        };
        of_mask_ ? look(tape.blocks[block].gated) : look(tape.blocks[block].feed_forward);
      }
    }
    ++parts_;
  }

  /// An object for each block that routes.
  nlohmann::json blocks() const {
    nlohmann::json blocks = nlohmann::json::array();
    const Matrix<double> load = counts_.load();
    const auto information = dit::information_by_layer(counts_);
    for (std::size_t block = 0; block < experts_.size(); ++block) {
      const dit::LayerInformation& bits = information[block];
      const auto of_block = load.row(Index(block));
      if (experts_[block] == most_) {
        blocks.push_back({{"block", block},
                          {"max_violation", of_block.maxCoeff() * double(most_) - 1},
                          {"entropy", bits.load / std::log2(double(most_))},
                          {"dead_experts", (of_block.array() == 0).count()},
                          {"dropped", dropped_[block] / double(parts_)},
                          {"unserved", unserved_[block] / double(parts_)},
                          {"bits_of_class", bits.of_class},
                          {"bits_of_position", bits.of_position},
                          {"bits_of_timestep", bits.of_timestep}});
      }
    }
    return blocks;
  }

 private:
  static constexpr Index bins = 10;

  std::vector<Index> experts_;
  Index most_;
  bool of_mask_;  // Switch-DiT's, whose feed-forwards are dense
  double latest_;
  dit::RoutingCounts counts_;
  std::vector<double> dropped_;
  std::vector<double> unserved_;
  Index parts_ = 0;
};

/// The mean loss of the last steps.
inline double last_loss(const std::vector<dit::StepReport>& history) {
  double loss = 0;
  const std::size_t last = std::min<std::size_t>(history.size(), 100);
  for (std::size_t i = history.size() - last; i < history.size(); ++i) {
    loss += double(history[i].loss) / double(last);
  }
  return loss;
}

/// Images of labels, drawn in parts.
template <class AnyModel, class Observe>
Matrix<float> drawn_images(const dit::Sampler<AnyModel, float>& sampler, const AnyModel& model,
                           ParameterView<const float> weights, std::span<const std::int64_t> labels,
                           typename AnyModel::Tape& tape, const Exec& exec, Observe&& observe) {
  const auto count = Index(labels.size());
  Matrix<float> images(count, model.config().image_dim());
  constexpr Index part = 50;
  for (Index first = 0; first < count; first += part) {
    const Index n = std::min(part, count - first);
    const std::vector<Index> some(labels.begin() + first, labels.begin() + first + n);
    images.middleRows(first, n) =
        sampler(weights, some, Rng(21), std::uint64_t(first), tape, exec, [&](auto...) { observe(); });
  }
  return images;
}

/// What is measured of drawn images.
inline void add_judgement(nlohmann::json& result, const Matrix<float>& images, std::span<const std::int64_t> labels,
                          const Measures& measures, const Judge& judge_of, const Exec& exec) {
  const Judgement judgement = judge(judge_of.classifier, judge_of.weights, images, exec);
  result["agreement"] = judgement.agreement(labels);
  result["frechet"] = frechet_distance(judge_of.real, judgement.features);
  const PrecisionRecall near = precision_recall(judge_of.real, judgement.features, measures.neighbours, exec);
  result["precision"] = near.precision;
  result["recall"] = near.recall;
}

/// What a line of the results says of a run before it begins.
inline nlohmann::json line_of(const Run& run) {
  const dit::Cost cost = dit::cost_of(run.config);
  return {{"name", run.name},
          {"group", run.group},
          {"steps", run.steps},
          {"config", run.config},
          {"parameters", cost.parameters},
          {"activated_parameters", cost.activated},
          {"multiply_adds", cost.multiply_adds}};
}

}  // namespace detail

/// Trains a run, measures it, and returns its line of the results; of one that diverges, with an "error".
/// `observe(step)` is called after each step, and may throw.
template <class Observe>
nlohmann::json execute(const Run& run, const Measures& measures, const dit::DataSet& data, const dit::DataSet& test,
                       const Judge& judge_of, const Exec& exec, Observe&& observe) {
  const auto model = dit::model_of(run.config);
  const dit::ModelConfig& shape = model.config();
  dit::Training training(run.config, model, data);
  const Validation validation(run.config, test, measures.validation, exec);
  auto tape = model.make_tape(moxie::Keep::nothing);
  nlohmann::json result = detail::line_of(run);
  nlohmann::json curve = nlohmann::json::array();
  const auto validate = [&](auto&& looked_at) {
    curve.push_back({training.steps(), validation(model, training.averages().view(), tape, exec, looked_at)});
  };
  const auto nothing = [](double, const auto&) {};
  while (training.steps() < run.steps) {
    try {
      training.step(exec);
    } catch (const moxie::ValueError& error) {
      result["error"] = "step " + std::to_string(training.steps() + 1) + ": " + error.what();
      return result;
    }
    observe(training.steps());
    if (training.steps() % measures.every == 0 && training.steps() < run.steps) {
      validate(nothing);
    }
  }
  result["training_loss"] = detail::last_loss(training.history());

  // The last validation also tells who is routed where.
  const std::vector<Index> experts = detail::experts_of_blocks(model);
  if (*std::max_element(experts.begin(), experts.end()) > 1) {
    detail::BlockRouting routing(model, run.config.process == "ddpm" ? double(run.config.diffusion_steps) : 1);
    validate([&](double time, const std::vector<Index>& labels) { routing.add(time, labels, tape); });
    result["blocks"] = routing.blocks();
  } else {
    validate(nothing);
  }
  result["validation"] = curve;
  result["validation_loss"] = curve.back().back();

  std::vector<std::int64_t> labels;
  for (Index i = 0; i < measures.samples; ++i) {
    labels.push_back(i % shape.classes);
  }
  Matrix<float> images = detail::drawn_images(sampler_of(run, measures, model), model, training.averages().view(), labels, tape,
                                              exec, [&] { observe(run.steps); });
  if (!images.allFinite()) {
    result["error"] = "an image is not finite";
    return result;
  }
  images = images.array().max(-1.0F).min(1.0F);
  detail::add_judgement(result, images, labels, measures, judge_of, exec);
  return result;
}

}  // namespace compare

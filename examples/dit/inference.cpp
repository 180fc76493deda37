// SPDX-License-Identifier: MIT
#include <sys/resource.h>

#include <chrono>
#include <dit/analysis_output.hpp>
#include <dit/commands.hpp>
#include <dit/drawing.hpp>
#include <dit/frozen_model.hpp>
#include <dit/zoo.hpp>

namespace dit::commands {

namespace {

/// The files and the table of `dit analyse`.
void write_analysis(const RoutingCounts& counts, const std::vector<std::string>& class_names, const OutputFolder& files) {
  save_counts(files("routing.safetensors"), counts);
  write_counts_csv(files("routing.csv"), counts);
  std::cout << "  " << files("routing.safetensors").string() << "\n  " << files("routing.csv").string() << "\n";
  draw_or_say(files("routing_by_class.png"), [&](const fs::path& path) { draw_routing_by_class(path, counts, class_names); });
  draw_or_say(files("routing_by_position.png"), [&](const fs::path& path) { draw_routing_by_position(path, counts); });
  draw_or_say(files("routing_by_timestep.png"), [&](const fs::path& path) { draw_routing_by_timestep(path, counts); });
  std::cout << "\n";
  print_information(std::cout, counts);
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

/// The model of a checkpoint and its weights, handed to `f`; with experts in bfloat16, if asked for.
template <class F>
int with_checkpoint(const moxie::SafetensorsFile& file, const TrainingConfig& config, bool bfloat16, const Exec& exec, F&& f) {
  if (bfloat16) {
    const FrozenModel model = bfloat16_model_of(file, config, exec);
    return f(model, model.weights().view(), model.parameter_count());
  }
  const auto model = model_of(config);
  const moxie::Parameters<float> weights = load_model(file, model.config(), model.layout());
  return f(model, weights.view(), model.layout().parameter_count());
}

int measure_in(const NamedModel& named, ExpertNumbers numbers, const Exec& exec) {
  TrainingConfig config;
  apply(named, config);
  if (config.feed_forward == "dense") {
    throw std::runtime_error("only mixtures are measured");
  }
  Index of_layer = 0;
  const auto read = [&](const std::string& part, moxie::Parameters<float>& to) {
    for (Index i = 0; i < Index(to.layout().tensors().size()) && (part.empty() || of_layer == 0); ++i) {
      Rng(1).split(std::uint64_t(i)).fill_uniform(to.view()[i], -0.03, 0.03);
    }
    of_layer += part.empty() ? 0 : 1;
  };
  const FrozenModel model(config.model, feed_forward_of(config, numbers), feed_forward_name(config), read, exec);
  const Matrix<float> x = moxie::random_normal<float>(1, config.model.image_dim(), Rng(2));
  Matrix<float> v(1, config.model.output_dim());
  auto tape = model.make_tape(moxie::Keep::nothing);
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
}

}  // namespace

int sample(const fs::path& checkpoint, const ForeignOptions& foreign, const DrawingOptions& drawing, bool bfloat16,
           bool analyse, const fs::path& folder, const Exec& exec) {
  const moxie::SafetensorsFile file(checkpoint);
  const TrainingConfig config = config_of(file, foreign);
  if (analyse && config.feed_forward == "dense") {
    throw std::runtime_error(checkpoint.string() + ": is a dense model, which routes nothing");
  }
  const OutputFolder files(folder);
  expect_another_file(checkpoint, files("samples.safetensors"));
  expect_another_file(checkpoint, files("routing.safetensors"));
  const std::uintmax_t count = drawing.labels(config.model.classes).size();
  files.expect_room_for("samples.safetensors", count * std::uintmax_t(config.model.image_dim()) * sizeof(float));
  return with_checkpoint(file, config, bfloat16, exec,
                         [&](const auto& model, ParameterView<const float> weights, Index parameters) {
                           const std::vector<std::string> class_names = names_of(file, config.model.classes);
                           Report report;
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

int upcycle(const fs::path& checkpoint, const ForeignOptions& foreign, const UpcyclingOptions& options, const fs::path& out) {
  expect_another_file(checkpoint, out);
  const moxie::SafetensorsFile file(checkpoint);
  const Index parameters = upcycle_checkpoint(file, config_of(file, foreign), options, out);
  std::cout << "Written:\n  " << out.string() << ", " << options.experts << " experts, " << parameters << " parameters\n";
  return 0;
}

int predict(const fs::path& checkpoint, const ForeignOptions& foreign, bool bfloat16, const fs::path& input,
            const fs::path& out, const Exec& exec) {
  expect_another_file(checkpoint, out);
  expect_another_file(input, out);
  const moxie::SafetensorsFile file(checkpoint);
  const moxie::SafetensorsFile in(input);
  return with_checkpoint(
      file, config_of(file, foreign), bfloat16, exec,
      [&](const auto& model, ParameterView<const float> weights, Index /*parameters*/) {
        const ModelConfig& shape = model.config();
        const std::vector<Index> images = in.info("x").shape;
        const Index batch = images.empty() ? 0 : images.front();
        in.expect<float>("x", std::array<Index, 4>{batch, shape.channels, shape.image_size, shape.image_size});
        std::vector<float> t;
        if (moxie::reads_as<float>(in.info("t").dtype)) {
          t = in.read<float>("t");
        } else {
          for (const std::int64_t step : in.read<std::int64_t>("t")) {
            t.push_back(float(step));
          }
        }
        const TrainingConfig trained = config_of(file, foreign);
        const double latest = trained.process == "flow" ? 1 : double(trained.diffusion_steps - 1);
        for (const float time : t) {
          if (!(time >= 0 && double(time) <= latest)) {
            throw std::runtime_error(input.string() + ": tensor 't' has " + std::to_string(time) + ", expected 0 to " +
                                     std::to_string(latest) + " (" + trained.process + ")");
          }
        }
        const std::vector<std::int64_t> labels = in.read<std::int64_t>("y");
        for (const std::int64_t label : labels) {
          if (label < 0 || label > shape.classes) {
            throw std::runtime_error(input.string() + ": tensor 'y' has " + std::to_string(label) + ", expected 0 to " +
                                     std::to_string(shape.classes) + " (no class)");
          }
        }
        const std::vector<float> values = in.read<float>("x");
        Matrix<float> output(batch, shape.output_dim());
        auto tape = model.make_tape(moxie::Keep::nothing);
        model.forward(weights, RowView<const float>(values.data(), batch, shape.image_dim()), t, {labels.begin(), labels.end()},
                      output, tape, exec);
        moxie::SafetensorsWriter writer;
        writer.add("output", {batch, shape.out_channels(), shape.image_size, shape.image_size},
                   std::span<const float>(output.data(), std::size_t(output.size())));
        writer.save(out);
        std::cout << "Written:\n  " << out.string() << "\n";
        return 0;
      });
}

int measure(const NamedModel& named, bool bfloat16, const Exec& exec) {
  return bfloat16 ? measure_in(named, ExpertNumbers::bfloat16, exec) : measure_in(named, ExpertNumbers::float32, exec);
}

}  // namespace dit::commands

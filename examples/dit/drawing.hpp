// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <dit/analysis.hpp>
#include <dit/commands.hpp>
#include <dit/heat_maps.hpp>
#include <dit/output_folder.hpp>
#include <dit/pictures.hpp>
#include <dit/progress.hpp>
#include <dit/report.hpp>
#include <iostream>
#include <map>

/// What `train`, `sample` and `analyse` share: they draw images, and write them down.
namespace dit::commands {

/// A picture is worth having, but a run does not fail for want of gnuplot. Returns whether there is one. Throws Interrupted
/// where Ctrl-C came before the picture, or ended gnuplot too.
template <class Draw>
bool draw_or_say(const fs::path& path, Draw&& draw) {
  const auto stop = [&] { stop_if_interrupted("interrupted: " + path.filename().string() + " was not drawn"); };
  stop();
  try {
    draw(path);
    std::cout << "  " << path.string() << "\n";
    return true;
  } catch (const Interrupted&) {
    throw;
  } catch (const std::exception& error) {
    stop();
    std::cout << "  no " << path.filename().string() << ": " << terminal_text(error.what()) << "\n";
    return false;
  }
}

/// Images drawn, and who was routed where meanwhile.
struct Drawing {
  Matrix<float> images;
  std::vector<std::int64_t> labels;
  std::optional<RoutingCounts> counts;
};

/// Experts of the blocks that have a choice; others have one. 0: none has a choice.
template <class AnyModel>
Index most_experts(const AnyModel& model) {
  Index experts = 0;
  for (Index block = 0; block < model.config().depth; ++block) {
    experts = std::max(experts, routed_experts(model.feed_forward(block).layout()));
  }
  return experts;
}

/// Draws the same number of images of each class. An interruption throws.
template <class AnyModel>
Drawing draw(const AnyModel& model, ParameterView<const float> weights, const TrainingConfig& config,
             const DrawingOptions& options, const Exec& exec) {
  const ModelConfig& shape = model.config();
  const Process process = process_of(config);
  const Sampler<AnyModel, float> sampler(process, options.sampler_for(config), model);
  Drawing drawing;
  drawing.labels = options.labels(shape.classes);
  const auto total = Index(drawing.labels.size());
  std::cout << "Drawing " << total << " images, " << sampler.steps() << " steps of " << sampler.config().method << ", guidance "
            << sampler.config().guidance << "\n";
  drawing.images.resize(total, shape.image_dim());
  if (const Index experts = most_experts(model); experts > 0) {
    drawing.counts.emplace(RoutingCounts::Shape{.layers = shape.depth,
                                                .experts = experts,
                                                .classes = shape.classes,
                                                .positions = shape.tokens(),
                                                .bins = options.bins});
  }
  auto tape = model.make_tape(moxie::Keep::nothing);
  Progress progress({.steps = total, .images_per_step = 1});
  constexpr Index batch = 50;
  for (Index first = 0; first < total; first += batch) {
    const Index n = std::min(batch, total - first);
    const std::vector<Index> part(drawing.labels.begin() + first, drawing.labels.begin() + first + n);
    drawing.images.middleRows(first, n) =
        sampler(weights, part, Rng(options.seed).split(2), std::uint64_t(first), tape, exec, [&](double way, auto...) {
          stop_if_interrupted("interrupted while drawing; the checkpoint can be drawn with again");
          if (drawing.counts) {
            const Index bin = std::min(Index(std::ceil(way * double(options.bins) - 1e-9)) - 1, options.bins - 1);
            for (Index layer = 0; layer < shape.depth; ++layer) {
              visit_plan(tape.blocks[std::size_t(layer)].feed_forward, [&](const auto& plan) {
                if (plan.experts() == drawing.counts->shape().experts) {  // others have one, and nothing to choose
                  drawing.counts->add(layer, std::max(bin, Index{0}), plan, part);
                }
              });
            }
          }
        });
    progress.update(first + n);
  }
  progress.finish();
  if (!drawing.images.allFinite()) {
    throw std::runtime_error("an image is not finite: the model has diverged");
  }
  if (!config.latents) {
    drawing.images = drawing.images.array().max(-1.0F).min(1.0F);
  }
  return drawing;
}

/// A grid of the images, if they are pixels.
inline void draw_grid(const fs::path& path, const Drawing& drawing, const TrainingConfig& config,
                      const std::vector<std::string>& class_names) {
  if (config.latents) {
    throw std::runtime_error("latents are no pixels; their decoder draws them");
  }
  // The classes that were drawn, each a row.
  std::map<std::int64_t, std::int64_t> rows;
  std::vector<std::string> names;
  std::vector<std::int64_t> labels;
  for (const std::int64_t label : drawing.labels) {
    if (rows.try_emplace(label, std::int64_t(rows.size())).second) {
      names.push_back(class_names[std::size_t(label)]);
    }
    labels.push_back(rows[label]);
  }
  const ModelConfig& shape = config.model;
  draw_samples(path, drawing.images, labels, names, shape.channels, shape.image_size, shape.image_size);
}

/// samples.safetensors, pictures and the report.
inline void write_drawing(const Drawing& drawing, const TrainingConfig& config, const std::vector<std::string>& class_names,
                          const OutputFolder& files, Report report) {
  const ModelConfig& shape = config.model;
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
  const bool grid =
      draw_or_say(files("samples.png"), [&](const fs::path& path) { draw_grid(path, drawing, config, class_names); });
  if (drawing.counts) {
    draw_or_say(files("expert_load.png"), [&](const fs::path& path) { draw_expert_load(path, drawing.counts->load()); });
  }
  draw_or_say(files("report.html"), [&](const fs::path& path) {
    report.facts.emplace_back("Images drawn", std::to_string(total));
    if (grid) {
      report.pictures.push_back({"Samples", "Images drawn, a row for each class", files("samples.png")});
    }
    if (drawing.counts) {
      report.routing = &*drawing.counts;
      report.class_names = class_names;
    }
    write_report(path, report);
  });
}

}  // namespace dit::commands

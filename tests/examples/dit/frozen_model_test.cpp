// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/frozen_model.hpp>
#include <filesystem>
#include <temporary_folder.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
using moxie::Parameters;
namespace fs = std::filesystem;

namespace {

struct TemporaryFile {
  moxie::test::TemporaryFolder folder;
  fs::path path = folder / "checkpoint";
};

dit::TrainingConfig small(const std::string& feed_forward) {
  dit::TrainingConfig c;
  c.model = {.image_size = 8, .channels = 1, .patch = 2, .dim = 16, .depth = 2, .heads = 2, .classes = 3};
  c.feed_forward = feed_forward;
  c.experts = 4;
  c.hidden_dim = 24;
  c.shared_hidden_dim = 16;
  return c;
}

// A checkpoint with random numbers in all tensors, averages among them.
Parameters<float> save(const dit::TrainingConfig& config, const fs::path& path) {
  const auto model = dit::model_of(config);
  Parameters<float> p(model.layout());
  for (std::size_t i = 0; i < model.layout().tensors().size(); ++i) {
    Rng(2).split(i).fill_normal(p.view()[Index(i)], 0.2);
  }
  const Parameters<float> not_averaged = p.zeros_like();
  dit::CheckpointWriter writer;
  writer.add(not_averaged);
  writer.add(p, "ema.");
  writer.config(config);
  writer.save(path);
  return p;
}

struct Pass {
  Matrix<float> v;
  std::vector<Index> tokens_per_expert;
};
template <class AnyModel>
Pass pass(const AnyModel& model, const Parameters<float>& weights) {
  const Matrix<float> x = moxie::random_normal<float>(3, model.config().image_dim(), Rng(5));
  Pass result{Matrix<float>(3, model.config().output_dim()), {}};
  auto tape = model.make_tape();
  model.forward(weights, x, {0.2F, 0.5F, 0.7F}, {0, 2, 3}, result.v, tape, Exec{2});
  const auto& feed_forward = tape.blocks[1].feed_forward;
  if (const auto* const plan = feed_forward.template get_if<moxie::SparsePlan<float>>(); plan != nullptr) {
    result.tokens_per_expert.assign(plan->tokens_per_expert().begin(), plan->tokens_per_expert().end());
  }
  return result;
}

}  // namespace

TEST_CASE("FrozenModel: with experts in float, the bits of the model, and its routing") {
  const TemporaryFile file;
  for (const char* feed_forward : {"shared", "top-k", "expert-choice"}) {
    const dit::TrainingConfig config = small(feed_forward);
    const Parameters<float> weights = save(config, file.path);
    const Pass expected = pass(dit::model_of(config), weights);
    const dit::SafetensorsFile stored(file.path);
    const auto read = [&](const std::string& part, Parameters<float>& to) { dit::load_weights(stored, to, "ema." + part); };
    const dit::FrozenModel model(config.model, dit::feed_forward_of(config), dit::feed_forward_name(config), read, Exec{2});
    CHECK(model.parameter_count() == weights.layout().parameter_count());
    const Pass frozen = pass(model, model.weights());
    CHECK(frozen.v == expected.v);
    CHECK(frozen.tokens_per_expert == expected.tokens_per_expert);
    CHECK_FALSE(frozen.tokens_per_expert.empty());
  }
}

TEST_CASE("bfloat16_model_of: close to the float model, and not equal") {
  const TemporaryFile file;
  for (const char* feed_forward : {"shared", "top-k"}) {
    const dit::TrainingConfig config = small(feed_forward);
    const Parameters<float> weights = save(config, file.path);
    const Matrix<float> expected = pass(dit::model_of(config), weights).v;
    const dit::FrozenModel model = dit::bfloat16_model_of(dit::SafetensorsFile(file.path), config, Exec{2});
    const Matrix<float> rounded = pass(model, model.weights()).v;
    const float error = (rounded - expected).norm() / expected.norm();
    CHECK(error < 1e-2F);
    CHECK(error > 1e-5F);
  }
}

TEST_CASE("bfloat16_model_of: experts that are not SwiGLU are refused") {
  const TemporaryFile file;
  for (const char* feed_forward : {"dense", "soft"}) {
    const dit::TrainingConfig config = small(feed_forward);
    save(config, file.path);
    CHECK_THROWS_AS(dit::bfloat16_model_of(dit::SafetensorsFile(file.path), config, Exec{1}), moxie::ValueError);
  }
}

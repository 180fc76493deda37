// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/upcycling.hpp>
#include <filesystem>
#include <temporary_folder.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
using moxie::Parameters;
namespace fs = std::filesystem;

namespace {

using moxie::test::TemporaryFolder;

dit::TrainingConfig dense_config(const std::string& feed_forward) {
  dit::TrainingConfig c;
  c.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 2, .heads = 2, .classes = 2};
  c.feed_forward = feed_forward;
  c.experts = 1;
  c.top_k = 1;
  c.hidden_dim = 6;
  c.shared_hidden_dim = 4;
  return c;
}

// A checkpoint with random numbers in all tensors.
void save_dense(const dit::TrainingConfig& config, const fs::path& path) {
  {
    const auto model = dit::model_of(config);
    Parameters<float> p(model.layout());
    for (std::size_t i = 0; i < model.layout().tensors().size(); ++i) {
      Rng(2).split(i).fill_normal(p.view()[Index(i)], 0.3);
    }
    dit::CheckpointWriter writer;
    writer.add(p);
    writer.add_position_embedding(model.config());
    writer.config(config);
    writer.metadata("class.0", "left");
    writer.save(path);
  }
}

Matrix<float> output(const fs::path& path) {
  const dit::SafetensorsFile file(path);
  const auto model = dit::model_of(dit::config_of(file));
  const Parameters<float> weights = dit::load_model(file, model.config(), model.layout());
  const Matrix<float> x = moxie::random_normal<float>(2, model.config().image_dim(), Rng(5));
  Matrix<float> v(2, model.config().output_dim());
  auto tape = model.make_tape();
  model.forward(weights, x, {0.2F, 0.7F}, {0, 2}, v, tape, Exec{1});
  return v;
}

}  // namespace

TEST_CASE("upcycle: the equal start computes what the dense model computes, and the reference's does not") {
  const TemporaryFolder folder;
  for (const char* feed_forward : {"dense", "shared", "top-k"}) {
    CAPTURE(feed_forward);
    const dit::TrainingConfig config = dense_config(feed_forward);
    save_dense(config, folder.path / "dense");
    const Matrix<float> expected = output(folder.path / "dense");
    const dit::SafetensorsFile file(folder.path / "dense");
    for (const bool equal : {true, false}) {
      dit::upcycle_checkpoint(file, config, {.experts = 4, .top_k = 2, .equal = equal}, folder.path / "sparse");
      const float difference = (output(folder.path / "sparse") - expected).cwiseAbs().maxCoeff();
      const float largest = expected.cwiseAbs().maxCoeff();
      CHECK((difference < 1e-5F * largest) == equal);
    }
    CHECK(dit::SafetensorsFile(folder.path / "sparse").metadata().at("class.0") == "left");
  }
}

TEST_CASE("upcycle: the reference's start has copies for experts, normal gates, and all else as it was") {
  const TemporaryFolder folder;
  const dit::TrainingConfig config = dense_config("shared");
  save_dense(config, folder.path / "dense");
  const dit::SafetensorsFile dense(folder.path / "dense");
  dit::upcycle_checkpoint(dense, config, {.experts = 12, .top_k = 2}, folder.path / "sparse");
  const dit::SafetensorsFile sparse(folder.path / "sparse");
  std::size_t copies = 0;
  double squares = 0;
  Index gates = 0;
  for (const std::string& name : sparse.names()) {
    const std::vector<float> values = sparse.read<float>(name);
    const std::size_t expert = name.find(".experts.");
    if (name.ends_with("gate.weight")) {
      CHECK(sparse.info(name).shape == std::vector<Index>{12, 8});
      for (const float value : values) {
        squares += double(value) * double(value);
        ++gates;
      }
    } else if (expert != std::string::npos) {
      const std::size_t end = name.find('.', expert + 9);
      CHECK(values == dense.read<float>(name.substr(0, expert) + ".experts.0" + name.substr(end)));
      ++copies;
    } else {
      CHECK(values == dense.read<float>(name));
    }
  }
  CHECK(copies == 2 * 12 * 3);
  CHECK(std::abs(std::sqrt(squares / double(gates)) / 0.02 - 1) < 0.2);
}

TEST_CASE("upcycle: models that are mixtures already, and mixtures that cannot be, are refused and nothing is written") {
  const TemporaryFolder folder;
  dit::TrainingConfig config = dense_config("shared");
  config.experts = 2;
  save_dense(config, folder.path / "mixture");
  const dit::SafetensorsFile mixture(folder.path / "mixture");
  CHECK_THROWS_AS(dit::upcycle_checkpoint(mixture, config, {}, folder.path / "out"), moxie::ValueError);
  config = dense_config("soft");
  CHECK_THROWS_AS(dit::upcycled_config(config, {}), moxie::ValueError);
  config = dense_config("dense");
  save_dense(config, folder.path / "dense");
  const dit::SafetensorsFile dense(folder.path / "dense");
  CHECK_THROWS_AS(dit::upcycle_checkpoint(dense, config, {.experts = 2, .top_k = 3}, folder.path / "out"), moxie::ValueError);
  // Normalized weights of one expert are 1: its gate would never learn.
  CHECK_THROWS_AS(dit::upcycle_checkpoint(dense, config, {.experts = 2, .top_k = 1, .equal = true}, folder.path / "out"),
                  moxie::ValueError);
  CHECK_FALSE(fs::exists(folder.path / "out"));
}

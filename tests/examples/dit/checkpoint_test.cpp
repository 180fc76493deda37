// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <dit/checkpoint.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <temporary_folder.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using moxie::SafetensorsError;
using moxie::SafetensorsFile;
namespace fs = std::filesystem;

namespace {

using moxie::test::TemporaryFolder;

struct Tensor {
  std::vector<Index> shape;
  std::vector<float> values;
};
using StateDict = std::map<std::string, Tensor>;

// The state dict that a golden file was recorded with.
StateDict state_dict(const SafetensorsFile& golden) {
  StateDict state;
  for (const std::string& name : golden.names()) {
    if (name.starts_with("param/")) {
      state[name.substr(6)] = {golden.info(name).shape, golden.read<float>(name)};
    }
  }
  return state;
}

fs::path write(const fs::path& path, const StateDict& state) {
  moxie::SafetensorsWriter writer;
  for (const auto& [name, tensor] : state) {
    writer.add(name, tensor.shape, std::span(tensor.values));
  }
  writer.save(path);
  return path;
}

std::string complaint(const std::function<void()>& f) {
  try {
    f();
  } catch (const SafetensorsError& error) {
    return error.what();
  }
  return "no complaint";
}
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

SafetensorsFile golden(const std::string& name) {
  return SafetensorsFile(fs::path(MOXIE_GOLDEN_DIR) / (name + ".safetensors"));
}

// Everything that drawing with a foreign file does before it draws.
void load(const fs::path& path, const dit::ForeignOptions& options) {
  const SafetensorsFile file(path);
  {
    const auto model = dit::model_of(dit::config_of(file, options));
    dit::load_model(file, model.config(), model.layout());
  }
}

// Random numbers in all tensors.
moxie::Parameters<float> filled(const moxie::Layout& layout, float factor = 1) {
  moxie::Parameters<float> p(layout);
  for (std::size_t i = 0; i < layout.tensors().size(); ++i) {
    dit::Rng(1).split(i).fill_normal(p.view()[Index(i)]);
  }
  p.flat() *= factor;
  return p;
}

struct Ours {
  dit::TrainingConfig config;
  Ours() {
    config.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 2, .heads = 2, .classes = 2};
    config.experts = 3;
    config.hidden_dim = 6;
    config.shared_hidden_dim = 4;
    config.model.switch_experts = 2;
  }
  void save(const fs::path& path) const { save(path, config, dit::format_name); }
  // With a file that says something else of itself.
  void save(const fs::path& path, const dit::TrainingConfig& said, const char* format) const {
    {
      const auto model = dit::model_of(config);
      const moxie::Parameters<float> p = filled(model.layout());
      const moxie::Parameters<float> half = filled(model.layout(), 0.5F);
      dit::CheckpointWriter writer;
      writer.add(p);
      writer.add_position_embedding(model.config());
      writer.add(half, "ema.");
      writer.config(said);
      writer.metadata("format", format);
      writer.save(path);
    }
  }
};

}  // namespace

TEST_CASE("checkpoint: a reference's state dict loads, and gives the reference's output") {
  const TemporaryFolder folder;
  struct Case {
    const char* name;
    const char* feed_forward;
  };
  for (const Case& recording :
       {Case{"dense_dit_dev", "dense"}, Case{"ditmoe_model_dev", "shared"}, Case{"switchdit_model_dev", "dense"}}) {
    const std::string name = recording.name;
    CAPTURE(name);
    const SafetensorsFile recorded = golden(name);
    const SafetensorsFile file(write(folder / name, state_dict(recorded)));
    const Index heads = std::stol(recorded.metadata().at("num_heads"));
    const dit::TrainingConfig config = dit::config_of(file, {.heads = heads});
    CHECK(config.feed_forward == recording.feed_forward);
    CHECK(config.model.image_size == std::stol(recorded.metadata().at("input_size")));
    CHECK(config.model.classes == std::stol(recorded.metadata().at("num_classes")));
    CHECK(config.model.learn_sigma);
    CHECK(config.latents == (config.model.channels == 4));
    {
      const auto model = dit::model_of(config);
      const moxie::Parameters<float> weights = dit::load_model(file, model.config(), model.layout());
      const Index batch = recorded.info("input/x").shape[0];
      Matrix<float> x(batch, config.model.image_dim());
      Matrix<float> y(batch, config.model.output_dim());
      const std::vector<float> images = recorded.read<float>("input/x");
      std::copy(images.begin(), images.end(), x.data());
      std::vector<float> t;
      if (recorded.info("input/t").dtype == moxie::DType::I64) {
        for (const std::int64_t step : recorded.read<std::int64_t>("input/t")) {
          t.push_back(float(step));
        }
      } else {
        t = recorded.read<float>("input/t");
      }
      const auto labels = recorded.read<std::int64_t>("input/y");
      auto tape = model.make_tape();
      model.forward(weights, x, t, {labels.begin(), labels.end()}, y, tape, Exec{1});
      const std::vector<float> expected = recorded.read<float>("output/y");
      double difference = 0;
      double largest = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        difference = std::max(difference, std::abs(double(y.data()[i]) - double(expected[i])));
        largest = std::max(largest, std::abs(double(expected[i])));
      }
      CHECK(difference < 2e-5 * largest);
    }
  }
}

TEST_CASE("checkpoint: a foreign state dict that does not fit is refused by the tensor's name") {
  const TemporaryFolder folder;
  const StateDict good = state_dict(golden("ditmoe_model_dev"));
  const dit::ForeignOptions options{.heads = 4};
  load(write(folder / "good", good), options);
  const auto refusal = [&](const std::function<void(StateDict&)>& change) {
    StateDict changed = good;
    change(changed);
    const fs::path path = write(folder / "changed", changed);
    return complaint([&] { load(path, options); });
  };
  for (const auto& entry : good) {
    const std::string& name = entry.first;
    if (name == "pos_embed" || name.find("shared_experts") != std::string::npos) {
      continue;  // what is inferred without them is another model, and that one lacks or has something else
    }
    CAPTURE(name);
    CHECK(contains(refusal([&](StateDict& s) { s.erase(name); }), "tensor '"));
    CHECK(contains(refusal([&](StateDict& s) { s.at(name).values.back() = std::nanf(""); }), name));
    CHECK(contains(refusal([&](StateDict& s) { s.at(name).shape.push_back(1); }), "tensor '"));
  }
  CHECK(contains(refusal([](StateDict& s) { s.erase("pos_embed"); }), "'pos_embed'"));
  CHECK(contains(refusal([](StateDict& s) { s["pos_embed"].values[5] += 0.01F; }), "'pos_embed'"));
  CHECK(contains(refusal([](StateDict& s) { s["pos_embed"].shape = {1, 48, 16}; }), "'pos_embed'"));
  CHECK(contains(refusal([](StateDict& s) { s["blocks.0.extra.weight"] = {{1}, {0}}; }), "'blocks.0.extra.weight'"));
  CHECK(contains(refusal([](StateDict& s) {
                   s["blocks.1.moe.shared_experts.up_proj.weight"].shape = {1},
                   s["blocks.1.moe.shared_experts.up_proj.weight"].values = {0};
                 }),
                 "'blocks.1.moe.shared_experts.up_proj.weight'"));
  CHECK(contains(complaint([&] { load(folder / "good", {}); }), "--heads"));
}

TEST_CASE("inferred_config: a mixture of one expert, the reference's dense model for upcycling, has one a token") {
  const TemporaryFolder folder;
  StateDict state = state_dict(golden("ditmoe_model_dev"));
  std::erase_if(state, [](const auto& entry) {
    return entry.first.find(".experts.") != std::string::npos && entry.first.find(".experts.0.") == std::string::npos;
  });
  for (auto& [name, tensor] : state) {
    if (name.ends_with("moe.gate.weight")) {
      tensor.shape[0] = 1;
      tensor.values.resize(std::size_t(tensor.shape[1]));
    }
  }
  const fs::path path = write(folder / "one", state);
  load(path, {.heads = 4});
  const dit::TrainingConfig config = dit::config_of(SafetensorsFile(path), {.heads = 4});
  CHECK(config.experts == 1);
  CHECK(config.top_k == 1);
  CHECK_THROWS_AS(load(path, {.heads = 4, .top_k = 2}), moxie::ValueError);
}

TEST_CASE("config_of: a configuration that is not the file's is refused before a model is made") {
  const TemporaryFolder folder;
  const Ours ours;
  ours.save(folder / "file");
  const SafetensorsFile file(folder / "file");
  const auto with_config = [&](const nlohmann::json& config, const std::string& format = dit::format_name) {
    moxie::SafetensorsWriter writer;
    std::map<std::string, std::vector<float>> values;
    for (const std::string& name : file.names()) {
      values[name] = file.read<float>(name);
      writer.add(name, file.info(name).shape, std::span<const float>(values[name]));
    }
    writer.metadata("format", format);
    writer.metadata("config", config.dump());
    writer.save(folder / "changed");
    return SafetensorsFile(folder / "changed");
  };
  const auto refused = [&](auto&& change) {
    dit::TrainingConfig config = ours.config;
    change(config);
    CHECK_THROWS_AS(dit::config_of(with_config(config)), SafetensorsError);
  };
  refused([](auto& c) { c.model.depth = 1'000'000'000; });
  refused([](auto& c) { c.model.classes = 1'000'000'000'000; });
  refused([](auto& c) { c.model.dim = 1 << 20; });
  refused([](auto& c) { c.model.image_size = 1 << 20; });
  refused([](auto& c) { c.model.image_size = 1 << 14; });
  refused([](auto& c) { c.model.image_size = 2; });
  refused([](auto& c) { c.model.learn_sigma = true; });
  refused([](auto& c) { c.model.qk_norm = true; });
  refused([](auto& c) { c.hidden_dim = Index{1} << 50; });
  refused([](auto& c) { c.shared_hidden_dim = Index{1} << 50; });
  refused([](auto& c) {
    c.feed_forward = "top-k";
    c.hidden_dim = 4;
  });
  refused([](auto& c) { c.feed_forward = "dense"; });
  refused([](auto& c) { c.mixture_from = 1; });
  refused([](auto& c) { c.recipe.bias_rate = 0.1; });
  refused([](auto& c) { c.model.switch_experts = 1'000'000'000; });
  refused([](auto& c) { c.experts = 1'000'000'000; });
  refused([](auto& c) { c.diffusion_steps = 1'000'000'000'000; });

  nlohmann::json config = ours.config;
  config["model"].erase("qk_norm");  // of an older program
  CHECK_NOTHROW(dit::config_of(with_config(config)));
  CHECK(contains(complaint([&] { dit::config_of(with_config(config, "moxie dit 2")); }), "another version"));
  config["model"]["heads"] = 2.9;
  CHECK(contains(complaint([&] { dit::config_of(with_config(config)); }), "/model/heads"));
  config = ours.config;
  config["recipe"]["loud"] = true;
  CHECK(contains(complaint([&] { dit::config_of(with_config(config)); }), "/recipe/loud"));
}

TEST_CASE("config_of: the experts of an older file, which called GELU perceptrons of soft ones swiglu") {
  const TemporaryFolder folder;
  Ours soft;
  soft.config.feed_forward = "soft";
  soft.config.expert = "swiglu";
  const auto saved_as = [&](const char* expert, const char* format) {
    Ours written = soft;
    written.config.expert = expert;
    written.save(folder / "file", soft.config, format);
    return SafetensorsFile(folder / "file");
  };
  CHECK(dit::config_of(saved_as("gelu", "moxie dit 3")).expert.empty());
  CHECK(dit::config_of(saved_as("swiglu", dit::format_name)).expert == "swiglu");
  CHECK(contains(complaint([&] { dit::config_of(saved_as("gelu", dit::format_name)); }), "gate_proj.weight' is missing"));
  CHECK(contains(complaint([&] { dit::config_of(saved_as("swiglu", "moxie dit 3")); }), "fc1"));
}

namespace {

// The most memory in bytes that was in use at once since the program began.
std::int64_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024;
}

}  // namespace

TEST_CASE("config_of: a small file that claims a large model is refused before there is memory for the claim") {
  const TemporaryFolder folder;
  const StateDict good = state_dict(golden("switchdit_model_dev"));
  const dit::ForeignOptions options{.heads = 4};
  load(write(folder / "good", good), options);
  const std::int64_t before = peak_memory();
  const auto refusal = [&](const std::function<void(StateDict&)>& change) {
    StateDict changed = good;
    change(changed);
    const fs::path path = write(folder / "changed", changed);
    return complaint([&] { dit::config_of(SafetensorsFile(path), options); });
  };
  const Index dim = good.at("pos_embed").shape[2];
  CHECK(contains(refusal([](StateDict& s) {
                   s["pos_embed"] = {{1, 1024 * 1024, 1}, std::vector<float>(1024 * 1024)};
                 }),
                 "tensor 'pos_embed' has the shape (1,1048576,1), expected (1,1048576," + std::to_string(dim) + ")"));
  CHECK(contains(refusal([](StateDict& s) { s["pos_embed"] = {{1, Index{1} << 40, 0}, {}}; }), "tensor 'pos_embed'"));
  CHECK(contains(refusal([&](StateDict& s) {
                   s["routers.0.experts.w"] = {{10'000'000, 0, dim}, {}};
                 }),
                 "'routers.0.experts.w'"));
  CHECK(contains(refusal([&](StateDict& s) { s["routers.0.experts.b"] = {{10'000'000, 0}, {}}; }), "'routers.0.experts.b'"));
  CHECK(contains(refusal([&](StateDict& s) {
                   s["routers.1.experts.w"].shape.front() *= 2;
                   s["routers.1.experts.w"].values.resize(2 * s["routers.1.experts.w"].values.size());
                 }),
                 "'routers.1.experts.w'"));
  const auto deep = [&](StateDict state) {
    for (int block = 0; block < 100'000; ++block) {
      state.try_emplace("blocks." + std::to_string(block) + ".adaLN_modulation.1.weight", Tensor{{0, 0}, {}});
    }
    const fs::path path = write(folder / "deep", state);
    return complaint([&] { dit::config_of(SafetensorsFile(path), options); });
  };
  CHECK(contains(deep(state_dict(golden("ditmoe_model_dev"))), "tensor 'blocks."));
  CHECK(contains(deep(good), "experts that the timestep chooses"));
  CHECK(peak_memory() - before < (std::int64_t{1} << 28));
}

TEST_CASE("config_of: blocks before the mixture have one expert, and are checked as such") {
  const TemporaryFolder folder;
  Ours ours;
  ours.config.mixture_from = 1;
  ours.save(folder / "file");
  CHECK(dit::config_of(SafetensorsFile(folder / "file")).mixture_from == 1);
  ours.config.model.switch_experts = 0;
  ours.save(folder / "file");
  CHECK(dit::config_of(SafetensorsFile(folder / "file")).mixture_from == 1);
}

TEST_CASE("differences: in words of the command line") {
  const dit::TrainingConfig before;
  CHECK(dit::differences(before, before).empty());
  dit::TrainingConfig now = before;
  now.recipe.optimizer.warm_up = 5;
  CHECK(dit::differences(before, now) == "--warm-up is 200 there, 5 here");
  now.model.image_size = 32;
  CHECK(dit::differences(before, now) == "image-size is 28 there, 32 here, --warm-up is 200 there, 5 here");
}

TEST_CASE("config_of: what a checkpoint of ours says of itself, options cannot change") {
  const TemporaryFolder folder;
  Ours().save(folder / "file");
  const SafetensorsFile file(folder / "file");
  CHECK_NOTHROW(dit::config_of(file, {.heads = 2, .top_k = 2, .process = "flow"}));
  CHECK(contains(complaint([&] { dit::config_of(file, {.heads = 4}); }), "2 heads"));
  CHECK(contains(complaint([&] { dit::config_of(file, {.top_k = 1}); }), "--top-k 2"));
  CHECK(contains(complaint([&] { dit::config_of(file, {.process = "ddpm"}); }), "--process flow"));

  Ours one;  // the timestep chooses one expert, a token two
  one.config.model.switch_top_k = 1;
  one.save(folder / "one");
  CHECK_NOTHROW(dit::config_of(SafetensorsFile(folder / "one"), {.top_k = 2, .switch_top_k = 1}));
  CHECK(contains(complaint([&] { dit::config_of(SafetensorsFile(folder / "one"), {.switch_top_k = 2}); }), "--switch-top-k 1"));
}

TEST_CASE("checkpoint: ours survives, with averages where there are any") {
  const TemporaryFolder folder;
  const Ours ours;
  ours.save(folder / "file");
  const SafetensorsFile file(folder / "file");
  CHECK(nlohmann::json(dit::config_of(file)) == nlohmann::json(ours.config));
  CHECK(file.contains("blocks.1.moe.experts.2.gate_proj.weight"));
  CHECK(file.info("routers.1.experts.w").shape == std::vector<Index>{2, 8, 8});
  {
    const auto model = dit::model_of(ours.config);
    const moxie::Parameters<float> expected = filled(model.layout());
    moxie::Parameters<float> bare(model.layout());
    dit::load_weights(file, bare);
    CHECK((bare.flat() == expected.flat()).all());
    CHECK((dit::load_model(file, model.config(), model.layout()).flat() == 0.5F * expected.flat()).all());
  }
}

TEST_CASE("checkpoint: a flipped bit anywhere is found, and one in the data by the tensor's name") {
  const TemporaryFolder folder;
  Ours().save(folder / "file");
  const auto read = [](const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(in)), {});
  };
  const std::string bytes = read(folder / "file");
  const SafetensorsFile good(folder / "file");
  std::uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  const auto refusal = [&](std::size_t at, int bit) {
    std::string changed = bytes;
    changed[at] = char(changed[at] ^ (1 << bit));
    std::ofstream(folder / "changed", std::ios::binary) << changed;
    return complaint([&] { load(folder / "changed", {}); });
  };
  for (const std::string& name : good.names()) {
    const auto& info = good.info(name);
    const auto at = std::size_t(8 + Index(header) + info.offset) + std::size_t(info.count / 2) * 4;
    CHECK(contains(refusal(at + 1, 3), moxie::tensor_named(name)));
  }
  // Of the header every 7th byte: names, shapes, configuration, checksums.
  for (std::size_t at = 0; at < header + 8; at += 7) {
    CAPTURE(at);
    std::string message;
    try {
      message = refusal(at, int(at % 8));
    } catch (const moxie::ValueError& error) {  // a configuration that no model has
      message = error.what();
    }
    CHECK(message != "no complaint");
  }
  for (const std::size_t size : std::vector<std::size_t>{0, 7, header, bytes.size() - 1}) {
    std::ofstream(folder / "short", std::ios::binary) << bytes.substr(0, size);
    CHECK(complaint([&] { load(folder / "short", {}); }) != "no complaint");
  }
}

// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <cmath>
#include <deque>
#include <dit/configuration.hpp>
#include <dit/reference_names.hpp>
#include <dit/zoo.hpp>
#include <moxie/io/safetensors.hpp>
#include <set>
#include <span>

/// Checkpoints in safetensors, with the names and shapes of the references' state dicts: a file of ours opens there, and one of
/// theirs, converted, here.
///
/// Weights have no prefix, and the fixed `pos_embed` is beside them; averages, first and second moments are under "ema.", "m."
/// and "v.". The metadata has the configuration, and the CRC-32 of every tensor and of the metadata itself, so that a flipped
/// bit is found.
namespace dit {

using moxie::SafetensorsError;
using moxie::SafetensorsFile;

/// Of the configuration in a checkpoint's metadata.
inline constexpr const char* format_name = "moxie dit 4";
/// In which `expert` said "swiglu" of soft and dense ones too, whose experts were GELU perceptrons.
inline constexpr const char* older_format_name = "moxie dit 3";

namespace detail {

inline constexpr const char* checksum_key = "crc32";
inline constexpr std::array state_prefixes{"ema.", "m.", "v."};

[[noreturn]] inline void fail(const SafetensorsFile& file, const std::string& what) {
  throw SafetensorsError(file.path().string() + ": " + what);
}

inline std::uint32_t checksum(const void* data, std::size_t bytes) {
  return std::uint32_t(crc32_z(0, static_cast<const unsigned char*>(data), bytes));
}
/// Of all entries but the checksums.
inline std::uint32_t checksum(const std::map<std::string, std::string>& metadata) {
  std::string text;
  for (const auto& [key, value] : metadata) {
    if (key != checksum_key) {
      text.append(key).append(1, '\0').append(value).append(1, '\0');
    }
  }
  return checksum(text.data(), text.size());
}

}  // namespace detail

/// Collects the tensors of a checkpoint. What is added has to live until `save`.
class CheckpointWriter {
 public:
  /// A block of a model's layout, as the references name and store it.
  void add(const moxie::Parameters<float>& block, const std::string& prefix = "") {
    for (const FileTensor& tensor : file_tensors(block.layout())) {
      const moxie::RowView<const float> only = block.view()[tensor.parts.front()];
      if (tensor.parts.size() == 1 && !tensor.transposed) {
        add(prefix + tensor.name, tensor.shape, {only.data(), std::size_t(only.size())});
        continue;
      }
      std::vector<float>& stacked = stacked_.emplace_back();
      for_each_element(tensor, block.view(), [&](Index, float value) { stacked.push_back(value); });
      add(prefix + tensor.name, tensor.shape, stacked);
    }
  }
  void add(moxie::Parameters<float>&& block, const std::string& prefix = "") = delete;
  void add(const std::string& name, std::vector<Index> shape, std::span<const float> values) {
    checksums_[name] = detail::checksum(values.data(), values.size_bytes());
    writer_.add(name, std::move(shape), values);
  }
  /// The embedding that the references keep among their parameters.
  void add_position_embedding(const ModelConfig& shape) {
    const Matrix<float> table = position_embedding<float>(shape.grid(), shape.dim);
    stacked_.emplace_back(table.data(), table.data() + table.size());
    add("pos_embed", {1, table.rows(), table.cols()}, stacked_.back());
  }
  void metadata(const std::string& key, const std::string& value) { metadata_[key] = value; }
  void config(const TrainingConfig& config) {
    metadata("format", format_name);
    metadata("config", nlohmann::json(config).dump());
  }

  /// Atomic. Throws SafetensorsError; an old file is then as it was.
  void save(const std::filesystem::path& path) {
    nlohmann::json checksums = checksums_;
    checksums["__metadata__"] = detail::checksum(metadata_);
    for (const auto& [key, value] : metadata_) {
      writer_.metadata(key, value);
    }
    writer_.metadata(detail::checksum_key, checksums.dump());
    writer_.save(path);
  }

 private:
  moxie::SafetensorsWriter writer_;
  std::deque<std::vector<float>> stacked_;
  std::map<std::string, std::uint32_t> checksums_;
  std::map<std::string, std::string> metadata_;
};

/// Throws SafetensorsError, naming the tensor, where a checkpoint of ours is not what was written. The references' state dicts,
/// which have neither configuration nor checksums, pass.
inline void check_checksums(const SafetensorsFile& file) {
  const auto entry = file.metadata().find(detail::checksum_key);
  if (entry == file.metadata().end()) {
    if (file.metadata().count("config") != 0) {
      detail::fail(file, "its checksums are missing");
    }
    return;
  }
  std::map<std::string, std::uint32_t> checksums;
  try {
    nlohmann::json::parse(entry->second).get_to(checksums);
  } catch (const nlohmann::json::exception&) {
    detail::fail(file, "its checksums cannot be read");
  }
  const auto compare = [&](const std::string& name, const std::string& what, std::uint32_t actual) {
    const auto expected = checksums.find(name);
    if (expected == checksums.end() || expected->second != actual) {
      detail::fail(file, what + " was changed after it was written: its checksum is another");
    }
  };
  compare("__metadata__", "the metadata", detail::checksum(file.metadata()));
  for (const std::string& name : file.names()) {
    const std::vector<float> values = file.read<float>(name);
    compare(name, moxie::tensor_named(name), detail::checksum(values.data(), values.size() * sizeof(float)));
  }
}

/// Throws SafetensorsError, naming the tensor, unless `load_weights` would succeed.
inline void check_weights(const SafetensorsFile& file, const moxie::Layout& layout, const std::string& prefix = "") {
  for (const FileTensor& tensor : file_tensors(layout)) {
    const std::string name = prefix + tensor.name;
    file.expect<float>(name, tensor.shape);
    for (const float value : file.read<float>(name)) {
      if (!std::isfinite(value)) {
        detail::fail(file, moxie::tensor_named(name) + " has a number that is not finite");
      }
    }
  }
}

namespace detail {

/// Of a file that `check_weights` has nothing against.
inline void copy_weights(const SafetensorsFile& file, moxie::Parameters<float>& block, const std::string& prefix) {
  for (const FileTensor& tensor : file_tensors(block.layout())) {
    const std::vector<float> values = file.read<float>(prefix + tensor.name);
    for_each_element(tensor, block.view(), [&](Index i, float& to) { to = values[std::size_t(i)]; });
  }
}

}  // namespace detail

/// Reads a block, all or nothing. Throws SafetensorsError.
inline void load_weights(const SafetensorsFile& file, moxie::Parameters<float>& block, const std::string& prefix = "") {
  check_weights(file, block.layout(), prefix);
  detail::copy_weights(file, block, prefix);
}

/// Throws SafetensorsError, naming the tensor, where a checkpoint has a tensor that the model does not have, or another
/// position embedding.
inline void check_foreign(const SafetensorsFile& file, const ModelConfig& shape, const moxie::Layout& layout) {
  std::set<std::string> known{"history", "pos_embed"};
  for (const FileTensor& tensor : file_tensors(layout)) {
    known.insert(tensor.name);
    for (const char* prefix : detail::state_prefixes) {
      known.insert(prefix + tensor.name);
    }
  }
  for (const std::string& name : file.names()) {
    if (known.count(name) == 0) {
      detail::fail(file, moxie::tensor_named(name) + " is not one of this model's");
    }
  }
  if (file.contains("pos_embed")) {
    const Matrix<float> table = position_embedding<float>(shape.grid(), shape.dim);
    file.expect<float>("pos_embed", std::array<Index, 3>{1, table.rows(), table.cols()});
    const std::vector<float> stored = file.read<float>("pos_embed");
    for (Index i = 0; i < table.size(); ++i) {
      if (!(std::abs(stored[std::size_t(i)] - table.data()[i]) < 5e-3F)) {  // which may be in bfloat16
        detail::fail(file, "tensor 'pos_embed' is not the sines and cosines of the patches' places");
      }
    }
  }
}

namespace detail {

/// How many tensors there are whose names differ in a number from 0 on.
inline Index count_of(const SafetensorsFile& file, const std::string& before, const std::string& after) {
  Index n = 0;
  while (file.contains(std::string(before).append(std::to_string(n)).append(after))) {
    ++n;
  }
  return n;
}

/// Throws SafetensorsError where the numbers of a configuration are not those of the file's tensors.
inline void check_sizes(const SafetensorsFile& file, const TrainingConfig& c) {
  const ModelConfig& m = c.model;
  file.expect<float>("x_embedder.proj.weight", std::array<Index, 4>{m.dim, m.channels, m.patch, m.patch});
  file.expect<float>("y_embedder.embedding_table.weight", std::array<Index, 2>{m.classes + 1, m.dim});
  const auto expect = [&](bool same, const std::string& what) {
    if (!same) {
      fail(file, "its configuration has other " + what + " than its tensors");
    }
  };
  expect(m.depth == count_of(file, "blocks.", ".adaLN_modulation.1.weight"), "blocks");
  expect(m.image_size >= 1 && m.image_size <= 1 << 15, "image sizes");
  expect(c.diffusion_steps >= 2 && c.diffusion_steps <= 1'000'000, "diffusion steps");
  std::string expert = "blocks.0.mlp.";
  if (c.feed_forward != "dense") {
    const Index end = c.mixture_to == 0 ? m.depth : c.mixture_to;
    expect(0 <= c.mixture_from && c.mixture_from < end && end <= m.depth, "blocks with experts");
    const std::string experts = "blocks." + std::to_string(c.mixture_from) + ".moe.experts.";
    const char* first_weight = file.contains(experts + "0.fc1.weight") ? ".fc1.weight" : ".gate_proj.weight";
    const Index found = count_of(file, experts, first_weight);
    if (found < c.experts) {
      fail(file, moxie::tensor_named(experts + std::to_string(found) + first_weight) + " is missing");
    }
    expect(found == c.experts, "experts");
    expect(c.slots_per_expert <= 1 << 20, "slots");
    expert = experts + "0.";
  }
  expert += file.contains(expert + "fc1.weight") ? "fc1.weight" : "gate_proj.weight";
  file.expect<float>(expert, std::array<Index, 2>{c.hidden_dim, m.dim});
  if (c.feed_forward == "shared") {
    const std::string shared = "blocks." + std::to_string(c.mixture_from) + ".moe.shared_experts.gate_proj.weight";
    file.expect<float>(shared, std::array<Index, 2>{c.shared_hidden_dim, m.dim});
  }
  if (m.switch_experts != 0) {
    file.expect<float>("routers.0.experts.b", std::array<Index, 2>{m.switch_experts, m.dim});
    constexpr Index largest = Index{1} << 26;  // bytes of the prior's table: timesteps times units
    expect(std::max<Index>(c.diffusion_steps, 1000) <= largest / m.depth / m.switch_experts,
           "experts that the timestep chooses");
  }
}

/// The tensors that the file of such a model has for block 0, and outside of blocks: of a model of one block and one patch,
/// which needs no memory.
inline std::vector<FileTensor> tensors_of_one_block(TrainingConfig c) {
  c.model.depth = 1;
  c.model.image_size = c.model.patch;
  c.mixture_from = 0;
  c.mixture_to = 0;
  return file_tensors(model_of(c).layout());
}

/// Throws SafetensorsError, naming the tensor, where the file lacks a tensor of the model of this configuration, or has it in
/// another shape. No model is made: a file that claims more than it holds is refused before there is memory for its claim.
inline void check_layout(const SafetensorsFile& file, const TrainingConfig& c) {
  const ModelConfig& m = c.model;
  m.validate();
  check_sizes(file, c);
  file.expect<float>("pos_embed", std::array<Index, 3>{1, m.tokens(), m.dim});
  const Index end = c.mixture_to == 0 ? m.depth : c.mixture_to;
  const std::vector<FileTensor> with_experts = tensors_of_one_block(c);
  std::vector<FileTensor> without;
  for (Index block = 0; block < m.depth; ++block) {
    const bool mixture = c.feed_forward == "dense" || (c.mixture_from <= block && block < end);
    if (!mixture && without.empty()) {
      without = tensors_of_one_block(config_of_block(c, block));
    }
    for (const FileTensor& tensor : mixture ? with_experts : without) {
      const std::size_t prefix = tensor.name.starts_with("blocks.") ? 7 : tensor.name.starts_with("routers.") ? 8 : 0;
      if (prefix == 0) {
        if (block == 0) {
          file.expect<float>(tensor.name, tensor.shape);
        }
        continue;
      }
      file.expect<float>(tensor.name.substr(0, prefix) + std::to_string(block) + tensor.name.substr(prefix + 1), tensor.shape);
    }
  }
}

}  // namespace detail

/// What cannot be seen in a state dict of the references. A checkpoint of ours says it itself.
struct ForeignOptions {
  Index heads = 0;           ///< 0: those of the named model of this depth and width
  Index top_k = 0;           ///< 0: 2, or all experts where there are fewer
  Index switch_top_k = 0;    ///< of Switch-DiT; 0: the same
  std::string process = "";  ///< flow or ddpm; none: ddpm
};

/// The configuration that the tensors of a reference's state dict follow from: DiT, DiT-MoE and Switch-DiT. Throws
/// SafetensorsError, naming the tensor that is missing or has a shape that no such model has, and ValueError for a shape that
/// no transformer has.
inline TrainingConfig inferred_config(const SafetensorsFile& file, const ForeignOptions& options = {}) {
  const auto shape = [&](const std::string& name, std::size_t rank) {
    const std::vector<Index>& s = file.info(name).shape;
    if (s.size() != rank || *std::min_element(s.begin(), s.end()) < 1) {
      detail::fail(file, moxie::tensor_named(name) + " has the shape " + moxie::shape_text(s) + ", expected " +
                             std::to_string(rank) + " sizes");
    }
    return s;
  };
  TrainingConfig c;
  ModelConfig& m = c.model;
  const std::vector<Index> patches = shape("x_embedder.proj.weight", 4);
  m.dim = patches[0];
  m.channels = patches[1];
  c.latents = m.channels != 1 && m.channels != 3;
  m.patch = patches[2];
  m.classes = shape("y_embedder.embedding_table.weight", 2)[0] - 1;
  shape("blocks.0.adaLN_modulation.1.weight", 2);
  m.depth = detail::count_of(file, "blocks.", ".adaLN_modulation.1.weight");
  const Index tokens = shape("pos_embed", 3)[1];
  const Index grid = std::lround(std::sqrt(double(tokens)));
  if (grid * grid != tokens) {
    detail::fail(file, "tensor 'pos_embed' has " + std::to_string(tokens) + " places, which are no square");
  }
  m.image_size = grid * m.patch;
  const Index outputs = shape("final_layer.linear.weight", 2)[0];
  m.learn_sigma = outputs == 2 * m.patch_dim();
  m.qk_norm = file.contains("blocks.0.attn.Wqkv.weight");
  m.heads = options.heads;
  if (m.heads == 0) {
    const auto* const size =
        std::find_if(model_sizes.begin(), model_sizes.end(), [&](auto& s) { return s.depth == m.depth && s.dim == m.dim; });
    if (size == model_sizes.end()) {
      detail::fail(file, "no named model has " + std::to_string(m.depth) + " blocks of width " + std::to_string(m.dim) +
                             ": say how many heads it has (--heads)");
    }
    m.heads = size->heads;
  }
  if (file.contains("routers.0.experts.w")) {
    m.switch_experts = shape("routers.0.experts.w", 3)[0];
    m.switch_top_k = options.switch_top_k == 0 ? std::min<Index>(2, m.switch_experts) : options.switch_top_k;
  }
  const std::string block = "blocks.0.moe.";
  if (file.contains(block + "gate.weight")) {
    c.experts = shape(block + "gate.weight", 2)[0];
    c.top_k = options.top_k == 0 ? std::min<Index>(2, c.experts) : options.top_k;
    c.hidden_dim = shape(block + "experts.0.gate_proj.weight", 2)[0];
    c.feed_forward = "top-k";
    if (file.contains(block + "shared_experts.gate_proj.weight")) {
      c.feed_forward = "shared";
      c.shared_hidden_dim = shape(block + "shared_experts.gate_proj.weight", 2)[0];
    }
  } else {
    c.feed_forward = "dense";
    c.hidden_dim = shape("blocks.0.mlp.fc1.weight", 2)[0];
  }
  c.process = options.process.empty() ? "ddpm" : options.process;
  detail::check_layout(file, c);
  return c;
}

/// The configuration of a checkpoint: the one that it was trained with, or the one that its tensors show. Throws
/// SafetensorsError; also where the one that it was trained with is not what `options` say, or has what is not understood.
inline TrainingConfig config_of(const SafetensorsFile& file, const ForeignOptions& options = {}) {
  const auto text = file.metadata().find("config");
  if (text == file.metadata().end()) {
    return inferred_config(file, options);
  }
  const auto format = file.metadata().find("format");
  const bool older = format != file.metadata().end() && format->second == older_format_name;
  if (format == file.metadata().end() || (format->second != format_name && !older)) {
    detail::fail(file, "is of another version of this program: its format is not '" + std::string(format_name) + "'");
  }
  try {
    const auto stored = nlohmann::json::parse(text->second);
    auto config = stored.get<TrainingConfig>();
    for (const nlohmann::json& change : nlohmann::json::diff(stored, config)) {
      if (change["op"] != "add") {  // what an older file does not say has its default
        detail::fail(
            file, "its configuration has a " + moxie::printable(change["path"].get<std::string>()) + " that is not understood");
      }
    }
    if (older && (config.feed_forward == "soft" || config.feed_forward == "dense")) {
      config.expert.clear();
    }
    detail::check_layout(file, config);
    const auto expect = [&](bool same, const std::string& what) {
      if (!same) {
        detail::fail(file, "was trained with " + what + ": leave the option out");
      }
    };
    expect(options.heads == 0 || options.heads == config.model.heads, std::to_string(config.model.heads) + " heads");
    const Index switch_top_k = config.model.switch_top_k;
    expect(options.top_k == 0 || options.top_k == config.top_k, "--top-k " + std::to_string(config.top_k));
    expect(options.switch_top_k == 0 || options.switch_top_k == switch_top_k, "--switch-top-k " + std::to_string(switch_top_k));
    expect(options.process.empty() || options.process == config.process, "--process " + config.process);
    return config;
  } catch (const nlohmann::json::exception& error) {
    detail::fail(file, std::string("its configuration cannot be read: ") + error.what());
  }
}

/// In words of the command line, in what a configuration differs from that of a checkpoint; empty if in nothing.
inline std::string differences(const TrainingConfig& stored, const TrainingConfig& now) {
  const nlohmann::json before = stored;
  const nlohmann::json after = now;
  std::string text;
  for (const nlohmann::json& change : nlohmann::json::diff(before, after)) {
    const nlohmann::json::json_pointer at(change["path"].get<std::string>());
    std::string name = at.back();
    std::replace(name.begin(), name.end(), '_', '-');
    const bool option = !std::set<std::string>{"image-size", "channels", "classes", "latents"}.contains(name);
    text += std::string(text.empty() ? "" : ", ") + (option ? "--" : "") + name + " is " + before.at(at).dump() + " there, " +
            after.at(at).dump() + " here";
  }
  return text;
}

/// Of the weights to draw with: averages where a file has them.
inline std::string weights_prefix(const SafetensorsFile& file) {
  return file.contains("ema.x_embedder.proj.weight") ? "ema." : "";
}

/// The weights to draw with.
inline moxie::Parameters<float> load_model(const SafetensorsFile& file, const ModelConfig& shape, const moxie::Layout& layout) {
  check_checksums(file);
  check_foreign(file, shape, layout);
  moxie::Parameters<float> weights(layout);
  load_weights(file, weights, weights_prefix(file));
  return weights;
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <moxie/core/error.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/io/error.hpp>
#include <moxie/io/safetensors_file.hpp>
#include <moxie/io/safetensors_writer.hpp>
#include <moxie/io/text.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// What to do with a tensor of the file, under the prefix that is read, that the layout does not have.
enum class ExtraTensors { Refuse, Ignore };

/// Throws FileError unless `load_parameters` would succeed: every tensor of the block is in the file,
/// under its prefixed name, in its shape and as floats, and no others are under that prefix. Where one
/// file holds several blocks, check all of them before loading the first: the whole is then loaded or
/// nothing of it.
template <class Block>
void check_parameters(const SafetensorsFile& file, const Block& block, std::string_view prefix = {},
                      ExtraTensors extra = ExtraTensors::Refuse) {
  const auto view = detail::as_view(block);
  const Layout& layout = view.layout();
  for (const TensorInfo& t : layout.tensors()) {
    file.expect<typename decltype(view)::Scalar>(std::string(prefix) + t.name, t.shape);
  }
  if (extra == ExtraTensors::Ignore) {
    return;
  }
  for (const std::string& name : file.names()) {
    if (name.starts_with(prefix) && layout.find(std::string_view(name).substr(prefix.size())) < 0) {
      const StoredTensor& tensor = file.info(name);
      throw FileError(file.path().string() + ": " + tensor_named(name) + " is not among the parameters to load: " +
                      printable(tensor.format) + " " + shape_text(tensor.shape) + ", which ExtraTensors::Ignore would skip");
    }
  }
}

/// Reads a block of parameters (weights, averages, moments), all or nothing: nothing is written unless
/// `check_parameters` passes. F64 rounds to nearest into a block of floats.
///
///     const SafetensorsFile file("model.safetensors");
///     load_parameters(file, layer.parameters(), "weights.");
///     load_parameters(file, averages, "ema.");
template <class Block>
void load_parameters(const SafetensorsFile& file, Block&& block, std::string_view prefix = {},
                     ExtraTensors extra = ExtraTensors::Refuse) {
  check_parameters(file, block, prefix, extra);
  const auto view = detail::as_view(block);
  const std::vector<TensorInfo>& tensors = view.layout().tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    file.read_into(std::string(prefix) + tensors[i].name, view[static_cast<Index>(i)]);
  }
}
template <class Block>
void load_parameters(const std::filesystem::path& path, Block&& block, std::string_view prefix = {},
                     ExtraTensors extra = ExtraTensors::Refuse) {
  load_parameters(SafetensorsFile(path), block, prefix, extra);
}

/// Writes one block of parameters to a file, as `SafetensorsWriter::save` does.
template <class Block>
void save_parameters(const std::filesystem::path& path, const Block& block,
                     const std::map<std::string, std::string>& metadata = {}) {
  SafetensorsWriter writer;
  writer.add_parameters(block);
  for (const auto& [key, value] : metadata) {
    writer.metadata(key, value);
  }
  writer.save(path);
}

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <moxie/core/matrix.hpp>
#include <moxie/io/safetensors.hpp>
#include <nn/fashion_mnist.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

/// Images with a class each: what the diffusion transformer learns to draw. IDX files and Fashion-MNIST are read by `nn`.
namespace dit {

using moxie::Index;
using moxie::Matrix;
using nn::fashion_mnist_directory;
using nn::generated_shapes;
using nn::read_idx;
using DataSet = nn::ImageSet;

/// What tells a data set from others: the number of its images, a CRC-32 of images and labels, and the names of its classes
/// under "class.0", "class.1", ...
inline std::map<std::string, std::string> identity_of(const DataSet& set) {
  const auto* images = reinterpret_cast<const unsigned char*>(set.images.data());
  const auto* labels = reinterpret_cast<const unsigned char*>(set.labels.data());
  auto checksum = crc32_z(0, images, static_cast<std::size_t>(set.images.size()) * sizeof(float));
  checksum = crc32_z(checksum, labels, set.labels.size() * sizeof(set.labels[0]));
  std::map<std::string, std::string> identity{{"images", std::to_string(set.count())},
                                              {"images_crc32", std::to_string(checksum)}};
  for (std::size_t i = 0; i < set.class_names.size(); ++i) {
    identity["class." + std::to_string(i)] = set.class_names[i];
  }
  return identity;
}

/// Reads tensors `images` (count, C, H, W), such as a VAE's latents, and `labels` (count), integers from 0; all images are of
/// class 0 where there are no labels. Floats are taken as they are, bytes as those of an IDX file. A class is called by its
/// number, or what the metadata say of the key "class." and its number.
///
/// Throws std::runtime_error that names the file and the tensor, if one cannot be read or has another shape, if there are no
/// images, if a value is not finite as a float, or if a label is negative or larger than 65,535.
inline DataSet read_safetensors(const std::filesystem::path& path) {
  const moxie::SafetensorsFile file(path);
  const auto fail = [&](const char* tensor, const std::string& what) -> void {
    throw std::runtime_error(path.string() + ": " + moxie::tensor_named(tensor) + " " + what);
  };

  const moxie::StoredTensor& stored = file.info("images");
  if (stored.shape.size() != 4 || stored.count == 0) {
    fail("images", "has the shape " + moxie::shape_text(stored.shape) + ", expected (N,C,H,W), each at least 1");
  }
  DataSet set;
  set.channels = stored.shape[1];
  set.height = stored.shape[2];
  set.width = stored.shape[3];
  set.images.resize(stored.shape[0], stored.count / stored.shape[0]);
  if (stored.dtype == moxie::DType::U8) {
    const std::vector<std::uint8_t> bytes = file.read<std::uint8_t>("images");
    std::transform(bytes.begin(), bytes.end(), set.images.data(), nn::pixel_of);
  } else {
    file.read_into("images", set.images);
  }
  for (Index i = 0; i < set.count(); ++i) {
    if (!set.images.row(i).allFinite()) {
      fail("images", "has a value that is not finite in image " + std::to_string(i));
    }
  }

  if (file.contains("labels")) {
    file.expect<std::int64_t>("labels", std::span(stored.shape).first(1));
    set.labels = file.read<std::int64_t>("labels");
  } else {
    set.labels.resize(static_cast<std::size_t>(set.count()));
  }
  constexpr std::int64_t largest_label = 65535;  // a name is made for each
  for (std::size_t i = 0; i < set.labels.size(); ++i) {
    if (set.labels[i] < 0 || set.labels[i] > largest_label) {
      fail("labels", "has " + std::to_string(set.labels[i]) + " for image " + std::to_string(i) + ", expected 0 to " +
                         std::to_string(largest_label));
    }
  }
  set.class_names = nn::label_numbers(set.labels);
  for (std::string& name : set.class_names) {
    if (const auto found = file.metadata().find("class." + name); found != file.metadata().end()) {
      name = found->second;
    }
  }
  set.origin = nn::origin_of(set, path) + (file.contains("labels") ? "" : "; no labels: all of one class");
  return set;
}

/// What `path` names: a .safetensors file, or IDX files as in `read_idx`. Without one, the default. Throws like the functions
/// that read them.
inline DataSet load_data_set(const std::optional<std::filesystem::path>& path = {}) {
  if (!path) {
    return nn::fashion_mnist_or_shapes();
  }
  return path->extension() == ".safetensors" ? read_safetensors(*path) : read_idx(*path);
}

}  // namespace dit

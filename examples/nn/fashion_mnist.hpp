// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <nn/generated_shapes.hpp>
#include <nn/idx.hpp>
#include <nn/image_set.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace nn {

/// Reads images (count, H, W) or (count, C, H, W) and their labels (count) from a pair of IDX files, with the limits of
/// `IdxReader`. A byte p becomes p / 127.5 - 1. Classes are called by their numbers, except those of Fashion-MNIST, which is
/// recognised by its labels.
///
/// Throws std::runtime_error that names the file if one is missing, damaged, too short, too long or beyond a limit, or if the
/// counts differ; the counts are compared before any image is read.
inline ImageSet read_idx(const std::filesystem::path& images_path, const std::filesystem::path& labels_path) {
  IdxReader images(images_path, {3, 4});
  IdxReader labels(labels_path, {1});
  const std::vector<std::size_t>& sizes = images.dimensions();
  if (labels.size() != sizes[0]) {
    labels.fail("has " + std::to_string(labels.size()) + " labels for the " + std::to_string(sizes[0]) + " images of " +
                images_path.string());
  }

  ImageSet set;
  set.channels = sizes.size() == 3 ? 1 : Index(sizes[1]);
  set.height = Index(sizes.end()[-2]);
  set.width = Index(sizes.end()[-1]);
  const std::vector<std::uint8_t> classes = labels.elements();
  const std::vector<std::uint8_t> pixels = images.elements();
  set.images.resize(Index(sizes[0]), set.channels * set.height * set.width);
  std::transform(pixels.begin(), pixels.end(), set.images.data(), pixel_of);
  set.labels.assign(classes.begin(), classes.end());

  const auto checksum = crc32(0, classes.data(), static_cast<unsigned>(classes.size()));
  const bool clothes = checksum == 0x2ED6E46A || checksum == 0x242BC73F;  // the training set's labels, the test set's
  set.class_names = clothes ? std::vector<std::string>{"T-shirt", "Trouser", "Pullover", "Dress", "Coat",
                                                       "Sandal",  "Shirt",   "Sneaker",  "Bag",   "Ankle boot"}
                            : label_numbers(set.labels);
  set.origin = (clothes ? "Fashion-MNIST: " : "") + origin_of(set, images_path);
  return set;
}

/// The first of the files that exists, compressed or plain; the first name, plain, if none does.
inline std::filesystem::path idx_file(const std::filesystem::path& directory, std::initializer_list<std::string> names) {
  for (const std::string& name : names) {
    for (const char* suffix : {".gz", ""}) {
      std::error_code ignored;
      if (std::filesystem::exists(directory / (name + suffix), ignored)) {
        return directory / (name + suffix);
      }
    }
  }
  return directory / *names.begin();
}

namespace detail {

inline std::filesystem::path training_images_in(const std::filesystem::path& directory) {
  return idx_file(directory, {"train-images-idx3-ubyte", "train-images-idx4-ubyte"});
}

/// "labels-idx1" instead of "images-idx3" or "images-idx4"; a dot instead of the hyphen is common too.
inline std::filesystem::path labels_beside(const std::filesystem::path& images) {
  std::string name = (images.extension() == ".gz" ? images.stem() : images.filename()).string();
  const std::size_t at = name.rfind("images");
  if (at == std::string::npos || name.size() < at + 11 || name.compare(at + 7, 3, "idx") != 0) {
    throw std::runtime_error(images.string() +
                             ": expected a folder, IDX images (train-images-idx3-ubyte.gz, for example) or .safetensors");
  }
  name.replace(at, 6, "labels");
  name[at + 10] = '1';
  return idx_file(images.parent_path(), {name});
}

}  // namespace detail

/// The same from a folder, which holds train-images-idx3-ubyte (or idx4) and train-labels-idx1-ubyte, each with or without .gz;
/// or from a file of images, whose labels lie beside it under the matching name.
inline ImageSet read_idx(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    throw std::runtime_error(path.string() + ": does not exist, or cannot be reached");
  }
  const auto images = std::filesystem::is_directory(path, error) ? detail::training_images_in(path) : path;
  return read_idx(images, detail::labels_beside(images));
}

/// Where Debian's package dataset-fashion-mnist puts Fashion-MNIST (Xiao, Rasul and Vollgraf 2017).
inline const std::filesystem::path fashion_mnist_directory = "/usr/share/datasets/fashion-mnist";

/// Fashion-MNIST's training set, 60,000 gray images of clothes, 28x28, if `directory` holds it; generated shapes if it holds
/// neither images nor labels. Files that exist and cannot be read are an error, as in `read_idx`.
inline ImageSet fashion_mnist_or_shapes(const std::filesystem::path& directory = fashion_mnist_directory,
                                        Index generated_count = 60000) {
  const auto is_absent = [](const std::filesystem::path& file) {
    std::error_code ignored;
    return std::filesystem::status(file, ignored).type() == std::filesystem::file_type::not_found;
  };
  const std::filesystem::path images = detail::training_images_in(directory);
  const std::filesystem::path labels = detail::labels_beside(images);
  if (is_absent(images) && is_absent(labels)) {
    ImageSet set = generated_shapes(generated_count, moxie::Rng{1});
    set.origin += "; no Fashion-MNIST in " + directory.string() + ": install dataset-fashion-mnist";
    return set;
  }
  return read_idx(images, labels);
}

}  // namespace nn

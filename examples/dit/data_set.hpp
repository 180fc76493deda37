// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <moxie/core/exec.hpp>
#include <moxie/core/matrix.hpp>
#include <moxie/core/random.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

/// Images with a class each: what the diffusion transformer learns to draw.
namespace dit {

using moxie::Index;
using moxie::Matrix;

struct DataSet {
  Index channels = 0;
  Index height = 0;
  Index width = 0;
  std::vector<std::string> class_names;
  Matrix<float> images;              ///< (count, C·H·W) in [-1, 1]: a row is an image, channel after channel, row after row
  std::vector<std::int64_t> labels;  ///< (count), in [0, number of class names)
  std::string origin;                ///< one line that says where the images are from

  Index count() const { return images.rows(); }
};

namespace detail {

struct IdxFile {
  std::vector<std::size_t> dimensions;
  std::vector<unsigned char> bytes;  ///< as many as the product of the dimensions
};

/// Reads an IDX file of bytes: the numbers 0, 0, 8 (type: byte) and `rank` as one byte each, `rank` dimensions as big-endian
/// 32-bit integers, then the elements. Memory grows with what the file really holds, never with what its header claims.
inline IdxFile read_idx_file(const std::filesystem::path& path, std::size_t rank) {
  const auto fail = [&](const std::string& what) -> void { throw std::runtime_error(path.string() + ": " + what); };

  errno = 0;
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (!file) {
    fail("cannot be opened: " + std::generic_category().message(errno == 0 ? ENOMEM : errno));
  }

  // Up to `count` bytes; fewer at the end of the file.
  const auto read = [&](std::size_t count) {
    constexpr std::size_t chunk = std::size_t{1} << 20U;
    std::vector<unsigned char> bytes;
    while (bytes.size() < count) {
      const std::size_t start = bytes.size();
      const std::size_t wanted = std::min(chunk, count - start);
      bytes.resize(start + wanted);
      const int got = gzread(file.get(), bytes.data() + start, static_cast<unsigned>(wanted));
      int error = Z_OK;
      const char* message = gzerror(file.get(), &error);
      if (got < 0 || error < 0) {
        fail(error == Z_BUF_ERROR ? "ends in the middle of its compressed data" : std::string("cannot be read: ") + message);
      }
      bytes.resize(start + static_cast<std::size_t>(got));
      if (got == 0) {
        break;
      }
    }
    return bytes;
  };

  const std::vector<unsigned char> header = read(4 + 4 * rank);
  if (header.size() < 4 || header[0] != 0 || header[1] != 0) {
    fail("is not an IDX file (it should start with two zero bytes)");
  }
  if (header[2] != 8) {
    fail("holds IDX elements of type " + std::to_string(header[2]) + ", expected 8 (bytes)");
  }
  if (header[3] != rank) {
    fail("has " + std::to_string(header[3]) + " dimensions, expected " + std::to_string(rank));
  }
  if (header.size() < 4 + 4 * rank) {
    fail("ends in the middle of its header");
  }

  IdxFile result;
  std::size_t size = 1;
  for (std::size_t i = 0; i < rank; ++i) {
    const unsigned char* b = &header[4 + 4 * i];
    const std::size_t n = std::size_t{b[0]} << 24U | std::size_t{b[1]} << 16U | std::size_t{b[2]} << 8U | std::size_t{b[3]};
    constexpr std::size_t largest_side = 1024;  // so the product fits in 32 + 10 + 10 bits
    if (n == 0 || (i > 0 && n > largest_side)) {
      fail("has a dimension of " + std::to_string(n) + (n == 0 ? "" : ", expected at most " + std::to_string(largest_side)));
    }
    result.dimensions.push_back(n);
    size *= n;
  }

  result.bytes = read(size);
  if (result.bytes.size() < size) {
    fail("ends after " + std::to_string(result.bytes.size()) + " of the " + std::to_string(size) +
         " elements that its header announces");
  }
  if (!read(1).empty()) {  // reading to the end also lets zlib compare its checksum
    fail("goes on after the " + std::to_string(size) + " elements that its header announces");
  }
  return result;
}

}  // namespace detail

/// Reads gray images (count, H, W) and their labels (count) from a pair of IDX files, compressed with gzip or plain. A byte p
/// becomes p / 127.5 - 1.
///
/// Throws std::runtime_error that names the file, if one is missing, damaged, too short or too long, if the counts differ, or
/// if a label has no class name.
inline DataSet read_idx(const std::filesystem::path& images_path, const std::filesystem::path& labels_path,
                        std::vector<std::string> class_names) {
  const detail::IdxFile labels = detail::read_idx_file(labels_path, 1);
  const detail::IdxFile images = detail::read_idx_file(images_path, 3);
  if (labels.dimensions[0] != images.dimensions[0]) {
    throw std::runtime_error(labels_path.string() + ": has " + std::to_string(labels.dimensions[0]) + " labels for the " +
                             std::to_string(images.dimensions[0]) + " images of " + images_path.string());
  }
  for (std::size_t i = 0; i < labels.bytes.size(); ++i) {
    if (labels.bytes[i] >= class_names.size()) {
      throw std::runtime_error(labels_path.string() + ": label " + std::to_string(i) + " is " +
                               std::to_string(labels.bytes[i]) + ", expected less than " + std::to_string(class_names.size()));
    }
  }

  DataSet set;
  set.channels = 1;
  set.height = Index(images.dimensions[1]);
  set.width = Index(images.dimensions[2]);
  set.class_names = std::move(class_names);
  set.images.resize(Index(images.dimensions[0]), set.height * set.width);
  std::transform(images.bytes.begin(), images.bytes.end(), set.images.data(),
                 [](unsigned char p) { return static_cast<float>(p) / 127.5F - 1.0F; });
  set.labels.assign(labels.bytes.begin(), labels.bytes.end());
  set.origin = std::to_string(set.count()) + " images from " + images_path.string();
  return set;
}

/// Where Debian's package dataset-fashion-mnist puts its files.
inline const std::filesystem::path fashion_mnist_directory = "/usr/share/datasets/fashion-mnist";

namespace detail {

/// A file of the data set, compressed or plain; the compressed name if there is neither.
inline std::filesystem::path idx_file(const std::filesystem::path& directory, const std::string& name) {
  std::error_code ignored;
  const std::filesystem::path compressed = directory / (name + ".gz");
  const bool plain = !std::filesystem::exists(compressed, ignored) && std::filesystem::exists(directory / name, ignored);
  return plain ? directory / name : compressed;
}

}  // namespace detail

/// Fashion-MNIST's training set (Xiao, Rasul and Vollgraf 2017): 60,000 gray images of clothes, 28x28, 6000 a class; its two
/// files compressed with gzip or plain. Throws like `read_idx`.
inline DataSet fashion_mnist(const std::filesystem::path& directory = fashion_mnist_directory) {
  DataSet set =
      read_idx(detail::idx_file(directory, "train-images-idx3-ubyte"), detail::idx_file(directory, "train-labels-idx1-ubyte"),
               {"T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"});
  set.origin = "Fashion-MNIST: " + set.origin;
  return set;
}

namespace detail {

/// Signed distance in pixels, negative inside, from a point (x, y) to a shape of about radius s around the origin.
inline double shape_distance(std::int64_t shape, double x, double y, double s) {
  const double ax = std::abs(x);
  const double ay = std::abs(y);
  const auto outline = [&](double distance) { return std::abs(distance) - 0.2 * s; };
  const auto plus = [&](double u, double v) { return std::max(std::min(u, v) - 0.25 * s, std::max(u, v) - s); };
  const auto bars = [&](double along, double across) { return std::max(outline(across - 0.55 * s), along - 0.9 * s); };
  switch (shape) {
    case 0:
      return std::hypot(x, y) - s;
    case 1:
      return outline(std::hypot(x, y) - 0.8 * s);
    case 2:
      return std::max(ax, ay) - 0.85 * s;
    case 3:
      return outline(std::max(ax, ay) - 0.75 * s);
    case 4:
      return std::max(y, std::sqrt(0.75) * ax - 0.5 * y) - 0.55 * s;
    case 5:
      return (ax + ay) * std::sqrt(0.5) - 0.75 * s;
    case 6:
      return plus(ax, ay);
    case 7:
      return plus(std::abs(x + y) * std::sqrt(0.5), std::abs(x - y) * std::sqrt(0.5));
    case 8:
      return bars(ax, ay);
    default:
      return bars(ay, ax);
  }
}

}  // namespace detail

/// `count` gray images, 28x28, of ten kinds of shape in turn, with random place, size, brightness and a little rotation. Image
/// i is a function of `rng` and i alone.
inline DataSet generated_shapes(Index count, const moxie::Rng& rng, moxie::Exec exec = {}) {
  moxie::detail::expect_at_least("generated_shapes", "count", count, 1);
  DataSet set;
  set.channels = 1;
  set.height = 28;
  set.width = 28;
  set.class_names = {"Disc",    "Ring", "Square", "Frame",           "Triangle",
                     "Diamond", "Plus", "Cross",  "Horizontal bars", "Vertical bars"};
  set.images.resize(count, set.height * set.width);
  set.labels.resize(static_cast<std::size_t>(count));
  exec.parallel_for(count, [&](Index i) {
    const std::int64_t shape = i % Index(set.class_names.size());
    set.labels[static_cast<std::size_t>(i)] = shape;

    const moxie::Rng draw = rng.split(static_cast<std::uint64_t>(i));
    const auto between = [&](std::uint64_t index, double low, double high) { return low + (high - low) * draw.uniform(index); };
    const double center_x = between(0, 11.5, 15.5);
    const double center_y = between(1, 11.5, 15.5);
    const double size = between(2, 6.5, 9.5);
    const double angle = between(3, -0.2, 0.2);
    const double brightness = between(4, 0.6, 1.0);

    float* pixel = set.images.row(i).data();
    for (Index row = 0; row < set.height; ++row) {
      for (Index col = 0; col < set.width; ++col) {
        const double x = double(col) - center_x;
        const double y = double(row) - center_y;
        const double distance = detail::shape_distance(shape, std::cos(angle) * x + std::sin(angle) * y,
                                                       std::cos(angle) * y - std::sin(angle) * x, size);
        const double coverage = std::clamp(0.5 - distance, 0.0, 1.0);  // of the pixel, by the shape: smooth edges
        *pixel++ = static_cast<float>(2.0 * brightness * coverage - 1.0);
      }
    }
  });
  set.origin = std::to_string(count) + " generated shapes";
  return set;
}

/// Fashion-MNIST if `directory` holds it, generated shapes if it holds neither of the two files; `origin` says which. Files
/// that are there and cannot be read are an error, as in `read_idx`.
inline DataSet load_data_set(const std::filesystem::path& directory = fashion_mnist_directory, Index generated_count = 60000) {
  const auto is_absent = [&](const char* name) {
    std::error_code ignored;
    return std::filesystem::status(detail::idx_file(directory, name), ignored).type() == std::filesystem::file_type::not_found;
  };
  if (is_absent("train-images-idx3-ubyte") && is_absent("train-labels-idx1-ubyte")) {
    DataSet set = generated_shapes(generated_count, moxie::Rng{1});
    set.origin += " (no Fashion-MNIST in " + directory.string() + ": install dataset-fashion-mnist)";
    return set;
  }
  return fashion_mnist(directory);
}

}  // namespace dit

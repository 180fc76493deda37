// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <memory>
#include <moxie/core/exec.hpp>
#include <moxie/core/matrix.hpp>
#include <moxie/core/random.hpp>
#include <moxie/io/safetensors.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
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
  Matrix<float> images;  ///< (count, C·H·W): a row is an image, channel after channel, row after row; in [-1, 1] but for the
                         ///< floats of a safetensors file, which are what they are
  std::vector<std::int64_t> labels;  ///< (count), in [0, number of class names)
  std::string origin;                ///< one line that says what the images are, and where they are from

  Index count() const { return images.rows(); }
};

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

namespace detail {

/// A byte p becomes p / 127.5 - 1.
inline float pixel_of(std::uint8_t p) { return static_cast<float>(p) / 127.5F - 1.0F; }

inline std::string sizes_text(const DataSet& set) {
  return "(channels " + std::to_string(set.channels) + ", height " + std::to_string(set.height) + ", width " +
         std::to_string(set.width) + ", classes " + std::to_string(set.class_names.size()) + ")";
}
inline std::string origin_of(const DataSet& set, const std::filesystem::path& path) {
  return std::to_string(set.count()) + " images " + sizes_text(set) + " from " + path.string();
}

/// "0", "1", ... up to the largest label.
inline std::vector<std::string> label_numbers(const std::vector<std::int64_t>& labels) {
  std::vector<std::string> names(static_cast<std::size_t>(*std::max_element(labels.begin(), labels.end()) + 1));
  for (std::size_t i = 0; i < names.size(); ++i) {
    names[i] = std::to_string(i);
  }
  return names;
}

struct IdxFile {
  std::vector<std::size_t> dimensions;
  std::vector<std::uint8_t> bytes;  ///< as many as the product of the dimensions
};

/// Reads an IDX file of bytes: the numbers 0, 0, 8 (type: byte) and their rank as one byte each, as many dimensions as
/// big-endian 32-bit integers, then the elements. Memory grows with what the file really holds, never with what its header
/// claims.
inline IdxFile read_idx_file(const std::filesystem::path& path, std::initializer_list<std::size_t> ranks) {
  const auto fail = [&](const std::string& what) -> void { throw std::runtime_error(path.string() + ": " + what); };

  std::error_code ignored;
  const std::filesystem::file_status status = std::filesystem::status(path, ignored);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    fail("is not a regular file");  // nor opened, which would wait for ever at a pipe
  }
  errno = 0;
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (!file) {
    fail("cannot be opened: " + std::generic_category().message(errno == 0 ? ENOMEM : errno));
  }

  // Up to `count` bytes; fewer at the end of the file.
  const auto read = [&](std::size_t count) {
    constexpr std::size_t chunk = std::size_t{1} << 20U;
    std::vector<std::uint8_t> bytes;
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

  const std::vector<std::uint8_t> magic = read(4);
  if (magic.size() < 4 || magic[0] != 0 || magic[1] != 0) {
    fail("is not an IDX file (it should start with two zero bytes)");
  }
  if (magic[2] != 8) {
    fail("holds IDX elements of type " + std::to_string(magic[2]) + ", expected 8 (bytes)");
  }
  const std::size_t rank = magic[3];
  if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) {
    std::string expected;
    for (const std::size_t r : ranks) {
      expected += (expected.empty() ? "" : " or ") + std::to_string(r);
    }
    fail("has " + std::to_string(rank) + " dimensions, expected " + expected);
  }
  const std::vector<std::uint8_t> header = read(4 * rank);
  if (header.size() < 4 * rank) {
    fail("ends in the middle of its header");
  }

  IdxFile result;
  std::size_t size = 1;
  for (std::size_t i = 0; i < rank; ++i) {
    const std::uint8_t* b = &header[4 * i];
    const std::size_t n = std::size_t{b[0]} << 24U | std::size_t{b[1]} << 16U | std::size_t{b[2]} << 8U | std::size_t{b[3]};
    constexpr std::size_t largest_side = 1024;  // so the product fits in 32 + 3 · 10 bits
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

/// Reads images (count, H, W) or (count, C, H, W) and their labels (count) from a pair of IDX files of bytes, compressed with
/// gzip or plain. Classes are called by their numbers, except those of Fashion-MNIST, which is known by its labels.
///
/// Throws std::runtime_error that names the file, if one is missing, damaged, too short or too long, or if the counts differ.
inline DataSet read_idx(const std::filesystem::path& images_path, const std::filesystem::path& labels_path) {
  const detail::IdxFile images = detail::read_idx_file(images_path, {3, 4});
  const detail::IdxFile labels = detail::read_idx_file(labels_path, {1});
  if (labels.dimensions[0] != images.dimensions[0]) {
    throw std::runtime_error(labels_path.string() + ": has " + std::to_string(labels.dimensions[0]) + " labels for the " +
                             std::to_string(images.dimensions[0]) + " images of " + images_path.string());
  }

  DataSet set;
  set.channels = images.dimensions.size() == 3 ? 1 : Index(images.dimensions[1]);
  set.height = Index(images.dimensions.end()[-2]);
  set.width = Index(images.dimensions.end()[-1]);
  set.images.resize(Index(images.dimensions[0]), set.channels * set.height * set.width);
  std::transform(images.bytes.begin(), images.bytes.end(), set.images.data(), detail::pixel_of);
  set.labels.assign(labels.bytes.begin(), labels.bytes.end());

  const auto checksum = crc32(0, labels.bytes.data(), static_cast<unsigned>(labels.bytes.size()));
  const bool fashion_mnist = checksum == 0x2ED6E46A || checksum == 0x242BC73F;  // of the training set, the test set
  set.class_names = fashion_mnist ? std::vector<std::string>{"T-shirt", "Trouser", "Pullover", "Dress", "Coat",
                                                             "Sandal",  "Shirt",   "Sneaker",  "Bag",   "Ankle boot"}
                                  : detail::label_numbers(set.labels);
  set.origin = (fashion_mnist ? "Fashion-MNIST: " : "") + detail::origin_of(set, images_path);
  return set;
}

namespace detail {

/// The first of the files that is there, compressed or plain; the first name, plain, if none is.
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

/// The same from a folder, which holds train-images-idx3-ubyte (or idx4) and train-labels-idx1-ubyte, both with or without .gz;
/// or from a file of images, whose labels are beside it and are named so.
inline DataSet read_idx(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    throw std::runtime_error(path.string() + ": does not exist, or cannot be reached");
  }
  const auto images = std::filesystem::is_directory(path, error) ? detail::training_images_in(path) : path;
  return read_idx(images, detail::labels_beside(images));
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
    std::transform(bytes.begin(), bytes.end(), set.images.data(), detail::pixel_of);
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
  set.class_names = detail::label_numbers(set.labels);
  for (std::string& name : set.class_names) {
    if (const auto found = file.metadata().find("class." + name); found != file.metadata().end()) {
      name = found->second;
    }
  }
  set.origin = detail::origin_of(set, path) + (file.contains("labels") ? "" : "; no labels: all of one class");
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
  set.origin = std::to_string(count) + " generated shapes " + detail::sizes_text(set);
  return set;
}

/// Where Debian's package dataset-fashion-mnist puts Fashion-MNIST (Xiao, Rasul and Vollgraf 2017).
inline const std::filesystem::path fashion_mnist_directory = "/usr/share/datasets/fashion-mnist";

/// Fashion-MNIST's training set, 60,000 gray images of clothes, 28x28, if `directory` holds it; generated shapes if it holds
/// neither images nor labels. Files that are there and cannot be read are an error, as in `read_idx`.
inline DataSet default_data_set(const std::filesystem::path& directory = fashion_mnist_directory,
                                Index generated_count = 60000) {
  const auto is_absent = [](const std::filesystem::path& file) {
    std::error_code ignored;
    return std::filesystem::status(file, ignored).type() == std::filesystem::file_type::not_found;
  };
  const std::filesystem::path images = detail::training_images_in(directory);
  const std::filesystem::path labels = detail::labels_beside(images);
  if (is_absent(images) && is_absent(labels)) {
    DataSet set = generated_shapes(generated_count, moxie::Rng{1});
    set.origin += "; no Fashion-MNIST in " + directory.string() + ": install dataset-fashion-mnist";
    return set;
  }
  return read_idx(images, labels);
}

/// What `path` names: a .safetensors file, or IDX files as in `read_idx`. Without one, the default. Throws like the functions
/// that read them.
inline DataSet load_data_set(const std::optional<std::filesystem::path>& path = {}) {
  if (!path) {
    return default_data_set();
  }
  return path->extension() == ".safetensors" ? read_safetensors(*path) : read_idx(*path);
}

}  // namespace dit

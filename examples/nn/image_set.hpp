// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <moxie/core/matrix.hpp>
#include <string>
#include <vector>

namespace nn {

using moxie::Index;
using moxie::Matrix;

/// Images with a class each, for example what a diffusion transformer learns to draw.
struct ImageSet {
  Index channels = 0;
  Index height = 0;
  Index width = 0;
  std::vector<std::string> class_names;
  /// (count, C·H·W): a row is an image, channel after channel, row after row. Pixels that were bytes are in [-1, 1].
  Matrix<float> images;
  std::vector<std::int64_t> labels;  ///< (count), in [0, number of class names)
  std::string origin;                ///< one line: what the images are, and where they are from

  Index count() const { return images.rows(); }
};

/// A byte p becomes p / 127.5 - 1.
inline float pixel_of(std::uint8_t p) { return static_cast<float>(p) / 127.5F - 1.0F; }

/// "(channels 1, height 28, width 28, classes 10)".
inline std::string sizes_text(const ImageSet& set) {
  return "(channels " + std::to_string(set.channels) + ", height " + std::to_string(set.height) + ", width " +
         std::to_string(set.width) + ", classes " + std::to_string(set.class_names.size()) + ")";
}
/// What `ImageSet::origin` says of images from a file.
inline std::string origin_of(const ImageSet& set, const std::filesystem::path& path) {
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

}  // namespace nn

// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <moxie/core/error.hpp>
#include <moxie/core/matrix.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace nn {

using moxie::Index;

/// An image of 8-bit red, green and blue.
struct Picture {
  using Color = std::array<std::uint8_t, 3>;

  Index width;
  Index height;
  std::vector<std::uint8_t> rgb;  ///< height · width · 3, row after row

  /// All of `background`. Throws ValueError unless both sizes are from 1 to 65,535.
  Picture(Index columns, Index rows, Color background = {255, 255, 255}) : width(columns), height(rows) {
    constexpr Index largest = 65535;
    moxie::detail::expect_value(width >= 1 && width <= largest && height >= 1 && height <= largest, "Picture",
                                "a size is not from 1 to 65535");
    rgb.reserve(std::size_t(3 * width * height));
    for (Index i = 0; i < width * height; ++i) {
      rgb.insert(rgb.end(), background.begin(), background.end());
    }
  }

  /// Fills the square of `side` pixels whose upper left corner is (x, y). What lies outside the picture is left out.
  void fill(Index x, Index y, Index side, Color color) {
    for (Index row = std::max<Index>(y, 0); row < std::min(y + side, height); ++row) {
      for (Index column = std::max<Index>(x, 0); column < std::min(x + side, width); ++column) {
        std::copy(color.begin(), color.end(), &rgb[std::size_t(3 * (row * width + column))]);
      }
    }
  }

  /// A square gray image of side² pixels in [-1, 1], in place (row, column) of a grid of such images, each pixel `zoom` pixels
  /// wide. Where it is white, the picture becomes `color(pixel)`; where it is black, `darkest` times that.
  template <class Colors>
  void paint(Index row, Index column, const float* image, Index side, Index zoom, Colors&& color, float darkest = 0.3F) {
    for (Index pixel = 0; pixel < side * side; ++pixel) {
      const float light = darkest + (1 - darkest) * std::clamp(image[pixel] / 2 + 0.5F, 0.0F, 1.0F);
      Color c = color(pixel);
      std::transform(c.begin(), c.end(), c.begin(), [&](std::uint8_t part) { return std::uint8_t(light * float(part)); });
      fill(zoom * (column * side + pixel % side), zoom * (row * side + pixel / side), zoom, c);
    }
  }
  /// The same in gray, black being black.
  void paint(Index row, Index column, const float* image, Index side, Index zoom) {
    paint(
        row, column, image, side, zoom,
        [](Index) {
          return Color{255, 255, 255};
        },
        0);
  }
};

/// Eight colors that are easy to tell apart, in turn.
inline Picture::Color palette(Index i) {
  constexpr std::array<Picture::Color, 8> colors{{{240, 90, 80},
                                                  {90, 150, 240},
                                                  {100, 200, 100},
                                                  {250, 210, 70},
                                                  {190, 110, 220},
                                                  {90, 220, 220},
                                                  {250, 150, 40},
                                                  {225, 225, 225}}};
  return colors[std::size_t(i) % colors.size()];
}

/// Writes a PNG file (ISO/IEC 15948): signature, header, one compressed block of rows without filters, end. Throws
/// std::runtime_error if the file cannot be written.
inline void write_png(const std::filesystem::path& path, const Picture& picture) {
  const auto fail = [&](const char* what) { throw std::runtime_error(path.string() + ": " + what); };
  const auto big_endian = [](std::size_t n) {  // four bytes
    return std::string{static_cast<char>(n >> 24U), static_cast<char>(n >> 16U), static_cast<char>(n >> 8U),
                       static_cast<char>(n)};
  };
  const auto bytes_of = [](std::string_view text) { return reinterpret_cast<const Bytef*>(text.data()); };
  const auto block = [&](const std::string& type, const std::string& data) {  // length, type, data, checksum
    const std::string covered = type + data;
    return big_endian(data.size()) + covered + big_endian(crc32_z(0, bytes_of(covered), covered.size()));
  };
  std::string rows;  // each begins with the number of its filter, 0
  const auto stride = std::size_t(3 * picture.width);
  for (std::size_t at = 0; at < picture.rgb.size(); at += stride) {
    rows += '\0';
    rows.append(reinterpret_cast<const char*>(&picture.rgb[at]), stride);
  }
  uLongf size = compressBound(rows.size());
  std::string packed(size, '\0');
  if (compress2(reinterpret_cast<Bytef*>(packed.data()), &size, bytes_of(rows), rows.size(), 9) != Z_OK) {
    fail("the picture cannot be compressed");
  }
  packed.resize(size);

  const std::string header =
      big_endian(std::size_t(picture.width)) + big_endian(std::size_t(picture.height)) + std::string("\x08\x02\0\0\0", 5);
  std::ofstream file(path, std::ios::binary);
  file << "\x89PNG\r\n\x1A\n" << block("IHDR", header) << block("IDAT", packed) << block("IEND", "");
  file.close();
  if (!file) {
    fail("cannot be written");
  }
}

}  // namespace nn

// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace nn {

/// An image of 8-bit red, green and blue.
struct Picture {
  using Color = std::array<std::uint8_t, 3>;

  std::uint32_t width;
  std::uint32_t height;
  std::vector<std::uint8_t> rgb;  ///< height · width · 3, row after row

  Picture(std::uint32_t columns, std::uint32_t rows, Color background = {255, 255, 255}) : width(columns), height(rows) {
    rgb.reserve(std::size_t{3} * width * height);
    for (std::size_t i = 0; i < std::size_t{width} * height; ++i) {
      rgb.insert(rgb.end(), background.begin(), background.end());
    }
  }

  /// The square of `side` pixels whose upper left corner is (x, y); what lies outside the picture is left out.
  void fill(std::uint32_t x, std::uint32_t y, std::uint32_t side, Color color) {
    for (std::uint32_t row = y; row < y + side && row < height; ++row) {
      for (std::uint32_t column = x; column < x + side && column < width; ++column) {
        for (std::size_t c = 0; c < 3; ++c) {
          rgb[3 * (std::size_t{row} * width + column) + c] = color[c];
        }
      }
    }
  }
};

/// Writes a PNG file (ISO/IEC 15948): signature, header, one compressed block of rows without filters, end. Throws
/// std::runtime_error if the picture is empty or the file cannot be written.
inline void write_png(const std::filesystem::path& path, const Picture& picture) {
  const auto fail = [&](const char* what) { throw std::runtime_error(path.string() + ": " + what); };
  const auto big_endian = [](std::uint32_t n) {
    return std::string{static_cast<char>(n >> 24U), static_cast<char>(n >> 16U), static_cast<char>(n >> 8U),
                       static_cast<char>(n)};
  };
  const auto bytes_of = [](std::string_view text) { return reinterpret_cast<const Bytef*>(text.data()); };
  const auto block = [&](const std::string& type, const std::string& data) {  // length, type, data, checksum
    const std::string covered = type + data;
    return big_endian(static_cast<std::uint32_t>(data.size())) + covered +
           big_endian(static_cast<std::uint32_t>(crc32_z(0, bytes_of(covered), covered.size())));
  };
  if (picture.width == 0 || picture.height == 0) {
    fail("a picture without pixels");
  }

  std::string rows;  // each begins with the number of its filter, 0
  const std::size_t stride = std::size_t{3} * picture.width;
  for (std::size_t row = 0; row < picture.height; ++row) {
    rows += '\0';
    rows.append(reinterpret_cast<const char*>(&picture.rgb[row * stride]), stride);
  }
  uLongf size = compressBound(rows.size());
  std::string packed(size, '\0');
  if (compress2(reinterpret_cast<Bytef*>(packed.data()), &size, bytes_of(rows), rows.size(), 9) != Z_OK) {
    fail("the picture cannot be compressed");
  }
  packed.resize(size);

  const std::string header = big_endian(picture.width) + big_endian(picture.height) + std::string("\x08\x02\0\0\0", 5);
  std::ofstream file(path, std::ios::binary);
  file << "\x89PNG\r\n\x1A\n" << block("IHDR", header) << block("IDAT", packed) << block("IEND", "");
  file.close();
  if (!file) {
    fail("cannot be written");
  }
}

}  // namespace nn

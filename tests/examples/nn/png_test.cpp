// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <idx_files.hpp>
#include <nn/png.hpp>
#include <stdexcept>
#include <string>
#include <temporary_folder.hpp>
#include <vector>

namespace {

std::uint32_t number_at(const std::string& bytes, std::size_t at) {
  std::uint32_t n = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    n = n << 8U | static_cast<unsigned char>(bytes[at + i]);
  }
  return n;
}

}  // namespace

TEST_CASE("write_png: signature, blocks with their checksums, and rows that decompress to the picture") {
  const moxie::test::TemporaryFolder dir;
  nn::Picture picture(7, 5, {1, 2, 3});
  picture.fill(5, 3, 4, {255, 0, 128});  // reaches over the edge
  CHECK(picture.rgb[3 * (3 * 7 + 5)] == 255);
  CHECK(picture.rgb[3 * (3 * 7 + 4)] == 1);
  CHECK(picture.rgb.size() == 105);
  write_png(dir / "a.png", picture);
  const std::string bytes = moxie::test::file_bytes(dir / "a.png");
  REQUIRE(bytes.substr(0, 8) == "\x89PNG\r\n\x1A\n");

  std::vector<std::string> types;
  std::string packed;
  std::size_t at = 8;
  while (at < bytes.size()) {
    const std::size_t size = number_at(bytes, at);
    REQUIRE(at + size + 12 <= bytes.size());
    const std::string covered = bytes.substr(at + 4, size + 4);
    CHECK(number_at(bytes, at + 8 + size) == crc32_z(0, reinterpret_cast<const Bytef*>(covered.data()), covered.size()));
    types.push_back(covered.substr(0, 4));
    if (types.back() == "IHDR") {
      CHECK(covered.substr(4) == std::string("\0\0\0\7\0\0\0\5\x08\x02\0\0\0", 13));
    }
    packed += types.back() == "IDAT" ? covered.substr(4) : "";
    at += size + 12;
  }
  CHECK(types == std::vector<std::string>{"IHDR", "IDAT", "IEND"});

  std::string rows(5 * (1 + 21), '?');
  uLongf size = rows.size();
  REQUIRE(uncompress(reinterpret_cast<Bytef*>(rows.data()), &size, reinterpret_cast<const Bytef*>(packed.data()),
                     packed.size()) == Z_OK);
  REQUIRE(size == rows.size());
  for (std::size_t row = 0; row < 5; ++row) {
    CHECK(rows[row * 22] == 0);
    for (std::size_t i = 0; i < 21; ++i) {
      CHECK(static_cast<std::uint8_t>(rows[row * 22 + 1 + i]) == picture.rgb[row * 21 + i]);
    }
  }
}

TEST_CASE("Picture: paints an image in its place, white in the color of the pixel") {
  nn::Picture picture(8, 4);
  const std::vector<float> image{-1, 1, 0, 7};
  picture.paint(
      0, 1, image.data(), 2, 2, [](moxie::Index pixel) { return nn::palette(pixel + 7); }, 0.5F);
  const auto at = [&](std::size_t x, std::size_t y) {
    const std::uint8_t* c = &picture.rgb[3 * (8 * y + x)];
    return nn::Picture::Color{c[0], c[1], c[2]};
  };
  CHECK(at(3, 1) == nn::Picture::Color{255, 255, 255});  // outside
  CHECK(at(4, 0) == nn::Picture::Color{112, 112, 112});
  CHECK(at(6, 0) == nn::palette(0));
  CHECK(at(7, 1) == nn::palette(0));
  CHECK(at(4, 2)[0] == nn::palette(1)[0] * 3 / 4);
  CHECK(at(6, 3) == nn::palette(2));
  CHECK(nn::palette(0) != nn::palette(1));
  picture.paint(0, 0, image.data(), 2, 2);
  CHECK(at(0, 0) == nn::Picture::Color{0, 0, 0});
  CHECK(at(3, 0) == nn::Picture::Color{255, 255, 255});
}

TEST_CASE("Picture: refuses sizes that no picture has; write_png: refuses a path that cannot be written") {
  const moxie::test::TemporaryFolder dir;
  CHECK_THROWS_AS(nn::Picture(0, 3), moxie::ValueError);
  CHECK_THROWS_AS(nn::Picture(3, 65536), moxie::ValueError);
  CHECK_THROWS_AS(write_png(dir / "absent" / "a.png", nn::Picture(3, 3)), std::runtime_error);
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <idx_files.hpp>
#include <limits>
#include <nn/fashion_mnist.hpp>
#include <string>
#include <temporary_folder.hpp>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Bytes = std::string;
using Labels = std::vector<std::int64_t>;
using Names = std::vector<std::string>;

using moxie::test::complaint_of;
using moxie::test::contains;
using moxie::test::file_bytes;
using moxie::test::idx;
using moxie::test::TemporaryFolder;
using moxie::test::write_gz;
using moxie::test::write_plain;

/// What `read_idx` complains about, or "".
std::string complaint(const fs::path& images, const fs::path& labels) {
  return complaint_of([&] { nn::read_idx(images, labels); });
}

}  // namespace

TEST_CASE("read_idx: reads images and labels, plain and compressed alike") {
  const TemporaryFolder dir;
  const fs::path images = dir.path / "images";
  const fs::path labels = dir.path / "labels";
  const Bytes image_bytes = idx({2, 2, 3}, Bytes("\x00\x33\x66\x99\xCC\xFF\xFF\xCC\x99\x66\x33\x00", 12));
  const Bytes label_bytes = idx({2}, Bytes("\x02\x00", 2));
  for (const bool compressed : {false, true}) {
    CAPTURE(compressed);
    const auto write = compressed ? write_gz : write_plain;
    write(images, image_bytes);
    write(labels, label_bytes);
    const nn::ImageSet set = nn::read_idx(images, labels);
    CHECK(set.count() == 2);
    CHECK(set.channels == 1);
    CHECK(set.height == 2);
    CHECK(set.width == 3);
    CHECK(set.labels == Labels{2, 0});
    CHECK(set.class_names == Names{"0", "1", "2"});
    REQUIRE(set.images.cols() == 6);
    for (int j = 0; j < 6; ++j) {
      CHECK(set.images(0, j) == doctest::Approx(-1.0 + 0.4 * j));
      CHECK(set.images(1, j) == doctest::Approx(1.0 - 0.4 * j));
    }
    CHECK(set.images.minCoeff() == -1.0F);
    CHECK(set.images.maxCoeff() == 1.0F);
    CHECK(set.origin == "2 images (channels 1, height 2, width 3, classes 3) from " + images.string());
  }
}

TEST_CASE("read_idx: reads images of several channels, and 256 classes") {
  const TemporaryFolder dir;
  write_plain(dir.path / "images", idx({2, 3, 1, 2}, Bytes("\x00\xFF\x00\xFF\x00\xFF\xFF\xFF\xFF\x00\x00\x00", 12)));
  write_plain(dir.path / "labels", idx({2}, Bytes("\xFF\x00", 2)));
  const nn::ImageSet set = nn::read_idx(dir.path / "images", dir.path / "labels");
  CHECK(set.channels == 3);
  CHECK(set.height == 1);
  CHECK(set.width == 2);
  CHECK(set.images.row(0) == moxie::Matrix<float>{{-1, 1, -1, 1, -1, 1}});
  CHECK(set.images.row(1) == moxie::Matrix<float>{{1, 1, 1, -1, -1, -1}});
  CHECK(set.labels == Labels{255, 0});
  REQUIRE(set.class_names.size() == 256);
  CHECK(set.class_names[255] == "255");
}

TEST_CASE("read_idx: reads files longer than one chunk") {
  const TemporaryFolder dir;
  Bytes pixels(1500 * 28 * 28, '\0');
  for (std::size_t i = 0; i < pixels.size(); ++i) {
    pixels[i] = static_cast<char>(i * 2654435761U >> 13U);
  }
  write_gz(dir.path / "images", idx({1500, 28, 28}, pixels));
  write_gz(dir.path / "labels", idx({1500}, Bytes(1500, '\1')));
  const nn::ImageSet set = nn::read_idx(dir.path / "images", dir.path / "labels");
  REQUIRE(set.images.size() == static_cast<moxie::Index>(pixels.size()));
  bool equal = true;
  for (std::size_t i = 0; i < pixels.size(); ++i) {
    const float expected = static_cast<float>(static_cast<unsigned char>(pixels[i])) / 127.5F - 1.0F;
    equal = equal && set.images.data()[i] == expected;
  }
  CHECK(equal);
}

TEST_CASE("read_idx: refuses a bad file and names it") {
  const TemporaryFolder dir;
  const fs::path images = dir.path / "good-images";
  const fs::path labels = dir.path / "good-labels";
  const fs::path bad = dir.path / "bad-file";
  const Bytes image_bytes = idx({2, 2, 3}, Bytes(12, '\7'));
  write_plain(images, image_bytes);
  write_plain(labels, idx({2}, Bytes("\x02\x00", 2)));
  REQUIRE(complaint(images, labels).empty());

  const auto check_images = [&](const std::string& expected) {
    const std::string message = complaint(bad, labels);
    CAPTURE(message);
    CHECK(contains(message, expected));
    CHECK(contains(message, bad.string()));
  };
  const auto check_labels = [&](const std::string& expected) {
    const std::string message = complaint(images, bad);
    CAPTURE(message);
    CHECK(contains(message, expected));
    CHECK(contains(message, bad.string()));
  };

  SUBCASE("a missing file") {
    check_images("cannot be opened: No such file or directory");
    check_labels("cannot be opened: No such file or directory");
  }
  SUBCASE("a directory") {
    fs::create_directory(bad);
    check_images("is not a regular file");
  }
  SUBCASE("an empty file") {
    write_plain(bad, "");
    check_images("is not an IDX file");
    check_labels("is not an IDX file");
  }
  SUBCASE("another format") {
    write_plain(bad, "P5 28 28 255 and so on and so on");
    check_images("is not an IDX file");
  }
  SUBCASE("elements that are not bytes") {
    Bytes floats = image_bytes;
    floats[2] = 13;
    write_plain(bad, floats);
    check_images("type 13, expected 8");
  }
  SUBCASE("labels where images should be, and the other way round") {
    write_plain(bad, idx({2}, Bytes(2, '\0')));
    check_images("has 1 dimensions, expected 3 or 4");
    write_plain(bad, image_bytes);
    check_labels("has 3 dimensions, expected 1");
    write_plain(bad, idx({1, 1, 1, 1, 1}, "x"));
    check_images("has 5 dimensions, expected 3 or 4");
  }
  SUBCASE("every truncation of a plain file") {
    for (std::size_t n = 0; n < image_bytes.size(); ++n) {
      CAPTURE(n);
      write_plain(bad, image_bytes.substr(0, n));
      check_images(n < 4 ? "is not an IDX file" : n < 16 ? "in the middle of its header" : "of the 12 elements");
    }
  }
  SUBCASE("every truncation of a compressed file") {
    write_gz(bad, image_bytes);
    const Bytes whole = file_bytes(bad);
    for (std::size_t n = 0; n < whole.size(); ++n) {
      CAPTURE(n);
      write_plain(bad, whole.substr(0, n));
      check_images("");
      CHECK(!complaint(bad, labels).empty());
    }
  }
  SUBCASE("damaged compressed data") {
    Bytes pixels(5000 * 6, '\0');
    for (std::size_t i = 0; i < pixels.size(); ++i) {
      pixels[i] = static_cast<char>(i * 2654435761U >> 13U);
    }
    write_plain(bad, "\x1F\x8B\x08 and no more of gzip's format");
    check_images("cannot be read");
    write_gz(bad, idx({5000, 2, 3}, pixels));
    Bytes damaged = file_bytes(bad);
    damaged[damaged.size() / 2] = static_cast<char>(damaged[damaged.size() / 2] ^ 0x55);
    write_plain(bad, damaged);
    check_images("cannot be read");
  }
  SUBCASE("a wrong checksum") {
    write_gz(bad, image_bytes);
    Bytes damaged = file_bytes(bad);
    damaged[damaged.size() - 8] = static_cast<char>(damaged[damaged.size() - 8] ^ 1);
    write_plain(bad, damaged);
    check_images("cannot be read");
  }
  SUBCASE("trailing data") {
    write_plain(bad, image_bytes + "x");
    check_images("goes on after the 12 elements");
    write_gz(bad, image_bytes + "x");
    check_images("goes on after the 12 elements");
  }
  SUBCASE("a dimension of zero") {
    write_plain(bad, idx({0, 2, 3}, ""));
    check_images("has a dimension of 0");
    write_plain(bad, idx({2, 2, 0}, ""));
    check_images("has a dimension of 0");
  }
  SUBCASE("a header that announces more than memory could hold") {
    constexpr std::uint32_t most = std::numeric_limits<std::uint32_t>::max();
    write_plain(bad, idx({most, most, most}, Bytes(12, '\0')));
    check_images("has a dimension of 4294967295, expected at most 1024");
    write_plain(bad, idx({most, 1024, 1024}, Bytes(12, '\0')));
    check_images("announces more than 1073741824 elements");
    write_gz(bad, idx({most, 1024, 1024, 1024}, Bytes(12, '\0')));
    check_images("announces more than 1073741824 elements");
    write_gz(bad, idx({most}, Bytes(12, '\0')));
    check_labels("announces more than 1073741824 elements");
    write_plain(bad, idx({1024, 1024, 1024}, Bytes(12, '\0')));
    check_images("announces 1073741824 elements in 28 bytes, expected at most 100 for each byte");
  }
  SUBCASE("as many labels as images are needed") {
    write_plain(bad, idx({3}, Bytes(3, '\0')));
    check_labels("has 3 labels for the 2 images of " + images.string());
    write_plain(bad, idx({1}, Bytes(1, '\0')));
    check_labels("has 1 labels for the 2 images of " + images.string());
  }
}

// 1 MB of gzip can hold 1 GB of zeros, and 5 GB as bytes and floats.
TEST_CASE("read_idx: a small file that holds very much is refused with its header") {
  const TemporaryFolder dir;
  const fs::path part = dir.path / "part";
  const fs::path images = dir.path / "images";
  const fs::path labels = dir.path / "labels";
  write_gz(part, Bytes(std::size_t{1} << 24U, '\0'));
  const Bytes zeros = file_bytes(part);
  write_gz(part, idx({1024, 1024, 1024}, ""));
  {
    std::ofstream file(images, std::ios::binary);
    file << file_bytes(part);
    for (int i = 0; i < 64; ++i) {
      file << zeros;
    }
  }
  write_plain(labels, idx({1024}, Bytes(1024, '\0')));
  CHECK(fs::file_size(images) < 1.1e6);
  CHECK(contains(complaint(images, labels), "images: announces 1073741824 elements in "));

  // As many pixels in a file that could be images: announced, and compared with the labels before they are read.
  write_plain(labels, idx({1023}, Bytes(1023, '\0')));
  write_plain(images, idx({1024, 1024, 16}, Bytes(200000, '\0')));
  CHECK(contains(complaint(images, labels), "has 1023 labels for the 1024 images"));
}

TEST_CASE("read_idx: up to 16 MiB of elements may come from a file of any size") {
  const TemporaryFolder dir;
  const fs::path images = dir.path / "images";
  const fs::path labels = dir.path / "labels";
  write_plain(labels, idx({16}, Bytes(16, '\0')));
  write_gz(images, idx({16, 1024, 1024}, Bytes(std::size_t{1} << 24U, '\0')));
  CHECK(fs::file_size(images) < 20000);
  CHECK(nn::read_idx(images, labels).count() == 16);
  write_plain(labels, idx({17}, Bytes(17, '\0')));
  write_gz(images, idx({17, 1024, 1024}, Bytes(17 * (std::size_t{1} << 20U), '\0')));
  CHECK(contains(complaint(images, labels), "expected at most 100 for each byte"));
}

TEST_CASE("fashion_mnist_or_shapes: generated shapes where there is no Fashion-MNIST, and says so") {
  const TemporaryFolder dir;
  for (const fs::path& empty : {dir.path, dir.path / "absent"}) {
    const nn::ImageSet set = nn::fashion_mnist_or_shapes(empty, 30);
    CHECK(set.count() == 30);
    CHECK(set.origin == "30 generated shapes (channels 1, height 28, width 28, classes 10); no Fashion-MNIST in " +
                            empty.string() + ": install dataset-fashion-mnist");
  }
}

TEST_CASE("fashion_mnist_or_shapes: reads the files that are there, and never passes over damaged ones") {
  const TemporaryFolder dir;
  const fs::path images = dir.path / "train-images-idx3-ubyte.gz";
  const fs::path labels = dir.path / "train-labels-idx1-ubyte.gz";
  const auto complaint_here = [&] { return complaint_of([&] { nn::fashion_mnist_or_shapes(dir.path, 1); }); };
  write_gz(images, idx({2, 4, 4}, Bytes(32, '\xFF')));
  CHECK(contains(complaint_here(), "train-labels-idx1-ubyte: cannot be opened"));

  write_gz(labels, idx({2}, Bytes("\x09\x05", 2)));
  CHECK(nn::fashion_mnist_or_shapes(dir.path).labels == Labels{9, 5});

  write_plain(images, "damaged");
  CHECK(contains(complaint_here(), images.string() + ": is not an IDX file"));
  fs::remove(images);
  CHECK(contains(complaint_here(), "train-images-idx3-ubyte: cannot be opened"));
}

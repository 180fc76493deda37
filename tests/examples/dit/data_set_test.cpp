// SPDX-License-Identifier: MIT
#include "dit/data_set.hpp"

#include <doctest/doctest.h>
#include <stdlib.h>
#include <zlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Bytes = std::string;

/// A fresh directory that goes away with its contents.
struct TemporaryDirectory {
  fs::path path;
  TemporaryDirectory() {
    std::string name = (fs::temp_directory_path() / "moxie-data-set-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};

Bytes idx(const std::vector<std::uint32_t>& dimensions, const Bytes& elements) {
  Bytes b{0, 0, 8, static_cast<char>(dimensions.size())};
  for (const std::uint32_t n : dimensions) {
    for (const unsigned shift : {24U, 16U, 8U, 0U}) {
      b += static_cast<char>(n >> shift);
    }
  }
  return b + elements;
}

void write_plain(const fs::path& path, const Bytes& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

void write_gz(const fs::path& path, const Bytes& bytes) {
  gzFile file = gzopen(path.c_str(), "wb");
  REQUIRE(file != nullptr);
  REQUIRE(gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size())) == static_cast<int>(bytes.size()));
  REQUIRE(gzclose(file) == Z_OK);
}

Bytes file_bytes(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// What `read_idx` complains about, or "".
std::string complaint(const fs::path& images, const fs::path& labels) {
  try {
    dit::read_idx(images, labels, {"a", "b", "c"});
    return "";
  } catch (const std::runtime_error& e) {
    return e.what();
  }
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("read_idx: reads images and labels, plain and compressed alike") {
  const TemporaryDirectory dir;
  const fs::path images = dir.path / "images";
  const fs::path labels = dir.path / "labels";
  const Bytes image_bytes = idx({2, 2, 3}, Bytes("\x00\x33\x66\x99\xCC\xFF\xFF\xCC\x99\x66\x33\x00", 12));
  const Bytes label_bytes = idx({2}, Bytes("\x02\x00", 2));
  for (const bool compressed : {false, true}) {
    CAPTURE(compressed);
    const auto write = compressed ? write_gz : write_plain;
    write(images, image_bytes);
    write(labels, label_bytes);
    const dit::DataSet set = dit::read_idx(images, labels, {"a", "b", "c"});
    CHECK(set.count() == 2);
    CHECK(set.channels == 1);
    CHECK(set.height == 2);
    CHECK(set.width == 3);
    CHECK(set.labels == std::vector<std::int64_t>{2, 0});
    CHECK(set.class_names == std::vector<std::string>{"a", "b", "c"});
    REQUIRE(set.images.cols() == 6);
    for (int j = 0; j < 6; ++j) {
      CHECK(set.images(0, j) == doctest::Approx(-1.0 + 0.4 * j));
      CHECK(set.images(1, j) == doctest::Approx(1.0 - 0.4 * j));
    }
    CHECK(set.images.minCoeff() == -1.0F);
    CHECK(set.images.maxCoeff() == 1.0F);
    CHECK(contains(set.origin, images.string()));
  }
}

TEST_CASE("read_idx: reads files longer than one chunk") {
  const TemporaryDirectory dir;
  Bytes pixels(1500 * 28 * 28, '\0');
  for (std::size_t i = 0; i < pixels.size(); ++i) {
    pixels[i] = static_cast<char>(i * 2654435761U >> 13U);
  }
  write_gz(dir.path / "images", idx({1500, 28, 28}, pixels));
  write_gz(dir.path / "labels", idx({1500}, Bytes(1500, '\1')));
  const dit::DataSet set = dit::read_idx(dir.path / "images", dir.path / "labels", {"a", "b"});
  REQUIRE(set.images.size() == static_cast<dit::Index>(pixels.size()));
  bool equal = true;
  for (std::size_t i = 0; i < pixels.size(); ++i) {
    const float expected = static_cast<float>(static_cast<unsigned char>(pixels[i])) / 127.5F - 1.0F;
    equal = equal && set.images.data()[i] == expected;
  }
  CHECK(equal);
}

TEST_CASE("read_idx: refuses a bad file and names it") {
  const TemporaryDirectory dir;
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
    check_images("cannot be read");
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
    check_images("has 1 dimensions, expected 3");
    write_plain(bad, image_bytes);
    check_labels("has 3 dimensions, expected 1");
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
    check_images("ends after 12 of the 4503599626321920 elements");
    write_gz(bad, idx({most}, Bytes(12, '\0')));
    check_labels("ends after 12 of the 4294967295 elements");
  }
  SUBCASE("a label without a class") {
    write_plain(bad, idx({2}, Bytes("\x00\x03", 2)));
    check_labels("label 1 is 3, expected less than 3");
  }
  SUBCASE("as many labels as images are needed") {
    write_plain(bad, idx({3}, Bytes(3, '\0')));
    check_labels("has 3 labels for the 2 images of " + images.string());
  }
}

TEST_CASE("generated_shapes: ten classes in turn, pixels in [-1, 1], nothing cut off at the border") {
  const dit::DataSet set = dit::generated_shapes(1000, moxie::Rng{7});
  CHECK(set.count() == 1000);
  CHECK(set.channels == 1);
  CHECK(set.height == 28);
  CHECK(set.width == 28);
  CHECK(set.images.cols() == 28 * 28);
  REQUIRE(set.labels.size() == 1000);
  CHECK(set.class_names.size() == 10);
  CHECK(set.images.minCoeff() == -1.0F);
  CHECK(set.images.maxCoeff() <= 1.0F);
  CHECK(set.images.maxCoeff() > 0.9F);
  for (dit::Index i = 0; i < 1000; ++i) {
    CAPTURE(i);
    CHECK(set.labels[static_cast<std::size_t>(i)] == i % 10);
    CHECK(set.images.row(i).maxCoeff() > 0.1F);
    const auto image = set.images.row(i).reshaped<Eigen::RowMajor>(28, 28);
    CHECK(image.row(0).maxCoeff() == -1.0F);
    CHECK(image.row(27).maxCoeff() == -1.0F);
    CHECK(image.col(0).maxCoeff() == -1.0F);
    CHECK(image.col(27).maxCoeff() == -1.0F);
  }
}

TEST_CASE("generated_shapes: the same images for any number of threads, others for another seed") {
  const dit::DataSet one = dit::generated_shapes(200, moxie::Rng{7}, {.threads = 1});
  CHECK(one.images == dit::generated_shapes(200, moxie::Rng{7}, {.threads = 7}).images);
  CHECK(one.images == dit::generated_shapes(500, moxie::Rng{7}).images.topRows(200));
  CHECK(one.images != dit::generated_shapes(200, moxie::Rng{8}).images);
  CHECK_THROWS_AS(dit::generated_shapes(0, moxie::Rng{7}), moxie::ValueError);
}

TEST_CASE("generated_shapes: the nearest known image has the same class") {
  const dit::DataSet known = dit::generated_shapes(2000, moxie::Rng{1});
  const dit::DataSet fresh = dit::generated_shapes(300, moxie::Rng{2});
  int right = 0;
  for (dit::Index i = 0; i < fresh.count(); ++i) {
    dit::Index nearest = 0;
    (known.images.rowwise() - fresh.images.row(i)).rowwise().squaredNorm().minCoeff(&nearest);
    right += known.labels[static_cast<std::size_t>(nearest)] == fresh.labels[static_cast<std::size_t>(i)] ? 1 : 0;
  }
  MESSAGE("nearest neighbour: " << right << " of " << fresh.count() << " right");
  CHECK(right > 270);
}

TEST_CASE("load_data_set: generated shapes where there is no Fashion-MNIST, and says so") {
  const TemporaryDirectory dir;
  for (const fs::path& empty : {dir.path, dir.path / "absent"}) {
    const dit::DataSet set = dit::load_data_set(empty, 30);
    CHECK(set.count() == 30);
    CHECK(set.origin == "30 generated shapes (no Fashion-MNIST in " + empty.string() + ": install dataset-fashion-mnist)");
  }
}

TEST_CASE("load_data_set: reads Fashion-MNIST's files, and never passes over damaged ones") {
  const TemporaryDirectory dir;
  const fs::path images = dir.path / "train-images-idx3-ubyte.gz";
  const fs::path labels = dir.path / "train-labels-idx1-ubyte.gz";
  write_gz(images, idx({2, 4, 4}, Bytes(32, '\xFF')));
  CHECK_THROWS_AS(dit::load_data_set(dir.path), std::runtime_error);  // no labels

  write_gz(labels, idx({2}, Bytes("\x09\x05", 2)));
  const dit::DataSet set = dit::load_data_set(dir.path);
  CHECK(contains(set.origin, "Fashion-MNIST: 2 images from " + images.string()));
  CHECK(set.labels == std::vector<std::int64_t>{9, 5});
  REQUIRE(set.class_names.size() == 10);
  CHECK(set.class_names[9] == "Ankle boot");

  write_plain(images, "damaged");
  CHECK_THROWS_AS(dit::load_data_set(dir.path), std::runtime_error);
}

TEST_CASE("load_data_set: reads files that are not compressed") {
  const TemporaryDirectory dir;
  write_plain(dir.path / "train-images-idx3-ubyte", idx({2, 4, 4}, Bytes(32, '\xFF')));
  write_plain(dir.path / "train-labels-idx1-ubyte", idx({2}, Bytes("\x09\x05", 2)));
  CHECK(dit::load_data_set(dir.path).labels == std::vector<std::int64_t>{9, 5});
}

TEST_CASE("fashion_mnist: 6000 images of each of ten classes") {
  if (!fs::exists(dit::fashion_mnist_directory)) {
    MESSAGE("skipped: dataset-fashion-mnist is not installed");
    return;
  }
  const dit::DataSet set = dit::fashion_mnist();
  CHECK(set.count() == 60000);
  CHECK(set.height == 28);
  CHECK(set.width == 28);
  CHECK(set.images.minCoeff() == -1.0F);
  CHECK(set.images.maxCoeff() == 1.0F);
  std::vector<int> counts(10, 0);
  for (const std::int64_t label : set.labels) {
    ++counts[static_cast<std::size_t>(label)];
  }
  CHECK(counts == std::vector<int>(10, 6000));
  CHECK(set.images.mean() == doctest::Approx(2.0 * 0.2860 - 1.0).epsilon(1e-3));  // the mean that is known of this set
}

// SPDX-License-Identifier: MIT
#include "dit/data_set.hpp"

#include <doctest/doctest.h>
#include <zlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <temporary_folder.hpp>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Bytes = std::string;

using moxie::test::TemporaryFolder;

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

template <class Read>
std::string complaint_of(Read&& read) {
  try {
    read();
    return "";
  } catch (const std::runtime_error& e) {
    return e.what();
  }
}

/// What `read_idx` and `load_data_set` complain about, or "".
std::string complaint(const fs::path& images, const fs::path& labels) {
  return complaint_of([&] { dit::read_idx(images, labels); });
}
std::string complaint(const fs::path& path) {
  return complaint_of([&] { dit::load_data_set(path); });
}

/// A safetensors file of one image 1x1x2 for every two values, and of labels where there are any.
template <class T>
void write_safetensors(const fs::path& path, const std::vector<T>& values, const std::vector<std::int64_t>& labels,
                       const std::map<std::string, std::string>& metadata = {}) {
  moxie::SafetensorsWriter writer;
  writer.add("images", {static_cast<dit::Index>(values.size() / 2), 1, 1, 2}, std::span<const T>(values));
  if (!labels.empty()) {
    writer.add("labels", {static_cast<dit::Index>(labels.size())}, std::span<const std::int64_t>(labels));
  }
  for (const auto& [key, value] : metadata) {
    writer.metadata(key, value);
  }
  writer.save(path);
}

/// A safetensors file of that header, and `size` bytes of zero after it.
void write_header(const fs::path& path, const std::string& json, std::size_t size) {
  Bytes b;
  for (unsigned shift = 0; shift < 64; shift += 8) {
    b += static_cast<char>(json.size() >> shift);
  }
  write_plain(path, b + json + Bytes(size, '\0'));
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

using Names = std::vector<std::string>;
using Labels = std::vector<std::int64_t>;

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
    const dit::DataSet set = dit::read_idx(images, labels);
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
  const dit::DataSet set = dit::read_idx(dir.path / "images", dir.path / "labels");
  CHECK(set.channels == 3);
  CHECK(set.height == 1);
  CHECK(set.width == 2);
  CHECK(set.images.row(0) == dit::Matrix<float>{{-1, 1, -1, 1, -1, 1}});
  CHECK(set.images.row(1) == dit::Matrix<float>{{1, 1, 1, -1, -1, -1}});
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
  const dit::DataSet set = dit::read_idx(dir.path / "images", dir.path / "labels");
  REQUIRE(set.images.size() == static_cast<dit::Index>(pixels.size()));
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
    check_images("ends after 12 of the 4503599626321920 elements");
    write_gz(bad, idx({most, 1024, 1024, 1024}, Bytes(12, '\0')));
    check_images("ends after 12 of the 4611686017353646080 elements");
    write_gz(bad, idx({most}, Bytes(12, '\0')));
    check_labels("ends after 12 of the 4294967295 elements");
  }
  SUBCASE("as many labels as images are needed") {
    write_plain(bad, idx({3}, Bytes(3, '\0')));
    check_labels("has 3 labels for the 2 images of " + images.string());
    write_plain(bad, idx({1}, Bytes(1, '\0')));
    check_labels("has 1 labels for the 2 images of " + images.string());
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

TEST_CASE("default_data_set: generated shapes where there is no Fashion-MNIST, and says so") {
  const TemporaryFolder dir;
  for (const fs::path& empty : {dir.path, dir.path / "absent"}) {
    const dit::DataSet set = dit::default_data_set(empty, 30);
    CHECK(set.count() == 30);
    CHECK(set.origin == "30 generated shapes (channels 1, height 28, width 28, classes 10); no Fashion-MNIST in " +
                            empty.string() + ": install dataset-fashion-mnist");
  }
}

TEST_CASE("default_data_set: reads the files that are there, and never passes over damaged ones") {
  const TemporaryFolder dir;
  const fs::path images = dir.path / "train-images-idx3-ubyte.gz";
  const fs::path labels = dir.path / "train-labels-idx1-ubyte.gz";
  const auto complaint_here = [&] { return complaint_of([&] { dit::default_data_set(dir.path, 1); }); };
  write_gz(images, idx({2, 4, 4}, Bytes(32, '\xFF')));
  CHECK(contains(complaint_here(), "train-labels-idx1-ubyte: cannot be opened"));

  write_gz(labels, idx({2}, Bytes("\x09\x05", 2)));
  CHECK(dit::default_data_set(dir.path).labels == Labels{9, 5});

  write_plain(images, "damaged");
  CHECK(contains(complaint_here(), images.string() + ": is not an IDX file"));
  fs::remove(images);
  CHECK(contains(complaint_here(), "train-images-idx3-ubyte: cannot be opened"));
}

TEST_CASE("load_data_set: a folder of IDX files, plain or compressed, of three dimensions or four, is not taken for clothes") {
  for (const std::string images : {"train-images-idx3-ubyte", "train-images-idx4-ubyte.gz"}) {
    for (const std::string labels : {"train-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz"}) {
      const TemporaryFolder dir;
      const fs::path folder = dir.path / "fashion-mnist";
      fs::create_directory(folder);
      write_gz(folder / images, idx({2, 28, 28}, Bytes(1568, '\xFF')));
      write_plain(folder / labels, idx({2}, Bytes("\x09\x05", 2)));
      const dit::DataSet set = dit::load_data_set(folder);
      CHECK(set.labels == Labels{9, 5});
      CHECK(set.class_names == Names{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"});
      CHECK(set.origin == "2 images (channels 1, height 28, width 28, classes 10) from " + (folder / images).string());
    }
  }
}

TEST_CASE("load_data_set: a file of IDX images, its labels beside it") {
  for (const auto& [images, labels] :
       {std::pair("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"), std::pair("images.idx4", "labels.idx1.gz"),
        std::pair("images-of-images-idx3", "images-of-labels-idx1")}) {
    const TemporaryFolder dir;
    write_plain(dir.path / images, idx({2, 1, 1}, "ab"));
    CHECK(contains(complaint(dir.path / images), ": cannot be opened: No such file"));
    write_plain(dir.path / labels, idx({2}, Bytes("\x01\x02", 2)));
    CHECK(dit::load_data_set(dir.path / images).labels == Labels{1, 2});
  }
}

TEST_CASE("load_data_set: refuses a path that names no data set") {
  const TemporaryFolder dir;
  for (const char* absent : {"absent", "train-images-idx3-ubyte"}) {
    CHECK(complaint(dir.path / absent) == (dir.path / absent).string() + ": does not exist, or cannot be reached");
  }
  CHECK(contains(complaint(dir.path / "a.safetensors"), "a.safetensors: cannot be opened: No such file"));
  CHECK(contains(complaint(dir.path), "train-images-idx3-ubyte: cannot be opened: No such file"));
  for (const char* name : {"train-labels-idx1-ubyte", "images-idx", "images", "images-png3", "cat.png"}) {
    write_plain(dir.path / name, idx({1}, "x"));
    CHECK(contains(complaint(dir.path / name), (dir.path / name).string() + ": expected a folder, IDX images"));
  }
}

TEST_CASE("read_safetensors: floats of any width as they are, bytes to [-1, 1]") {
  const TemporaryFolder dir;
  const fs::path path = dir.path / "latents.safetensors";
  const dit::Matrix<float> expected{{0.5F, -7}, {3, 0}, {1024, -0.25F}};
  const std::vector<float> floats(expected.data(), expected.data() + expected.size());
  SUBCASE("F32") { write_safetensors(path, floats, {0, 2, 0}); }
  SUBCASE("F64") { write_safetensors(path, std::vector<double>(floats.begin(), floats.end()), {0, 2, 0}); }
  SUBCASE("BF16, and labels of 32 bits") {
    const std::vector<std::int32_t> labels{0, 2, 0};
    moxie::SafetensorsWriter writer;
    writer.add_bf16("images", {3, 1, 1, 2}, floats);
    writer.add("labels", {3}, labels);
    writer.save(path);
  }
  const dit::DataSet set = dit::load_data_set(path);
  CHECK(set.images == expected);
  CHECK(set.labels == Labels{0, 2, 0});
  CHECK(set.class_names == Names{"0", "1", "2"});
  CHECK(set.origin == "3 images (channels 1, height 1, width 2, classes 3) from " + path.string());

  write_safetensors(path, std::vector<std::uint8_t>{0, 255, 51, 204}, {1, 0});
  CHECK(dit::load_data_set(path).images.isApprox(dit::Matrix<float>{{-1, 1}, {-0.6F, 0.6F}}));
}

TEST_CASE("read_safetensors: the shape of the images") {
  const TemporaryFolder dir;
  const fs::path path = dir.path / "latents.safetensors";
  std::vector<float> values(48);
  std::iota(values.begin(), values.end(), 0.0F);
  moxie::SafetensorsWriter writer;
  writer.add("images", {2, 4, 3, 2}, values);
  writer.save(path);
  const dit::DataSet set = dit::load_data_set(path);
  CHECK(set.count() == 2);
  CHECK(set.channels == 4);
  CHECK(set.height == 3);
  CHECK(set.width == 2);
  CHECK(set.images.cols() == 24);
  CHECK(set.images(1, 0) == 24);
}

TEST_CASE("read_safetensors: one class without labels, names from the metadata") {
  const TemporaryFolder dir;
  const fs::path path = dir.path / "latents.safetensors";
  const std::vector<float> images(6);
  write_safetensors(path, images, {});
  CHECK(dit::load_data_set(path).labels == Labels{0, 0, 0});
  CHECK(dit::load_data_set(path).class_names == Names{"0"});

  write_safetensors(path, images, {}, {{"class.0", "all"}});
  CHECK(dit::load_data_set(path).class_names == Names{"all"});
  write_safetensors(path, images, {3, 0, 0}, {{"class.0", "cat"}, {"class.2", "dog"}, {"class.4", "nobody"}, {"1", "no"}});
  CHECK(dit::load_data_set(path).class_names == Names{"cat", "1", "dog", "3"});
}

TEST_CASE("read_safetensors: refuses a bad file, names it and the tensor") {
  const TemporaryFolder dir;
  const fs::path path = dir.path / "bad.safetensors";
  const auto check = [&](const std::string& expected) {
    const std::string message = complaint(path);
    CAPTURE(message);
    CHECK(contains(message, expected));
    CHECK(contains(message, path.string() + ": "));
  };
  const auto check_header = [&](const std::string& tensors, std::size_t size, const std::string& expected) {
    write_header(path, tensors, size);
    check(expected);
  };
  using Float = std::numeric_limits<float>;

  SUBCASE("values that are not finite") {
    for (const float bad : {Float::quiet_NaN(), Float::infinity(), -Float::infinity()}) {
      write_safetensors(path, std::vector<float>{0, 1, 2, 3, 4, bad}, {});
      check("tensor 'images' has a value that is not finite in image 2");
      write_safetensors(path, std::vector<double>{0, 1, double(bad), 3}, {});
      check("tensor 'images' has a value that is not finite in image 1");
    }
    write_safetensors(path, std::vector<double>{1e300, 0}, {});  // infinite as a float
    check("tensor 'images' has a value that is not finite in image 0");
  }
  SUBCASE("no images") {
    moxie::SafetensorsWriter().save(path);
    check("tensor 'images' is missing");
    write_safetensors(path, std::vector<float>{}, {});
    check("tensor 'images' has the shape (0,1,1,2), expected (N,C,H,W), each at least 1");
    check_header(R"({"images":{"dtype":"U8","shape":[4611686018427387904,0,1,1],"data_offsets":[0,0]}})", 0,
                 "tensor 'images' has the shape (4611686018427387904,0,1,1), expected (N,C,H,W)");
  }
  SUBCASE("another rank") {
    check_header(R"({"images":{"dtype":"F32","shape":[1,1,1],"data_offsets":[0,4]}})", 4,
                 "tensor 'images' has the shape (1,1,1), expected (N,C,H,W)");
    check_header(R"({"images":{"dtype":"F32","shape":[1,1,1,1,1],"data_offsets":[0,4]}})", 4,
                 "tensor 'images' has the shape (1,1,1,1,1), expected (N,C,H,W)");
    check_header(R"({"images":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4,
                 "tensor 'images' has the shape (), expected (N,C,H,W)");
  }
  SUBCASE("types that are no images, or unknown") {
    write_safetensors(path, std::vector<std::int64_t>{1, 2}, {});
    check("tensor 'images' is I64, which cannot be read as F32");
    check_header(R"({"images":{"dtype":"F8_E4M3","shape":[1,1,1,1],"data_offsets":[0,1]}})", 1,
                 "tensor 'images': dtype 'F8_E4M3' is not one of");
  }
  SUBCASE("more than the file holds") {
    check_header(R"({"images":{"dtype":"F32","shape":[4294967296,1,1,1],"data_offsets":[0,17179869184]}})", 4,
                 "tensor 'images' ends at byte 17179869184 of the data, but the file has only 4");
    check_header(R"({"images":{"dtype":"U8","shape":[4294967296,4294967296,1,1],"data_offsets":[0,0]}})", 0,
                 "tensor 'images': shape (4294967296,4294967296,1,1) has more bytes than can be counted");
  }
  SUBCASE("every truncation") {
    write_safetensors(path, std::vector<float>{0, 1, 2, 3}, {0, 1});
    const Bytes whole = file_bytes(path);
    for (std::size_t n = 0; n < whole.size(); ++n) {
      CAPTURE(n);
      write_plain(path, whole.substr(0, n));
      check("");
      CHECK(!complaint(path).empty());
    }
  }
  SUBCASE("labels of another number or shape") {
    write_safetensors(path, std::vector<float>{0, 1, 2, 3}, {0});
    check("tensor 'labels' has the shape (1), expected (2)");
    write_safetensors(path, std::vector<float>{0, 1, 2, 3}, {0, 1, 2});
    check("tensor 'labels' has the shape (3), expected (2)");
    check_header(R"({"images":{"dtype":"U8","shape":[1,1,1,1],"data_offsets":[8,9]},)"
                 R"("labels":{"dtype":"I64","shape":[1,1],"data_offsets":[0,8]}})",
                 9, "tensor 'labels' has the shape (1,1), expected (1)");
  }
  SUBCASE("labels that are no classes") {
    const std::vector<float> images{0, 1, 2, 3};
    write_safetensors(path, images, {0, -1});
    check("tensor 'labels' has -1 for image 1, expected 0 to 65535");
    write_safetensors(path, images, {std::numeric_limits<std::int64_t>::max(), 0});
    check("tensor 'labels' has 9223372036854775807 for image 0, expected 0 to 65535");
    write_safetensors(path, images, {0, 65536});
    check("tensor 'labels' has 65536 for image 1, expected 0 to 65535");
    write_safetensors(path, images, {0, 65535});
    CHECK(dit::load_data_set(path).class_names.size() == 65536);
    check_header(R"({"images":{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[0,4]},)"
                 R"("labels":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                 8, "tensor 'labels' is F32, which cannot be read as I64");
  }
}

TEST_CASE("load_data_set: Fashion-MNIST, 6000 images of each of ten classes") {
  if (!fs::exists(dit::fashion_mnist_directory)) {
    MESSAGE("skipped: dataset-fashion-mnist is not installed");
    return;
  }
  const dit::DataSet set = dit::load_data_set();
  CHECK(contains(set.origin, "Fashion-MNIST: 60000 images (channels 1, height 28, width 28, classes 10) from "));
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
  REQUIRE(set.class_names.size() == 10);
  CHECK(set.class_names[0] == "T-shirt");

  const dit::DataSet test_set = dit::load_data_set(dit::fashion_mnist_directory / "t10k-images-idx3-ubyte.gz");
  CHECK(test_set.count() == 10000);
  CHECK(test_set.class_names == set.class_names);
}

// SPDX-License-Identifier: MIT
#include "dit/data_set.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <idx_files.hpp>
#include <limits>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <temporary_folder.hpp>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Bytes = std::string;

using moxie::test::complaint_of;
using moxie::test::contains;
using moxie::test::file_bytes;
using moxie::test::idx;
using moxie::test::TemporaryFolder;
using moxie::test::write_gz;
using moxie::test::write_plain;

/// What `load_data_set` complains about, or "".
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

using Names = std::vector<std::string>;
using Labels = std::vector<std::int64_t>;

}  // namespace

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
                 "tensor 'images' is F8_E4M3, which cannot be read as F32");
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

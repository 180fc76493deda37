// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <allocations.hpp>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <io/files.hpp>
#include <io/in_child.hpp>
#include <limits>
#include <moxie/core/matrix.hpp>
#include <moxie/core/random.hpp>
#include <moxie/io/safetensors_file.hpp>
#include <moxie/io/safetensors_writer.hpp>
#include <random>
#include <span>
#include <string>
#include <temporary_folder.hpp>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/stat.h>
#endif

namespace {

namespace fs = std::filesystem;
using moxie::DType;
using moxie::Index;
using moxie::SafetensorsFile;
using moxie::SafetensorsWriter;
using moxie::test::bytes_of;
using moxie::test::contains;
using moxie::test::length_prefix;
using moxie::test::message_of;
using moxie::test::python_file;
using moxie::test::with_header;
using moxie::test::write_bytes;
using TemporaryDirectory = moxie::test::TemporaryFolder;

std::string opening(const fs::path& path) {
  return message_of([&] { SafetensorsFile{path}; });
}

const float infinity = std::numeric_limits<float>::infinity();

// 16 tensors of 1000 numbers, each equal to the tensor's own.
void save_sixteen(const fs::path& path) {
  std::vector<std::vector<float>> values;
  SafetensorsWriter writer;
  for (int i = 0; i < 16; ++i) {
    values.emplace_back(1000, float(i));
  }
  for (int i = 0; i < 16; ++i) {
    writer.add(std::to_string(i), {1000}, values[std::size_t(i)]);
  }
  writer.save(path);
}

// Reads random tensors of it. Returns how many were wrong.
int wrong_reads(const SafetensorsFile& file, std::uint64_t seed, int reads) {
  std::mt19937_64 random(seed);
  int wrong = 0;
  for (int n = 0; n < reads; ++n) {
    const int i = int(random() % 16);
    wrong += file.read<float>(std::to_string(i)) == std::vector<float>(1000, float(i)) ? 0 : 1;
  }
  return wrong;
}

#if defined(__linux__) && !defined(MOXIE_TEST_SANITIZED)
// The most memory that the process has held, in KiB.
long peak_kib() {
  std::ofstream("/proc/self/clear_refs") << "5";  // begins anew from what it holds now
  std::ifstream status("/proc/self/status");
  long kib = 0;
  for (std::string word; status >> word;) {
    if (word == "VmHWM:") {
      status >> kib;
    }
  }
  return kib;
}
#endif

}  // namespace

TEST_CASE("SafetensorsFile: a file of the Python package is read") {
  const TemporaryDirectory directory;
  write_bytes(directory / "py", python_file());
  const SafetensorsFile file(directory / "py");

  CHECK(file.names() == std::vector<std::string>{"größe", "half", "ids", "layer.0/w", "lr", "none", "step"});
  CHECK(file.metadata() == std::map<std::string, std::string>{{"by", "a \"quoted\"\tword"}});
  CHECK(file.contains("half"));
  CHECK_FALSE(file.contains("hal"));
  CHECK_FALSE(file.contains("__metadata__"));
  CHECK(file.info("layer.0/w").dtype == DType::F32);
  CHECK(file.info("layer.0/w").shape == std::vector<Index>{2, 3});
  CHECK(file.info("step").shape.empty());
  CHECK(file.info("step").count == 1);
  CHECK(file.info("none").shape == std::vector<Index>{0, 4});

  CHECK(file.read<float>("layer.0/w") == std::vector<float>{1, 2, 3, -0.5F, 0.25F, infinity});
  CHECK(file.read<double>("layer.0/w") == std::vector<double>{1, 2, 3, -0.5, 0.25, double(infinity)});
  CHECK(file.read<float>("half") == std::vector<float>{1, -3.125F});
  CHECK(file.read<double>("half") == std::vector<double>{1, -3.125});
  CHECK(file.read<double>("lr") == std::vector<double>{0.1});
  CHECK(file.read<float>("lr") == std::vector<float>{0.1F});
  CHECK(file.read<float>("none").empty());
  CHECK(file.read<std::int32_t>("ids") == std::vector<std::int32_t>{5, -6});
  CHECK(file.read<std::int64_t>("ids") == std::vector<std::int64_t>{5, -6});
  CHECK(file.read<std::int64_t>("step") == std::vector<std::int64_t>{-7});
  CHECK(file.read<std::uint8_t>("größe") == std::vector<std::uint8_t>{1, 2, 255});
  CHECK(file.read<std::int32_t>("größe") == std::vector<std::int32_t>{1, 2, 255});
  CHECK(file.read<std::int64_t>("größe") == std::vector<std::int64_t>{1, 2, 255});
}

TEST_CASE("SafetensorsFile: a file without tensors, and one without metadata, are files") {
  const TemporaryDirectory directory;
  SafetensorsWriter writer;
  writer.save(directory / "empty");
  CHECK(bytes_of(directory / "empty") == with_header("{}      "));
  CHECK(SafetensorsFile(directory / "empty").names().empty());
  CHECK(SafetensorsFile(directory / "empty").metadata().empty());
  write_bytes(directory / "short", with_header("{}"));
  CHECK(SafetensorsFile(directory / "short").names().empty());
}

TEST_CASE("SafetensorsFile: tensors may lie in any order and at any byte") {
  const TemporaryDirectory directory;
  std::string bytes = with_header(R"({"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},)"
                                  R"("z":{"data_offsets":[1,1],"shape":[3,0],"dtype":"I64"},)"
                                  R"("a":{"shape":[1],"dtype":"U8","data_offsets":[0,1]}})",
                                  1);
  const std::vector<float> values{1.5F, -2};
  bytes.append(reinterpret_cast<const char*>(values.data()), 8);
  write_bytes(directory / "file", bytes);
  CHECK(SafetensorsFile(directory / "file").read<float>("b") == values);
  CHECK(SafetensorsFile(directory / "file").read<double>("b") == std::vector<double>{1.5, -2});
}

TEST_CASE("SafetensorsFile: F16 is read, every number of it") {
  std::string header = R"({"x":{"dtype":"F16","shape":[65536],"data_offsets":[0,131072]}})";
  std::string bytes(8, '\0');
  const std::uint64_t size = header.size();
  std::memcpy(bytes.data(), &size, 8);
  bytes += header;
  for (std::uint32_t i = 0; i < 65536; ++i) {
    bytes += char(i & 0xFFU);
    bytes += char(i >> 8U);
  }
  const TemporaryDirectory directory;
  write_bytes(directory / "file", bytes);
  const std::vector<float> x = SafetensorsFile(directory / "file").read<float>("x");
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const int exponent = int((i >> 10U) & 31U);
    const auto fraction = double(i & 1023U);
    const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                             : exponent == 31 ? fraction == 0 ? double(infinity) : std::nan("")
                                              : std::ldexp(1024 + fraction, exponent - 25);
    REQUIRE(std::isnan(x[i]) == std::isnan(magnitude));
    REQUIRE(std::signbit(x[i]) == (i >= 32768));
    REQUIRE((std::isnan(magnitude) || double(std::abs(x[i])) == magnitude));
  }
}

TEST_CASE("SafetensorsFile: floats read as floats and integers as integers at least as wide, nothing else") {
  const TemporaryDirectory directory;
  write_bytes(directory / "py", python_file());
  const SafetensorsFile file(directory / "py");
  CHECK(contains(message_of([&] { file.read<std::int64_t>("layer.0/w"); }), "'layer.0/w' is F32, which cannot be read as I64"));
  CHECK(contains(message_of([&] { file.read<std::uint8_t>("half"); }), "'half' is BF16, which cannot be read as U8"));
  CHECK(contains(message_of([&] { file.read<double>("step"); }), "'step' is I64, which cannot be read as F64"));
  CHECK(contains(message_of([&] { file.read<float>("größe"); }), "is U8, which cannot be read as F32"));
  CHECK(contains(message_of([&] { file.read<std::int32_t>("step"); }), "'step' is I64, which cannot be read as I32"));
  CHECK(contains(message_of([&] { file.read<std::uint8_t>("ids"); }), "'ids' is I32, which cannot be read as U8"));
  CHECK(contains(message_of([&] { file.read<float>("other"); }), "tensor 'other' is missing"));
  CHECK(contains(message_of([&] { file.read<float>("other"); }), (directory / "py").string()));
}

TEST_CASE("SafetensorsFile: read_into takes a matrix or view of the tensor's shape alone") {
  const TemporaryDirectory directory;
  const std::vector<float> values{1, 2, 3, 4, 5, 6};
  const std::vector<float> empty;
  SafetensorsWriter writer;
  writer.add("matrix", {3, 2}, values);
  writer.add("cube", {3, 2, 1}, values);
  writer.add("vector", {6}, values);
  writer.add("scalar", {}, std::span(values).first(1));
  writer.add("no rows", {0, 2}, empty);
  writer.add("no columns", {3, 0}, empty);
  writer.save(directory / "file");
  const SafetensorsFile file(directory / "file");

  moxie::Matrix<double> m = moxie::Matrix<double>::Constant(3, 4, -1);
  file.read_into("matrix", m.middleCols(1, 2));
  CHECK(m.col(0) == Eigen::Vector3d(-1, -1, -1));
  CHECK(m.middleCols(1, 2) == moxie::Matrix<double>{{1, 2}, {3, 4}, {5, 6}});
  CHECK(m.col(3) == Eigen::Vector3d(-1, -1, -1));

  moxie::Matrix<float> tall(3, 2);
  moxie::Matrix<float> row(1, 6);
  moxie::Matrix<float> one(1, 1);
  moxie::Matrix<float> no_rows(0, 2);
  moxie::Matrix<float> no_columns(3, 0);
  file.read_into("cube", moxie::RowView<float>(tall));
  CHECK(tall == moxie::Matrix<float>{{1, 2}, {3, 4}, {5, 6}});
  file.read_into("vector", row);
  CHECK(row(0, 5) == 6);
  file.read_into("scalar", one);
  CHECK(one(0, 0) == 1);
  file.read_into("no rows", no_rows);
  file.read_into("no columns", no_columns);

  row.setConstant(7);
  moxie::Matrix<float> column = moxie::Matrix<float>::Constant(6, 1, 7);
  moxie::Matrix<float> wide = moxie::Matrix<float>::Constant(2, 3, 7);
  CHECK(contains(message_of([&] { file.read_into("matrix", wide); }),
                 "'matrix' has the shape (3,2), and cannot be read into (2,3)"));
  CHECK(contains(message_of([&] { file.read_into("vector", column); }),
                 "'vector' has the shape (6), and cannot be read into (6,1)"));
  CHECK(contains(message_of([&] { file.read_into("matrix", row); }), "cannot be read into (1,6)"));
  CHECK(contains(message_of([&] { file.read_into("no columns", row); }), "cannot be read into (1,6)"));
  CHECK((row.array() == 7).all());
  CHECK((column.array() == 7).all());
  CHECK((wide.array() == 7).all());
}

TEST_CASE("SafetensorsFile: a header's length that the file or the format cannot have is refused") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  write_bytes(path, "");
  CHECK(contains(opening(path), "is empty"));
  write_bytes(path, "1234567");
  CHECK(contains(opening(path), "is truncated"));
  write_bytes(path, length_prefix(3) + "{}");
  CHECK(contains(opening(path), "is truncated: the header's length is 3, but only 2 bytes follow"));
  write_bytes(path, length_prefix(100'000'000) + "{}");
  CHECK(contains(opening(path), "is truncated"));
  write_bytes(path, length_prefix(100'000'001) + "{}");
  CHECK(contains(opening(path), "exceeds the format's limit"));
  write_bytes(path, length_prefix(~std::uint64_t{0}) + "{}");
  CHECK(contains(opening(path), "exceeds the format's limit"));
}

TEST_CASE("SafetensorsFile: a path that is no regular file is refused") {
  const TemporaryDirectory directory;
  CHECK(contains(opening(directory / "none"), "cannot be opened"));
  CHECK(contains(opening(directory / ""), "is not a regular file"));
  fs::create_symlink("loop", directory / "loop");
  CHECK(contains(opening(directory / "loop"), "cannot be opened"));
#if defined(__unix__) || defined(__APPLE__)
  REQUIRE(mkfifo((directory / "pipe").c_str(), 0600) == 0);
  fs::create_symlink("/dev/null", directory / "null");
  CHECK(contains(opening(directory / "pipe"), "is not a regular file"));  // nor waited for
  CHECK(contains(opening(directory / "null"), "is not a regular file"));
#endif
}

TEST_CASE("SafetensorsFile: a file is what it was when it was opened, and one that has become shorter says so") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  const std::vector<double> many(100'000, 1.5);  // longer than what is converted at once
  const auto save = [&](double last) {
    std::vector<double> values = many;
    values.back() = last;
    SafetensorsWriter writer;
    writer.add("a", {100'000}, values);
    writer.save(path);
  };
  save(2);
  const SafetensorsFile file(path);
  save(3);
  std::vector<float> expected(many.begin(), many.end());
  expected.back() = 2;
  CHECK(file.read<float>("a") == expected);
  CHECK(SafetensorsFile(path).read<double>("a").back() == 3);

  const SafetensorsFile cut(path);
  fs::resize_file(path, fs::file_size(path) - 1);
  CHECK(contains(message_of([&] { cut.read<double>("a"); }), "to its end"));
  CHECK(contains(message_of([&] { cut.read<float>("a"); }), "to its end"));
}

TEST_CASE("SafetensorsFile: tensors are read from several threads at once") {
  const TemporaryDirectory directory;
  SafetensorsWriter writer;
  std::vector<std::vector<float>> values;
  for (int i = 0; i < 8; ++i) {
    values.emplace_back(3000, float(i));
  }
  for (int i = 0; i < 8; ++i) {
    writer.add(std::to_string(i), {3000}, values[std::size_t(i)]);
  }
  writer.save(directory / "file");
  const SafetensorsFile file(directory / "file");
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int n = 0; n < 100; ++n) {
        const int i = (n + t) % 8;
        wrong += file.read<float>(std::to_string(i)) == values[std::size_t(i)] ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(wrong == 0);
}

#if defined(__unix__) || defined(__APPLE__)

TEST_CASE("SafetensorsFile: parent and child read one open file after fork") {
  const TemporaryDirectory directory;
  save_sixteen(directory / "file");
  const SafetensorsFile file(directory / "file");
  constexpr int reads = 40'000;
  int wrong = -1;
  const auto child = [&] { return std::min(wrong_reads(file, 1, reads), 200); };
  CHECK(moxie::test::in_child(child, [&] { wrong = wrong_reads(file, 2, reads); }) == 0);
  CHECK(wrong == 0);
}

#endif

TEST_CASE("SafetensorsFile: a tensor of another number format is refused only as numbers, and copied as bytes") {
  const TemporaryDirectory directory;
  const std::string header = R"({"a":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]},)"
                             R"("b":{"dtype":"U16","shape":[1],"data_offsets":[4,6]},)"
                             R"("c":{"dtype":"NEW","shape":[3],"data_offsets":[6,7]},)"
                             R"("f":{"dtype":"F32","shape":[1],"data_offsets":[7,11]}})";
  const float number = 1.5F;
  std::string bytes = length_prefix(header.size()) + header + "\x01\x02\x03\x04" + "\x05\x06" + "\x07";
  bytes.append(reinterpret_cast<const char*>(&number), 4);
  write_bytes(directory / "file", bytes);
  const SafetensorsFile file(directory / "file");
  CHECK(file.read<float>("f") == std::vector<float>{1.5F});
  CHECK(file.info("a").dtype == DType::Other);
  CHECK(file.info("a").format == "F8_E4M3");
  CHECK(contains(message_of([&] { file.read<float>("a"); }), "tensor 'a' is F8_E4M3, which cannot be read as F32"));
  CHECK(contains(message_of([&] { file.read<std::int64_t>("b"); }), "tensor 'b' is U16, which cannot be read as I64"));
  CHECK(contains(message_of([&] { file.read<std::uint8_t>("c"); }), "tensor 'c' is NEW, which cannot be read as U8"));
  moxie::Matrix<float> to(2, 2);
  CHECK(contains(message_of([&] { file.read_into("a", to); }), "cannot be read as F32"));
  CHECK(contains(message_of([&] { file.expect<float>("a", std::array<Index, 2>{2, 2}); }), "cannot be read as F32"));
  CHECK(file.read_bytes("b") == std::vector<std::byte>{std::byte{5}, std::byte{6}});

  std::vector<std::vector<std::byte>> data;
  for (const std::string& name : file.names()) {
    data.push_back(file.read_bytes(name));
  }
  SafetensorsWriter writer;
  for (std::size_t i = 0; i < data.size(); ++i) {
    const std::string name = file.names()[i];
    writer.add_bytes(name, file.info(name).shape, file.info(name).format, data[i]);
  }
  writer.save(directory / "copy");
  const SafetensorsFile copy(directory / "copy");
  CHECK(copy.names() == file.names());
  for (const std::string& name : file.names()) {
    CHECK(copy.info(name).format == file.info(name).format);
    CHECK(copy.info(name).shape == file.info(name).shape);
    CHECK(copy.read_bytes(name) == file.read_bytes(name));
  }
}

TEST_CASE("SafetensorsFile: a missing tensor's error names one that may be meant, and rename finds it") {
  const TemporaryDirectory directory;
  const std::vector<float> one{1};
  SafetensorsWriter writer;
  writer.add("module.a._orig_mod.w", {1}, one);
  writer.add("module.b", {1}, one);
  writer.add("tied", {1}, one);
  writer.metadata("head", "tied");
  writer.save(directory / "file");
  SafetensorsFile file(directory / "file");
  CHECK(contains(message_of([&] { file.read<float>("a.w"); }),
                 "tensor 'a.w' is missing: there is tensor 'module.a._orig_mod.w', which SafetensorsFile::rename"));
  CHECK(contains(message_of([&] { file.info("head"); }), "is missing: the metadata name tensor 'tied' in its place"));
  CHECK(message_of([&] { file.info("z"); }).ends_with("tensor 'z' is missing"));

  file.rename(moxie::without_wrappers);
  CHECK(file.names() == std::vector<std::string>{"a.w", "b", "tied"});
  CHECK(file.read<float>("a.w") == one);
  CHECK(contains(message_of([&] { file.rename([](const std::string&) { return "x"; }); }),
                 "tensor 'b' and another would both be named 'x'"));
  CHECK(file.names() == std::vector<std::string>{"a.w", "b", "tied"});
}

TEST_CASE("SafetensorsFile: one that was moved from refuses to read") {
  const TemporaryDirectory directory;
  save_sixteen(directory / "file");
  SafetensorsFile file(directory / "file");
  const SafetensorsFile moved(std::move(file));
  CHECK(wrong_reads(moved, 1, 10) == 0);
  CHECK(contains(message_of([&] { file.read<float>("1"); }), "is missing"));
}

#if defined(__linux__) && !defined(MOXIE_TEST_SANITIZED)

TEST_CASE("SafetensorsFile: a header that is refused takes little memory, however large it is") {
  struct Case {
    std::string start;
    std::string repeated;
    std::string problem;
    int most_mib;
  };
  const std::vector<Case> cases{
      {R"({"w":{"shape":[1)", ",1", "has more than 64 numbers", 2},
      {R"({"w":{"data_offsets":[1)", ",1", "has more than 64 numbers", 2},
      {R"({"w":{"shape":[1)", "1", "a number of more than 40 digits", 2},
      {R"({"w":{"dtype":")", "x", "a string of more than 4194304 bytes", 32},
      {R"({"w":{"dtype":")" + std::string(4'000'000, 'x') + "\n", "x", "not JSON", 128},
      {R"({"__metadata__":{")", R"(":"",")", "is there twice", 2},
      {R"({"w":)", "[", "expected an object", 2},
      {"{", " ", "not JSON in UTF-8: wrong at its byte 30000000", 2},
  };
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  for (const Case& c : cases) {
    std::string header = c.start;
    while (header.size() < 30'000'000) {
      header += c.repeated;
    }
    write_bytes(path, with_header(header));
    header = {};
    const auto mib_more = [&] {
      const auto before = peak_kib();
      const std::string problem = opening(path);
      return contains(problem, c.problem) ? int((peak_kib() - before) / 1024) : 254;
    };
    CAPTURE(c.start);
    CHECK(moxie::test::in_child(mib_more, [] {}) <= c.most_mib);
  }

  std::ofstream many(path, std::ios::binary);
  many << length_prefix(30'000'000) << R"({"__metadata__":{)";
  for (int i = 0; i < 3'000'000; ++i) {
    many << "\"" << i << R"(":"",)";
  }
  many.close();
  const auto mib_more = [&] {
    const auto before = peak_kib();
    return contains(opening(path), "more than 100000 entries of metadata") ? int((peak_kib() - before) / 1024) : 254;
  };
  CHECK(moxie::test::in_child(mib_more, [] {}) <= 16);
}

#endif

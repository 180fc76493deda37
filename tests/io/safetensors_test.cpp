// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <moxie/core/random.hpp>
#include <moxie/io/safetensors.hpp>
#include <random>
#include <span>
#include <string>
#include <temporary_folder.hpp>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#endif

namespace {

namespace fs = std::filesystem;
using moxie::DType;
using moxie::Index;
using moxie::SafetensorsError;
using moxie::SafetensorsFile;
using moxie::SafetensorsWriter;

using TemporaryDirectory = moxie::test::TemporaryFolder;

void write_bytes(const fs::path& path, const std::string& bytes) {
  fs::remove(path);  // some file systems write a file that is truncated to the disk at once, which takes long
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

std::string read_bytes(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

std::string length_prefix(std::uint64_t size) {
  std::string bytes(sizeof size, '\0');
  std::memcpy(bytes.data(), &size, sizeof size);
  return bytes;
}

std::string with_header(const std::string& header, std::size_t data_size = 0) {
  return length_prefix(header.size()) + header + std::string(data_size, '\0');
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const SafetensorsError& error) {
    return error.what();
  }
  return "no SafetensorsError";
}

std::string opening(const fs::path& path) {
  return message_of([&] { SafetensorsFile{path}; });
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

moxie::Layout small_layout() {
  moxie::Layout layout;
  layout.add("gate/w", {4, 3});
  layout.add("bias", {5});
  layout.add("scale", {});
  layout.add("experts", {2, 3, 4});
  layout.add("none", {0, 7});
  return layout;
}

template <class Scalar>
moxie::Parameters<Scalar> random_parameters(std::uint64_t seed) {
  moxie::Parameters<Scalar> parameters(small_layout());
  for (std::size_t i = 0; i < parameters.layout().tensors().size(); ++i) {
    moxie::Rng(seed).split(i).fill_normal(parameters.view()[Index(i)]);
  }
  return parameters;
}

// Written by the Python package safetensors 0.8.0 from
//   {"layer.0/w": float32 [[1, 2, 3], [-0.5, 0.25, inf]], "half": bfloat16 [1, -3.125], "step": int64 -7,
//    "größe": uint8 [1, 2, 255], "none": float64 of shape (0, 4), "lr": float64 [0.1], "ids": int32 [[5, -6]]}
std::string python_file() {
  const std::string header =
      R"({"__metadata__":{"by":"a \"quoted\"\tword"},"step":{"dtype":"I64","shape":[],"data_offsets":[0,8]},)"
      R"("lr":{"dtype":"F64","shape":[1],"data_offsets":[8,16]},"none":{"dtype":"F64","shape":[0,4],"data_offsets":[16,16]},)"
      R"("layer.0/w":{"dtype":"F32","shape":[2,3],"data_offsets":[16,40]},)"
      R"("ids":{"dtype":"I32","shape":[1,2],"data_offsets":[40,48]},)"
      R"("half":{"dtype":"BF16","shape":[2],"data_offsets":[48,52]},)"
      R"("größe":{"dtype":"U8","shape":[3],"data_offsets":[52,55]}}       )";
  const std::vector<std::uint8_t> data{0xf9, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x9a, 0x99, 0x99, 0x99, 0x99, 0x99,
                                       0xb9, 0x3f, 0x00, 0x00, 0x80, 0x3f, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x40, 0x40,
                                       0x00, 0x00, 0x00, 0xbf, 0x00, 0x00, 0x80, 0x3e, 0x00, 0x00, 0x80, 0x7f, 0x05, 0x00,
                                       0x00, 0x00, 0xfa, 0xff, 0xff, 0xff, 0x80, 0x3f, 0x48, 0xc0, 0x01, 0x02, 0xff};
  return "\xd0\x01" + std::string(6, '\0') + header + std::string(data.begin(), data.end());
}

const float infinity = std::numeric_limits<float>::infinity();

template <class Values>
concept Addable = requires(SafetensorsWriter writer, Values&& values) {
  writer.add(std::string(), std::vector<Index>(), std::forward<Values>(values));
  writer.add_bf16(std::string(), std::vector<Index>(), std::forward<Values>(values));
};
static_assert(Addable<std::vector<float>&> && Addable<const std::vector<float>&> && Addable<std::span<float>>);
static_assert(!Addable<std::vector<float>>, "a temporary would be gone by the time it is saved");

}  // namespace

TEST_CASE("safetensors: a file of the Python package is read") {
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

TEST_CASE("safetensors: what is written has the bytes that the Python package writes") {
  const std::vector<float> w{1, 2, 3, -0.5F, 0.25F, infinity};
  const std::vector<float> half{1, -3.125F};
  const std::vector<std::int64_t> step{-7};
  const std::vector<std::uint8_t> size{1, 2, 255};
  const std::vector<double> none;
  const std::vector<double> lr{0.1};
  const std::vector<std::int32_t> ids{5, -6};
  SafetensorsWriter writer;
  writer.add("layer.0/w", {2, 3}, w);
  writer.add_bf16("half", {2}, half);
  writer.add("step", {}, step);
  writer.add("größe", {3}, size);
  writer.add("none", {0, 4}, none);
  writer.add("lr", {1}, lr);
  writer.add("ids", {1, 2}, ids);
  writer.metadata("by", "a \"quoted\"\tword");

  const TemporaryDirectory directory;
  writer.save(directory / "file");
  CHECK(read_bytes(directory / "file") == python_file());
}

TEST_CASE("safetensors: a file without tensors, and one without metadata, are files") {
  const TemporaryDirectory directory;
  SafetensorsWriter writer;
  writer.save(directory / "empty");
  CHECK(read_bytes(directory / "empty") == with_header("{}      "));
  CHECK(SafetensorsFile(directory / "empty").names().empty());
  CHECK(SafetensorsFile(directory / "empty").metadata().empty());
  write_bytes(directory / "short", with_header("{}"));
  CHECK(SafetensorsFile(directory / "short").names().empty());
}

TEST_CASE("safetensors: names and metadata may hold any Unicode text") {
  const std::vector<std::string> names{"",          "a/b.c d", "\"\\", std::string("\0\x01\x1f\x7f\n", 5), "\xf0\x9f\x98\x80",
                                       "__metadata"};
  const std::vector<float> values{1};
  SafetensorsWriter writer;
  for (const std::string& name : names) {
    writer.add(name, {1}, values);
    writer.metadata(name, name);
  }
  const TemporaryDirectory directory;
  writer.save(directory / "file");
  const SafetensorsFile file(directory / "file");
  CHECK(file.names().size() == names.size());
  for (const std::string& name : names) {
    CHECK(file.contains(name));
    CHECK(file.metadata().at(name) == name);
  }
}

TEST_CASE("safetensors: tensors may lie in any order and at any byte") {
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

TEST_CASE("safetensors: BF16 rounds to nearest, ties to even, and a NaN stays one") {
  const float epsilon = 0x1p-8F;  // half a unit in the last place of 1
  const auto nan = std::bit_cast<float>(0x7F800001U);
  const std::vector<float> values{1 + epsilon,
                                  1 + 3 * epsilon,
                                  std::nextafter(1 + epsilon, 2.0F),
                                  std::nextafter(1 + epsilon, 0.0F),
                                  -0.0F,
                                  std::numeric_limits<float>::max(),
                                  -infinity,
                                  nan,
                                  -nan,
                                  std::numeric_limits<float>::denorm_min()};
  std::vector<float> many(10'000, 1 + 3 * epsilon);  // more than one piece of the writer's
  SafetensorsWriter writer;
  writer.add_bf16("x", {10}, values);
  writer.add_bf16("many", {100, 100}, many);
  const TemporaryDirectory directory;
  writer.save(directory / "file");
  const SafetensorsFile file(directory / "file");
  const std::vector<float> x = file.read<float>("x");
  CHECK(std::vector<float>(x.begin(), x.begin() + 7) ==
        std::vector<float>{1, 1 + 4 * epsilon, 1 + 2 * epsilon, 1, -0.0F, infinity, -infinity});
  CHECK(std::signbit(x[4]));
  CHECK(std::isnan(x[7]));
  CHECK(std::isnan(x[8]));
  CHECK(std::signbit(x[8]));
  CHECK(x[9] == 0);
  CHECK(file.read<float>("many") == std::vector<float>(10'000, 1 + 4 * epsilon));
}

TEST_CASE("safetensors: F16 is read, every number of it") {
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

TEST_CASE("safetensors: floats read as floats and integers as integers at least as wide, nothing else") {
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

TEST_CASE("safetensors: read_into takes a matrix or view of the tensor's shape alone") {
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

TEST_CASE_TEMPLATE("safetensors: saved parameters load to the same bits", Scalar, float, double) {
  const TemporaryDirectory directory;
  const moxie::Parameters<Scalar> saved = random_parameters<Scalar>(1);
  moxie::save_parameters(directory / "file", saved, {{"step", "3"}});
  moxie::Parameters<Scalar> loaded(small_layout());
  moxie::load_parameters(directory / "file", loaded);
  CHECK((loaded.flat() == saved.flat()).all());
  CHECK(SafetensorsFile(directory / "file").metadata().at("step") == "3");
  CHECK(SafetensorsFile(directory / "file").info("experts").shape == std::vector<Index>{2, 3, 4});
  CHECK(directory.entries() == 1);
}

TEST_CASE("safetensors: several blocks of parameters live in one file under their prefixes") {
  const TemporaryDirectory directory;
  const moxie::Parameters<float> weights = random_parameters<float>(1);
  const moxie::Parameters<float> averages = random_parameters<float>(2);
  const moxie::Parameters<double> moments = random_parameters<double>(3);
  const std::vector<std::int64_t> step{12};
  SafetensorsWriter writer;
  writer.add_parameters(weights.view());
  writer.add_parameters(averages, "ema.");
  writer.add_parameters(moments, "adam.m.");
  writer.add("step", {}, step);
  writer.save(directory / "file");

  const SafetensorsFile file(directory / "file");
  moxie::Parameters<float> w(small_layout());
  moxie::Parameters<float> a(small_layout());
  moxie::Parameters<double> m(small_layout());
  moxie::load_parameters(file, w.view(), "", moxie::ExtraTensors::Ignore);
  moxie::load_parameters(file, a, "ema.");
  moxie::load_parameters(file, m, "adam.m.");
  CHECK((w.flat() == weights.flat()).all());
  CHECK((a.flat() == averages.flat()).all());
  CHECK((m.flat() == moments.flat()).all());
  CHECK(contains(message_of([&] { moxie::load_parameters(file, w); }), "is not among the parameters to load"));

  moxie::load_parameters(file, a, "adam.m.");
  CHECK((a.flat() == moments.flat().cast<float>()).all());
  moxie::load_parameters(file, m, "ema.");
  CHECK((m.flat() == averages.flat().cast<double>()).all());
}

TEST_CASE("safetensors: parameters load all or nothing") {
  const TemporaryDirectory directory;
  const moxie::Parameters<float> saved = random_parameters<float>(1);
  const fs::path path = directory / "file";
  const auto refused = [&](const moxie::Layout& layout, const std::string& problem) {
    moxie::Parameters<float> target(layout);
    target.flat().setConstant(7);
    const std::string message = message_of([&] { moxie::load_parameters(path, target); });
    CAPTURE(message);
    CHECK(contains(message, problem));
    CHECK(contains(message, path.string()));
    CHECK((target.flat() == 7).all());
  };
  moxie::save_parameters(path, saved);

  moxie::Layout more = small_layout();
  more.add("z", {1});
  refused(more, "tensor 'z' is missing");

  moxie::Layout fewer;
  fewer.add("gate/w", {4, 3});
  fewer.add("bias", {5});
  fewer.add("scale", {});
  fewer.add("none", {0, 7});
  refused(fewer, "tensor 'experts' is not among the parameters to load");

  moxie::Layout reshaped = fewer;
  reshaped.add("experts", {6, 4});
  refused(reshaped, "tensor 'experts' has the shape (2,3,4), expected (6,4)");

  moxie::Layout none = fewer;
  none.add("experts", {0});
  refused(none, "tensor 'experts' has the shape (2,3,4), expected (0)");

  const std::vector<std::int32_t> integers(24);
  SafetensorsWriter writer;
  moxie::Parameters<float> part(fewer);
  writer.add_parameters(part);
  writer.add("experts", {2, 3, 4}, integers);
  writer.save(path);
  refused(small_layout(), "tensor 'experts' is I32, which cannot be read as F32");
}

TEST_CASE("safetensors: the writer refuses what could not be read back") {
  SafetensorsWriter writer;
  const std::vector<float> values{1, 2, 3, 4};
  writer.add("a", {2, 2}, values);
  CHECK_THROWS_WITH_AS(writer.add("a", {4}, values), "SafetensorsWriter::add: there is a tensor 'a' already",
                       moxie::ValueError);
  CHECK_THROWS_WITH_AS(writer.add("b", {2, 3}, values), "SafetensorsWriter::add: tensor 'b' of shape (2,3) is given 4 elements",
                       moxie::ShapeError);
  CHECK_THROWS_AS(writer.add("b", {-2, -2}, values), moxie::ShapeError);
  CHECK_THROWS_AS(writer.add("b", {Index{1} << 62, 8}, std::span<const float>()), moxie::ShapeError);
  CHECK_THROWS_AS(writer.add("__metadata__", {4}, values), moxie::ValueError);
  CHECK_THROWS_AS(writer.add("\xff", {4}, values), moxie::ValueError);
  CHECK_THROWS_AS(writer.metadata("\xc3", ""), moxie::ValueError);
  CHECK_THROWS_AS(writer.metadata("", "\xed\xa0\x80"), moxie::ValueError);

  const TemporaryDirectory directory;
  writer.save(directory / "file");
  CHECK(SafetensorsFile(directory / "file").names() == std::vector<std::string>{"a"});
}

TEST_CASE("safetensors: a header that breaks the format is refused, and the message says why") {
  struct Case {
    std::string header;
    std::size_t data_size;
    std::string problem;
  };
  const auto tensor = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  const std::string dtype = R"("dtype":"F32")";
  const std::string w4 = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";
  const std::vector<Case> cases{
      {"", 0, "does not start with '{'"},
      {" {}", 0, "does not start with '{'"},
      {"\xef\xbb\xbf{}", 0, "does not start with '{'"},
      {"[]", 0, "does not start with '{'"},
      {"{", 0, "not JSON"},
      {"{} {}", 0, "not JSON"},
      {"{},\"__metadata__\":{}}", 0, "not JSON"},
      {std::string("{}\0\0", 4), 0, "zero byte"},
      {"{}// a comment", 0, "not JSON"},
      {"{\"w\":{" + w4 + ",}}", 4, "not JSON"},
      {"{\"w\xff\":{" + w4 + "}}", 4, "not JSON in UTF-8"},
      {"{\"\xed\xa0\x80\":{" + w4 + "}}", 4, "not JSON in UTF-8"},
      {"{\"\\ud800\":{" + w4 + "}}", 4, "not JSON"},
      {"{\"w\":{" + w4 + "},\"w\":{" + w4 + "}}", 4, "tensor 'w' is there twice"},
      {R"({"__metadata__":{},"__metadata__":{}})", 0, "__metadata__ is there twice"},
      {R"({"__metadata__":{"k":"","k":""}})", 0, "metadata 'k' is there twice"},
      {R"({"__metadata__":{"k":1}})", 0, "metadata 'k' has 1, expected a string"},
      {R"({"__metadata__":{"k":{}}})", 0, "metadata 'k' has an object, expected a string"},
      {R"({"__metadata__":{"k":null}})", 0, "metadata 'k' has null, expected a string"},
      {R"({"__metadata__":[]})", 0, "__metadata__ has an array, expected an object"},
      {R"({"w":null})", 0, "tensor 'w' has null, expected an object"},
      {R"({"w":true})", 0, "tensor 'w' has a boolean, expected an object"},
      {R"({"w":"F32"})", 0, "tensor 'w' has a string, expected an object"},
      {tensor(""), 0, "tensor 'w' has no dtype"},
      {tensor(dtype), 0, "tensor 'w' has no shape"},
      {tensor(R"("dtype":"F32","shape":[])"), 4, "tensor 'w' has no data_offsets"},
      {tensor(w4 + "," + dtype), 4, "tensor 'w': dtype is there twice"},
      {tensor(w4 + ",\"strides\":[]"), 4, "tensor 'w': strides is not a field"},
      {tensor(R"("dtype":"F128")"), 0, "tensor 'w': dtype 'F128' is not one of F32, F64, F16, BF16, I32, I64, U8"},
      {tensor(R"("dtype":["F32"])"), 0, "tensor 'w': dtype has an array, expected a string"},
      {tensor(R"("dtype":7)"), 0, "tensor 'w': dtype has 7, expected a string"},
      {tensor(R"("shape":3)"), 0, "tensor 'w': shape has 3, expected an array"},
      {tensor(R"("shape":{})"), 0, "tensor 'w': shape has an object, expected an array"},
      {tensor(R"("shape":[[1]])"), 0, "tensor 'w': shape has an array, expected integers"},
      {tensor(R"("shape":["1"])"), 0, "tensor 'w': shape has a string, expected integers"},
      {tensor(R"("shape":[-1])"), 0, "tensor 'w': shape has -1, expected integers from 0"},
      {tensor(R"("shape":[1.0])"), 0, "tensor 'w': shape has 1.0, expected integers"},
      {tensor(R"("shape":[9223372036854775808])"), 0, "tensor 'w': shape has 9223372036854775808"},
      {tensor(R"("shape":[18446744073709551617])"), 0, "tensor 'w': shape has 18446744073709551617"},
      {tensor(R"("shape":[1e999])"), 0, "not JSON"},
      {tensor(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0, "more bytes than can be counted"},
      {tensor(R"("dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0])"), 0, "more bytes than can be counted"},
      {tensor(R"("dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0])"), 0, "more bytes than can be counted"},
      {tensor(R"("dtype":"F32","shape":[2305843009213693951],"data_offsets":[0,9223372036854775804])"), 4, "ends at byte"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0])"), 4, "data_offsets has 1 elements, expected 2"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4,4])"), 4, "data_offsets has 3 elements, expected 2"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), 4, "data_offsets (4,0) end before they begin"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,3])"), 3,
       "shape (1) of F32 takes 4 bytes, but data_offsets (0,3) hold 3"},
      {tensor(R"("dtype":"F32","shape":[2,3],"data_offsets":[0,20])"), 20, "shape (2,3) of F32 takes 24 bytes"},
      {tensor(R"("dtype":"F32","shape":[0],"data_offsets":[0,4])"), 4, "shape (0) of F32 takes 0 bytes"},
      {tensor(w4), 3, "tensor 'w' ends at byte 4 of the data, but the file has only 3"},
      {tensor(w4), 5, "1 bytes of data that belong to no tensor"},
      {"{}", 1, "1 bytes of data that belong to no tensor"},
      {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), 8, "there is a hole"},
      {tensor(R"("dtype":"F32","shape":[0],"data_offsets":[4,4])"), 4, "there is a hole"},
      {"{\"w\":{" + w4 + "},\"v\":{" + w4 + "}}", 4, "overlap"},
      {"{\"w\":{" + w4 + R"(},"v":{"dtype":"U8","shape":[3],"data_offsets":[3,6]}})", 6, "tensor 'v' begins at byte 3"},
      {"{\"w\":{" + w4 + R"(},"v":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}})", 6, "there is a hole"},
      {"{\"w\":{" + w4 + R"(},"v":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})", 4, "overlap"},
  };
  const TemporaryDirectory directory;
  for (const Case& c : cases) {
    write_bytes(directory / "file", with_header(c.header, c.data_size));
    const std::string message = opening(directory / "file");
    CAPTURE(c.header);
    CAPTURE(message);
    CHECK(contains(message, c.problem));
    CHECK(contains(message, (directory / "file").string()));
  }
}

TEST_CASE("safetensors: a header's length that the file or the format cannot have is refused") {
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

TEST_CASE("safetensors: a deeply nested header is refused without deep recursion") {
  const TemporaryDirectory directory;
  for (const std::string start :
       {"{\"w\":", "{\"w\":{\"shape\":", "{\"w\":{\"dtype\":", "{\"__metadata__\":{\"k\":", "{\"__metadata__\":"}) {
    for (const std::string level : {"[", "{\"w\":"}) {
      std::string header = start;
      for (int i = 0; i < 200'000; ++i) {
        header += level;
      }
      write_bytes(directory / "file", with_header(header));
      const std::string message = opening(directory / "file");
      CAPTURE(message);
      CHECK((contains(message, "expected") || contains(message, "is not a field")));
    }
  }
}

TEST_CASE("safetensors: a message stays short and printable, whatever the file holds") {
  const TemporaryDirectory directory;
  write_bytes(directory / "file", with_header("{\"\\u001b[2J" + std::string(1'000'000, 'x') + "\":{\"dtype\":\"" +
                                              std::string(1'000'000, 'y') + "\"}}"));
  const std::string message = opening(directory / "file");
  CHECK(message.size() < (directory / "file").string().size() + 400);
  CHECK_FALSE(contains(message, "\x1b"));
}

TEST_CASE("safetensors: a path that is no regular file is refused") {
  const TemporaryDirectory directory;
  CHECK(contains(opening(directory / "none"), "cannot be opened"));
  CHECK(contains(opening(directory / ""), "is not a regular file"));
  const SafetensorsWriter writer;
  CHECK(contains(message_of([&] { writer.save(directory / "none/file"); }), "cannot be written"));
  fs::create_directory(directory / "sub");
  CHECK(contains(message_of([&] { writer.save(directory / "sub"); }), "is not a regular file"));
  CHECK(contains(message_of([&] { writer.save(""); }), "cannot be written"));
  CHECK(directory.entries() == 1);
}

TEST_CASE("safetensors: a truncated file is refused and the target is left alone") {
  const TemporaryDirectory directory;
  moxie::save_parameters(directory / "whole", random_parameters<float>(1));
  const std::string bytes = read_bytes(directory / "whole");
  moxie::Parameters<float> target(small_layout());
  target.flat().setConstant(7);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    write_bytes(directory / "part", bytes.substr(0, size));
    CHECK_THROWS_AS(moxie::load_parameters(directory / "part", target), SafetensorsError);
  }
  CHECK((target.flat() == 7).all());
  write_bytes(directory / "part", bytes + '\0');
  CHECK_THROWS_AS(moxie::load_parameters(directory / "part", target), SafetensorsError);
  CHECK((target.flat() == 7).all());
}

TEST_CASE("safetensors: a file is what it was when it was opened, and one that has become shorter says so") {
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

TEST_CASE("safetensors: tensors are read from several threads at once") {
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

TEST_CASE("safetensors: any damage either loads whole or is refused with the target left alone") {
  constexpr int mutations = 4000;
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  moxie::save_parameters(path, random_parameters<float>(1), {{"step", "3"}});
  const std::vector<std::string> originals{python_file(), read_bytes(path)};
  moxie::Parameters<float> target(small_layout());
  target.flat().setConstant(7);
  int accepted = 0;
  int loaded = 0;
  for (int i = 0; i < mutations; ++i) {
    const moxie::Rng rng = moxie::Rng(20'240'607).split(static_cast<std::uint64_t>(i));
    std::string bytes = originals[static_cast<std::size_t>(i % 2)];
    std::uint64_t header_size = 0;
    std::memcpy(&header_size, bytes.data(), 8);
    std::uint64_t drawn = 0;
    const auto below = [&](std::size_t n) { return std::size_t(rng.below(Index(std::max<std::size_t>(n, 1)), drawn++)); };
    for (std::size_t step = below(3) + 1; step > 0; --step) {
      const std::size_t at = below(4) == 0 ? below(bytes.size()) : 8 + below(header_size);
      const std::size_t span = below(20);
      std::size_t grown = 0;
      if (at >= bytes.size()) {
        continue;
      }
      switch (below(7)) {
        case 0:
          bytes[at] = char(bytes[at] ^ (1 << below(8)));
          break;
        case 1:
          bytes[at] = char(below(256));
          break;
        case 2: {
          const std::size_t digit = bytes.find_first_of("0123456789", at);
          bytes[digit == std::string::npos ? at : digit] = char('0' + below(10));
          break;
        }
        case 3:
          grown = bytes.size();
          bytes.erase(at, span);
          grown = bytes.size() - grown;
          break;
        case 4: {
          const std::string copy = bytes.substr(below(bytes.size()), span);
          bytes.insert(at, copy);
          grown = copy.size();
          break;
        }
        case 5:
          bytes.insert(at, 1, "{}[],:\"\\0-9eE. "[below(15)]);
          grown = 1;
          break;
        default:
          bytes.resize(at);
          break;
      }
      // Half of the time the header's length follows, so that what lies behind that check is reached.
      if (bytes.size() >= 8 && below(2) == 0) {
        header_size += grown;
        bytes.replace(0, 8, length_prefix(header_size));
      }
    }
    write_bytes(path, bytes);
    CAPTURE(i);
    try {
      const SafetensorsFile file(path);
      ++accepted;
      std::size_t held = 0;
      for (const std::string& name : file.names()) {
        switch (file.info(name).dtype) {
          case DType::F32:
          case DType::F64:
          case DType::BF16:
            held += file.read<double>(name).size();
            break;
          default:
            held += file.read<std::int64_t>(name).size();
        }
      }
      CHECK(held <= bytes.size());
      moxie::load_parameters(file, target);
      ++loaded;
      target.flat().setConstant(7);
    } catch (const SafetensorsError& error) {
      CHECK(std::string(error.what()).starts_with(path.string() + ": "));
      CHECK((target.flat() == 7).all());
    }
  }
  CHECK(accepted > mutations / 50);
  CHECK(loaded > mutations / 100);
  CHECK(accepted < mutations);
}

TEST_CASE("safetensors: two writers of one path leave one whole file, and a reader never sees another") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  const auto save = [&](float value) {
    const std::vector<float> values(5000, value);
    SafetensorsWriter writer;
    writer.add("x", {5000}, values);
    writer.save(path);
  };
  save(0);
  std::atomic<int> running{2};
  std::atomic<int> failed{0};
  const auto saves = [&](float value) {
    try {
      for (int i = 0; i < 20; ++i) {
        save(value);
      }
    } catch (const std::exception&) {
      ++failed;
    }
    --running;
  };
  std::thread first(saves, 1.0F);
  std::thread second(saves, 2.0F);
  int broken = 0;
  while (running > 0) {
    try {
      const std::vector<float> x = SafetensorsFile(path).read<float>("x");
      broken += x == std::vector<float>(5000, x.front()) ? 0 : 1;
    } catch (const SafetensorsError&) {
      ++broken;
    }
  }
  first.join();
  second.join();
  CHECK(broken == 0);
  CHECK(failed == 0);
  CHECK(directory.entries() == 1);
}

#if defined(__unix__) || defined(__APPLE__)

TEST_CASE("safetensors: a save that runs out of space leaves the old file and nothing else") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  const std::vector<float> values(100'000, 1.0F);
  SafetensorsWriter small;
  small.add("x", {2}, std::span(values).first(2));
  small.save(path);
  const std::string before = read_bytes(path);

  // Once at the first write, once when the last of the buffered bytes go out.
  for (const std::size_t count : {values.size(), std::size_t{1200}}) {
    SafetensorsWriter large;
    large.add("x", {Index(count)}, std::span(values).first(count));
    rlimit old_limit{};
    REQUIRE(getrlimit(RLIMIT_FSIZE, &old_limit) == 0);
    rlimit limit = old_limit;
    limit.rlim_cur = 4096;
    auto* const old_handler = std::signal(SIGXFSZ, SIG_IGN);
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const std::string message = message_of([&] { large.save(path); });
    const std::string elsewhere = message_of([&] { large.save(directory / "new"); });
    setrlimit(RLIMIT_FSIZE, &old_limit);
    std::signal(SIGXFSZ, old_handler);
    CHECK(contains(message, path.string() + ": cannot be written: "));
    CHECK(contains(elsewhere, "cannot be written"));
    CHECK(read_bytes(path) == before);
    CHECK(directory.entries() == 1);
  }
}

TEST_CASE("safetensors: saving keeps the permissions of the file it replaces") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  const SafetensorsWriter writer;
  const mode_t old_mask = umask(027);
  writer.save(path);
  CHECK(fs::status(path).permissions() == fs::perms{0640});
  for (const unsigned mode : {0600U, 0666U, 0444U, 0755U}) {
    fs::permissions(path, fs::perms{mode});
    writer.save(path);
    CHECK(fs::status(path).permissions() == fs::perms{mode});
  }
  umask(old_mask);
}

TEST_CASE("safetensors: saving follows symbolic links and keeps them") {
  const TemporaryDirectory directory;
  fs::create_directory(directory / "data");
  write_bytes(directory / "data/old", "old");
  fs::create_symlink("data/old", directory / "latest");
  fs::create_symlink(directory / "latest", directory / "chain");
  fs::create_symlink("data/new", directory / "dangling");
  fs::create_symlink("loop", directory / "loop");
  const SafetensorsWriter writer;
  writer.save(directory / "chain");
  writer.save(directory / "dangling");
  CHECK(contains(message_of([&] { writer.save(directory / "loop"); }), "too many symbolic links"));
  CHECK(contains(opening(directory / "loop"), "cannot be opened"));
  for (const std::string link : {"latest", "chain", "dangling", "loop"}) {
    CHECK(fs::is_symlink(directory / link));
  }
  CHECK(read_bytes(directory / "data/old") == with_header("{}      "));
  CHECK(read_bytes(directory / "data/new") == with_header("{}      "));
  CHECK(directory.entries() == 5);
}

TEST_CASE("safetensors: a pipe or a device is neither replaced, written nor waited for") {
  const TemporaryDirectory directory;
  REQUIRE(mkfifo((directory / "pipe").c_str(), 0600) == 0);
  fs::create_symlink("/dev/null", directory / "null");
  const SafetensorsWriter writer;
  for (const std::string name : {"pipe", "null"}) {
    CHECK(contains(message_of([&] { writer.save(directory / name); }), "is not a regular file"));
    CHECK(contains(opening(directory / name), "is not a regular file"));
  }
  CHECK(fs::is_fifo(directory / "pipe"));
  CHECK(directory.entries() == 2);
}

TEST_CASE("safetensors: a name may be as long as the file system takes") {
  const TemporaryDirectory directory;
  const fs::path path = directory / std::string(255, 'n');
  SafetensorsWriter().save(path);
  CHECK(fs::is_regular_file(path));
}

#endif

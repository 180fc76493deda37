// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <io/files.hpp>
#include <limits>
#include <moxie/core/parameters.hpp>
#include <moxie/io/safetensors_file.hpp>
#include <moxie/io/safetensors_writer.hpp>
#include <span>
#include <string>
#include <temporary_folder.hpp>
#include <utility>
#include <vector>

namespace {

using moxie::DType;
using moxie::Index;
using moxie::SafetensorsFile;
using moxie::SafetensorsLimits;
using moxie::SafetensorsWriter;
using moxie::test::bytes_of;
using moxie::test::contains;
using moxie::test::message_of;
using moxie::test::python_file;
using TemporaryDirectory = moxie::test::TemporaryFolder;

const float infinity = std::numeric_limits<float>::infinity();

template <class Values>
concept Addable = requires(SafetensorsWriter writer, Values&& values) {
  writer.add(std::string(), std::vector<Index>(), std::forward<Values>(values));
  writer.add_bf16(std::string(), std::vector<Index>(), std::forward<Values>(values));
};
template <class Block>
concept AddableBlock = requires(SafetensorsWriter writer, Block&& block) {
  writer.add_parameters(std::forward<Block>(block), "prefix.");
};
using Bytes = std::vector<std::byte>;
template <class Values>
concept AddableBytes = requires(SafetensorsWriter writer, Values&& values) {
  writer.add_bytes(std::string(), std::vector<Index>(), "U16", std::forward<Values>(values));
};
// A temporary would be gone by the time it is saved.
static_assert(Addable<std::vector<float>&> && Addable<const std::vector<float>&> && Addable<std::span<float>>);
static_assert(!Addable<std::vector<float>>);
static_assert(AddableBytes<Bytes&> && AddableBytes<std::span<const std::byte>> && !AddableBytes<Bytes>);
static_assert(AddableBlock<moxie::Parameters<float>&> && AddableBlock<const moxie::Parameters<float>&> &&
              AddableBlock<moxie::ParameterView<float>> && AddableBlock<moxie::ParameterView<const double>>);
static_assert(!AddableBlock<moxie::Parameters<float>> && !AddableBlock<const moxie::Parameters<float>>);

}  // namespace

TEST_CASE("SafetensorsWriter: what is written has the bytes that the Python package writes") {
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
  CHECK(bytes_of(directory / "file") == python_file());
}

TEST_CASE("SafetensorsWriter: names and metadata may hold any Unicode text") {
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

TEST_CASE("SafetensorsWriter: BF16 rounds to nearest, ties to even, and a NaN stays one") {
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

TEST_CASE("SafetensorsWriter: the writer refuses what could not be read back") {
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

TEST_CASE("SafetensorsWriter: bytes of any format are written, wider formats first, and have to fill the shape") {
  const Bytes bytes(8);
  const std::vector<float> one{1};
  SafetensorsWriter writer;
  writer.add_bytes("new", {5}, "NEW", std::span(bytes).first(3));
  writer.add_bytes("f4", {2, 3}, "F4", std::span(bytes).first(3));
  writer.add_bytes("u16", {1}, "U16", std::span(bytes).first(2));
  writer.add("f32", {1}, one);
  writer.add_bytes("c64", {}, "C64", bytes);
  const TemporaryDirectory directory;
  writer.save(directory / "file");
  const std::string file = bytes_of(directory / "file");
  CHECK(contains(file, R"({"c64":{"dtype":"C64","shape":[],"data_offsets":[0,8]},)"
                       R"("f32":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},)"
                       R"("u16":{"dtype":"U16","shape":[1],"data_offsets":[12,14]},)"
                       R"("f4":{"dtype":"F4","shape":[2,3],"data_offsets":[14,17]},)"
                       R"("new":{"dtype":"NEW","shape":[5],"data_offsets":[17,20]}})"));
  CHECK(SafetensorsFile(directory / "file").read<float>("f32") == one);

  CHECK_THROWS_WITH_AS(writer.add_bytes("x", {3}, "U16", bytes),
                       "SafetensorsWriter::add: tensor 'x' of shape (3) is given 8 bytes of U16", moxie::ShapeError);
  CHECK_THROWS_AS(writer.add_bytes("x", {3}, "F4", std::span(bytes).first(2)), moxie::ShapeError);
  CHECK_THROWS_AS(writer.add_bytes("x", {0}, "NEW", bytes), moxie::ShapeError);
  CHECK_THROWS_AS(writer.add_bytes("x", {-8}, "NEW", bytes), moxie::ShapeError);
  CHECK_THROWS_AS(writer.add_bytes("x", {8}, "\xff", bytes), moxie::ValueError);
}

TEST_CASE("SafetensorsWriter: what exceeds the reader's limits is not written") {
  const TemporaryDirectory directory;
  const std::vector<float> one{1};
  const auto saving = [&](const SafetensorsWriter& writer) { return message_of([&] { writer.save(directory / "file"); }); };
  SafetensorsWriter deep;
  deep.add("w", std::vector<Index>(SafetensorsLimits::dimensions, 1), one);
  CHECK(saving(deep) == "no FileError");
  CHECK(SafetensorsFile(directory / "file").read<float>("w") == one);
  deep.add("deeper", std::vector<Index>(SafetensorsLimits::dimensions + 1, 1), one);
  CHECK(contains(saving(deep), "file: cannot be written: tensor 'deeper' has more than 64 dimensions"));

  SafetensorsWriter metadata;
  metadata.metadata("k", std::string(SafetensorsLimits::text_bytes - 1, 'x'));
  CHECK(saving(metadata) == "no FileError");
  CHECK(SafetensorsFile(directory / "file").metadata().at("k").size() == SafetensorsLimits::text_bytes - 1);
  metadata.metadata("l", std::string(SafetensorsLimits::text_bytes, 'x'));
  CHECK(contains(saving(metadata), "its metadata 'l' are longer than"));

  SafetensorsWriter many;
  for (std::size_t i = 0; i <= SafetensorsLimits::metadata_entries; ++i) {
    many.metadata(std::to_string(i), "");
  }
  CHECK(contains(saving(many), "100001 entries of metadata"));
}

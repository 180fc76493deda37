// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstddef>
#include <cstring>
#include <io/files.hpp>
#include <moxie/io/safetensors_header.hpp>
#include <string>
#include <vector>

using moxie::DType;
using moxie::Index;
using moxie::SafetensorsLimits;
using moxie::detail::HeaderText;
using moxie::detail::SafetensorsHeader;
using moxie::test::contains;

namespace {

struct Parsed {
  SafetensorsHeader header;
  std::string problem;
};

Parsed parse(const std::string& text, std::size_t data_size = 0) {
  HeaderText characters(Index(text.size()),
                        [&](Index at, char* to, Index count) { std::memcpy(to, text.data() + at, std::size_t(count)); });
  Parsed parsed;
  parsed.problem = parsed.header.parse(characters, Index(data_size));
  return parsed;
}

std::string problem_of(const std::string& text, std::size_t data_size = 0) { return parse(text, data_size).problem; }

std::string repeated(const std::string& text, std::size_t times) {
  std::string all;
  all.reserve(text.size() * times);
  for (std::size_t i = 0; i < times; ++i) {
    all += text;
  }
  return all;
}

}  // namespace

TEST_CASE("SafetensorsHeader: tensors and metadata are kept as they are described") {
  const Parsed parsed = parse(R"({"__metadata__":{"k":"v"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},)"
                              R"("b":{"data_offsets":[12,12],"shape":[0],"dtype":"F64"}})",
                              12);
  REQUIRE(parsed.problem.empty());
  CHECK(parsed.header.metadata.at("k") == "v");
  const moxie::StoredTensor& a = parsed.header.tensors.at("a");
  CHECK(a.dtype == DType::BF16);
  CHECK(a.format == "BF16");
  CHECK(a.shape == std::vector<Index>{2, 3});
  CHECK(a.count == 6);
  CHECK(a.offset == 0);
  CHECK(a.bytes == 12);
  CHECK(parsed.header.tensors.at("b").count == 0);
}

TEST_CASE("SafetensorsHeader: a format without numbers here is kept by its name, its size checked where it is known") {
  const auto tensor = [](const std::string& dtype, const std::string& shape, int bytes) {
    return R"({"w":{"dtype":")" + dtype + R"(","shape":[)" + shape + R"(],"data_offsets":[0,)" + std::to_string(bytes) + "]}}";
  };
  for (const std::string dtype : {"F8_E4M3", "F8_E5M2", "U16", "BOOL", "C64", "I8", "F4", "F6_E2M3", "F128", ""}) {
    const std::size_t bytes = dtype == "U16" ? 16 : dtype == "C64" ? 64 : dtype == "F4" ? 4 : dtype == "F6_E2M3" ? 6 : 8;
    const Parsed parsed = parse(tensor(dtype, "2,4", int(bytes)), bytes);
    CAPTURE(dtype);
    REQUIRE(parsed.problem == "");
    const moxie::StoredTensor& w = parsed.header.tensors.at("w");
    CHECK(w.dtype == DType::Other);
    CHECK(w.format == dtype);
    CHECK(w.count == 8);
    CHECK(w.bytes == Index(bytes));
  }
  CHECK(problem_of(tensor("U16", "2,4", 8), 8) ==
        "tensor 'w': shape (2,4) of U16 takes 16 bytes, but data_offsets (0,8) hold 8");
  CHECK(problem_of(tensor("F4", "3", 2), 2) == "tensor 'w': shape (3) of F4 ends inside a byte");
  CHECK(problem_of(tensor("F128", "0", 4), 4) == "tensor 'w': shape (0) has 0 elements, but data_offsets (0,4) hold 4 bytes");
  CHECK(problem_of(tensor("F128", "4", 0), 0) == "tensor 'w': shape (4) has 4 elements, but data_offsets (0,0) hold 0 bytes");
  CHECK(contains(problem_of(tensor("F128", "4294967296,4294967296", 1), 1), "more bytes than can be counted"));
  CHECK(contains(problem_of(tensor("C64", "1152921504606846976", 1), 1), "more bytes than can be counted"));
}

TEST_CASE("SafetensorsHeader: what exceeds the limits is refused at the first excess") {
  const std::string shape = repeated("1,", SafetensorsLimits::dimensions);
  const auto with_shape = [](const std::string& s) {
    return R"({"w":{"dtype":"U8","shape":[)" + s + R"(1],"data_offsets":[0,1]}})";
  };
  CHECK(problem_of(with_shape(shape.substr(2)), 1).empty());
  CHECK(problem_of(with_shape(shape), 1) == "tensor 'w': shape has more than 64 numbers");
  CHECK(problem_of(R"({"w":{"data_offsets":[)" + shape + "1]}}") == "tensor 'w': data_offsets has more than 64 numbers");
  CHECK(problem_of(R"({"w":{"shape":[)" + std::string(1000, '7') + "]}}") == "the header has a number of more than 40 digits");
  CHECK(problem_of(R"({"__metadata__":{"k":")" + std::string(SafetensorsLimits::text_bytes, 'x') + "\"}}") ==
        "the header has a string of more than 4194304 bytes");

  std::string metadata;
  for (std::size_t i = 0; i < SafetensorsLimits::metadata_entries; ++i) {
    metadata += "\"" + std::to_string(i) + "\":\"\",";
  }
  CHECK(problem_of(R"({"__metadata__":{)" + metadata.substr(0, metadata.size() - 1) + "}}").empty());
  CHECK(problem_of(R"({"__metadata__":{)" + metadata + R"("more":""}})") ==
        "the header has more than 100000 entries of metadata");
}

TEST_CASE("SafetensorsHeader: there are as many tensors as the limit says, and no more") {
  std::string tensors = "{";
  for (std::size_t i = 0; i < SafetensorsLimits::tensors; ++i) {
    tensors += "\"" + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)";
  }
  CHECK(problem_of(tensors + R"("more":{}})") == "the header has more than 524288 tensors");
  tensors.back() = '}';
  CHECK(problem_of(tensors).empty());
}

TEST_CASE("SafetensorsHeader: a header that breaks the format is refused, and the message says why") {
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
  for (const Case& c : cases) {
    const std::string problem = problem_of(c.header, c.data_size);
    CAPTURE(c.header);
    CAPTURE(problem);
    CHECK(contains(problem, c.problem));
  }
}

TEST_CASE("SafetensorsHeader: a deeply nested header is refused without deep recursion") {
  for (const std::string start :
       {"{\"w\":", "{\"w\":{\"shape\":", "{\"w\":{\"dtype\":", "{\"__metadata__\":{\"k\":", "{\"__metadata__\":"}) {
    for (const std::string level : {"[", "{\"w\":"}) {
      const std::string problem = problem_of(start + repeated(level, 200'000));
      CAPTURE(problem);
      CHECK((contains(problem, "expected") || contains(problem, "is not a field")));
    }
  }
}

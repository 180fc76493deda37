// SPDX-License-Identifier: MIT
#pragma once

#include <contains.hpp>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <moxie/core/layout.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/io/error.hpp>
#include <string>
#include <vector>

/// Files for the tests of io, written and read without it.
namespace moxie::test {

inline void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::remove(path);  // some file systems sync a truncated file at once, which takes long
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

inline std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

inline std::string length_prefix(std::uint64_t size) {
  std::string bytes(sizeof size, '\0');
  std::memcpy(bytes.data(), &size, sizeof size);
  return bytes;
}

inline std::string with_header(const std::string& header, std::size_t data_size = 0) {
  return length_prefix(header.size()) + header + std::string(data_size, '\0');
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const FileError& error) {
    return error.what();
  }
  return "no FileError";
}

inline Layout small_layout() {
  Layout layout;
  layout.add("gate/w", {4, 3});
  layout.add("bias", {5});
  layout.add("scale", {});
  layout.add("experts", {2, 3, 4});
  layout.add("none", {0, 7});
  return layout;
}

template <class Scalar>
Parameters<Scalar> random_parameters(std::uint64_t seed) {
  Parameters<Scalar> parameters(small_layout());
  for (std::size_t i = 0; i < parameters.layout().tensors().size(); ++i) {
    Rng(seed).split(i).fill_normal(parameters.view()[Index(i)]);
  }
  return parameters;
}

/// Written by the Python package safetensors 0.8.0 from
///   {"layer.0/w": float32 [[1, 2, 3], [-0.5, 0.25, inf]], "half": bfloat16 [1, -3.125], "step": int64 -7,
///    "größe": uint8 [1, 2, 255], "none": float64 of shape (0, 4), "lr": float64 [0.1], "ids": int32 [[5, -6]]}
inline std::string python_file() {
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

}  // namespace moxie::test

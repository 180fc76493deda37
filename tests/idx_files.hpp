// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <contains.hpp>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

/// IDX files for tests, good and bad.
namespace moxie::test {

/// The bytes of an IDX file of bytes.
inline std::string idx(const std::vector<std::uint32_t>& dimensions, const std::string& elements) {
  std::string b{0, 0, 8, static_cast<char>(dimensions.size())};
  for (const std::uint32_t n : dimensions) {
    for (const unsigned shift : {24U, 16U, 8U, 0U}) {
      b += static_cast<char>(n >> shift);
    }
  }
  return b + elements;
}

inline void write_plain(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// Several such files, one after the other, are a gzip file too.
inline void write_gz(const std::filesystem::path& path, const std::string& bytes) {
  gzFile file = gzopen(path.c_str(), "wb9");
  const bool written =
      file != nullptr && gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size())) == static_cast<int>(bytes.size());
  if (gzclose(file) != Z_OK || !written) {
    throw std::runtime_error(path.string() + ": cannot be written");
  }
}

inline std::string file_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// The text of the std::runtime_error that `read()` throws, or "".
template <class Read>
std::string complaint_of(Read&& read) {
  try {
    read();
    return "";
  } catch (const std::runtime_error& e) {
    return e.what();
  }
}

}  // namespace moxie::test

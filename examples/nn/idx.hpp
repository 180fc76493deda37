// SPDX-License-Identifier: MIT
#pragma once

#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace nn {

/// Reads an IDX file of bytes, plain or compressed with gzip: the format of MNIST (LeCun). The file holds the numbers 0, 0, 8
/// (type: byte) and its rank as one byte each, the dimensions as big-endian 32-bit integers, then the elements.
///
/// Limits, which are checked with the header, before any element is read:
///
/// * a dimension is at least 1; all but the first are at most `largest_side`;
/// * a file holds at most `most_elements` elements (1 GiB);
/// * beyond `free_elements` (16 MiB), at most `largest_ratio` elements for each byte on the disk. Images of clothes compress to
///   a half, drawn shapes to a sixth; zeros would to a thousandth, so that 1 MB could demand 1 GB.
///
/// Memory is that of the elements that the file really holds, within these limits. Every error is a std::runtime_error whose
/// text begins with the path.
class IdxReader {
 public:
  static constexpr std::size_t largest_side = 1024;
  static constexpr std::size_t most_elements = std::size_t{1} << 30U;
  static constexpr std::size_t free_elements = std::size_t{1} << 24U;
  static constexpr std::size_t largest_ratio = 100;

  /// Opens the file and reads its header. Throws if it cannot, if the rank is none of `ranks`, and beyond a limit.
  IdxReader(std::filesystem::path path, std::initializer_list<std::size_t> ranks) : path_(std::move(path)) {
    open();
    read_dimensions(read_rank(ranks));
    check_limits();
  }

  const std::filesystem::path& path() const { return path_; }
  const std::vector<std::size_t>& dimensions() const { return dimensions_; }
  /// The product of the dimensions.
  std::size_t size() const { return size_; }

  /// The elements, read to the end of the file; call it once. Throws if the file is damaged, too short or too long.
  std::vector<std::uint8_t> elements() {
    std::vector<std::uint8_t> bytes = read(size_);
    if (bytes.size() < size_) {
      fail("ends after " + std::to_string(bytes.size()) + " of the " + std::to_string(size_) +
           " elements that its header announces");
    }
    if (!read(1).empty()) {  // reading to the end also lets zlib compare its checksum
      fail("goes on after the " + std::to_string(size_) + " elements that its header announces");
    }
    return bytes;
  }

  /// Throws the std::runtime_error that names the file.
  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(path_.string() + ": " + what); }

 private:
  void open() {
    std::error_code ignored;
    const std::filesystem::file_status status = std::filesystem::status(path_, ignored);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
      fail("is not a regular file");  // it is not opened either: that would wait for ever at a pipe
    }
    errno = 0;
    file_.reset(gzopen(path_.c_str(), "rb"));
    if (!file_) {
      fail("cannot be opened: " + std::generic_category().message(errno == 0 ? ENOMEM : errno));
    }
  }

  std::size_t read_rank(std::initializer_list<std::size_t> ranks) {
    const std::vector<std::uint8_t> magic = read(4);
    if (magic.size() < 4 || magic[0] != 0 || magic[1] != 0) {
      fail("is not an IDX file (it should start with two zero bytes)");
    }
    if (magic[2] != 8) {
      fail("holds IDX elements of type " + std::to_string(magic[2]) + ", expected 8 (bytes)");
    }
    const std::size_t rank = magic[3];
    if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) {
      std::string expected;
      for (const std::size_t r : ranks) {
        expected += (expected.empty() ? "" : " or ") + std::to_string(r);
      }
      fail("has " + std::to_string(rank) + " dimensions, expected " + expected);
    }
    return rank;
  }

  void read_dimensions(std::size_t rank) {
    const std::vector<std::uint8_t> header = read(4 * rank);
    if (header.size() < 4 * rank) {
      fail("ends in the middle of its header");
    }
    for (std::size_t i = 0; i < rank; ++i) {
      const std::uint8_t* b = &header[4 * i];
      const std::size_t n = std::size_t{b[0]} << 24U | std::size_t{b[1]} << 16U | std::size_t{b[2]} << 8U | std::size_t{b[3]};
      if (n == 0 || (i > 0 && n > largest_side)) {
        fail("has a dimension of " + std::to_string(n) + (n == 0 ? "" : ", expected at most " + std::to_string(largest_side)));
      }
      dimensions_.push_back(n);
    }
  }

  void check_limits() {
    size_ = 1;
    for (const std::size_t n : dimensions_) {
      if (n > most_elements / size_) {
        fail("announces more than " + std::to_string(most_elements) + " elements");
      }
      size_ *= n;
    }
    std::error_code unknown;
    const std::uintmax_t bytes = std::filesystem::file_size(path_, unknown);
    if (size_ > free_elements && (unknown || size_ / largest_ratio > bytes)) {
      fail("announces " + std::to_string(size_) + " elements in " + std::to_string(bytes) + " bytes, expected at most " +
           std::to_string(largest_ratio) + " for each byte");
    }
  }

  /// Up to `count` bytes; fewer at the end of the file.
  std::vector<std::uint8_t> read(std::size_t count) {
    constexpr std::size_t chunk = std::size_t{1} << 20U;
    std::vector<std::uint8_t> bytes;
    while (bytes.size() < count) {
      const std::size_t start = bytes.size();
      const std::size_t wanted = std::min(chunk, count - start);
      bytes.resize(start + wanted);
      const int got = gzread(file_.get(), bytes.data() + start, static_cast<unsigned>(wanted));
      int error = Z_OK;
      const char* message = gzerror(file_.get(), &error);
      if (got < 0 || error < 0) {
        fail(error == Z_BUF_ERROR ? "ends in the middle of its compressed data" : std::string("cannot be read: ") + message);
      }
      bytes.resize(start + static_cast<std::size_t>(got));
      if (got == 0) {
        break;
      }
    }
    return bytes;
  }

  struct Close {
    void operator()(gzFile file) const { gzclose(file); }
  };

  std::filesystem::path path_;
  std::unique_ptr<gzFile_s, Close> file_;
  std::vector<std::size_t> dimensions_;
  std::size_t size_ = 0;
};

}  // namespace nn

// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <moxie/core/error.hpp>
#include <moxie/io/error.hpp>
#include <moxie/io/native_file.hpp>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// A new file that takes the place of `path` at once, when it is complete.
///
/// Until `commit` returns, and for ever if it throws or is not called, an old file stays as it was. The
/// new file keeps the old one's permissions. A symbolic link stays, and the file that it leads to is
/// replaced. Several processes may replace one path: the last one stays. A process that forks keeps its
/// file: what the child does or leaves undone with its copy changes nothing, unless it calls `write` or
/// `commit`. A process that is killed may leave a ".moxie-*.tmp" beside `path`.
///
///     ReplacementFile file("report.html");
///     file.write(text.data(), text.size());
///     file.commit();
///
/// The constructor, `write` and `commit` throw FileError. The cost is one buffer of 64 KiB and one
/// fsync.
class ReplacementFile {
 public:
  explicit ReplacementFile(const std::filesystem::path& path) : path_(path), target_(path) {
    follow_links();
    std::error_code problem;
    const std::filesystem::file_status status = std::filesystem::status(target_, problem);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
      fail("it exists and is not a regular file");
    }
    buffer_.reserve(buffer_size);
    create();
  }
  ReplacementFile(const ReplacementFile&) = delete;
  ReplacementFile& operator=(const ReplacementFile&) = delete;
  ~ReplacementFile() {
    static_cast<void>(file_.close());
    if (!temporary_.empty() && owner_ == detail::process_number()) {
      std::error_code ignored;
      std::filesystem::remove(temporary_, ignored);
    }
  }

  void write(const void* data, std::size_t bytes) {
    if (bytes > buffer_size - buffer_.size()) {
      flush();
    }
    if (bytes > buffer_size) {
      put(data, bytes);
    } else {
      const char* const from = static_cast<const char*>(data);
      buffer_.insert(buffer_.end(), from, from + bytes);
    }
  }

  /// Puts the file in its place, once it is on the disk. Call it once, as the last.
  void commit() {
    flush();
    expect_success(file_.sync());
    if (!detail::NativeFile::renames_while_open) {
      expect_success(file_.close());
    }
    std::error_code problem;
    std::filesystem::rename(temporary_, target_, problem);
    if (problem) {
      fail(problem.message());
    }
    temporary_.clear();
    expect_success(file_.close());  // ends the lock, too
    detail::sync_directory(directory());
  }

 private:
  static constexpr std::size_t buffer_size = std::size_t{1} << 16U;

  [[noreturn]] void fail(const std::string& problem) const {
    throw FileError(path_.string() + ": cannot be written: " + problem);
  }
  void expect_success(int number) const {
    if (number != 0) {
      fail(detail::system_message(number));
    }
  }

  std::filesystem::path directory() const { return target_.has_parent_path() ? target_.parent_path() : "."; }

  void follow_links() {
    std::error_code problem;
    constexpr int most_links = 40;
    for (int links = 0; std::filesystem::is_symlink(std::filesystem::symlink_status(target_, problem)); ++links) {
      const std::filesystem::path link = std::filesystem::read_symlink(target_, problem);
      if (problem || links == most_links) {
        fail(problem ? problem.message() : "too many symbolic links");
      }
      target_ = link.is_absolute() ? link : target_.parent_path() / link;
    }
  }

  // The name is random and not made from the target's, which may be as long as a name can be.
  void create() {
    std::random_device random;
    constexpr int attempts = 100;
    int number = EEXIST;
    for (int i = 0; i < attempts && number == EEXIST; ++i) {
      std::array<char, 40> name{};
      std::snprintf(name.data(), name.size(), ".moxie-%08x%08x.tmp", random(), random());
      std::filesystem::path path = directory() / name.data();
      number = file_.create(path, target_);
      if (number == 0) {
        temporary_ = std::move(path);
      }
    }
    expect_success(number);
  }

  void flush() {
    put(buffer_.data(), buffer_.size());
    buffer_.clear();
  }
  void put(const void* data, std::size_t bytes) {
    expect_success(file_.write_at(written_, data, static_cast<Index>(bytes)));
    written_ += static_cast<Index>(bytes);
  }

  std::filesystem::path path_;       // as the caller named it
  std::filesystem::path target_;     // where it leads
  std::filesystem::path temporary_;  // empty when there is none to remove
  detail::NativeFile file_;
  std::vector<char> buffer_;  // ours and not the C library's, which a forked child would write again at its exit
  Index written_ = 0;
  long owner_ = detail::process_number();
};

}  // namespace moxie::inline MOXIE_NAMESPACE

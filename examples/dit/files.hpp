// SPDX-License-Identifier: MIT
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>

/// Whole files, read by programs that never wait: a pipe without a writer, or a device, is refused.
namespace dit {

/// The bytes of a regular file, or nothing where there is no file. Throws std::runtime_error, which names the file, for what is
/// not a regular file and for what cannot be read.
inline std::optional<std::string> read_file_if_there(const std::filesystem::path& path) {
  struct Descriptor {
    int number;
    ~Descriptor() { ::close(number); }
  };
  const auto fail = [&](const std::string& what) { throw std::runtime_error(path.string() + ": " + what); };
  const auto fail_with = [&](int error) { fail("cannot be read: " + std::generic_category().message(error)); };
  // O_NONBLOCK: a pipe is opened at once, even if nobody writes to it.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)};
  if (file.number < 0) {
    if (errno == ENOENT) {
      return std::nullopt;
    }
    fail_with(errno);
  }
  struct ::stat status {};
  if (::fstat(file.number, &status) != 0) {
    fail_with(errno);
  }
  if (!S_ISREG(status.st_mode)) {
    fail("is not a regular file");
  }
  std::string bytes;
  std::array<char, 1 << 16> buffer{};
  while (true) {
    const ssize_t got = ::read(file.number, buffer.data(), buffer.size());
    if (got == 0) {
      return bytes;
    }
    if (got > 0) {
      bytes.append(buffer.data(), std::size_t(got));
    } else if (errno != EINTR) {
      fail_with(errno);
    }
  }
}

/// The same of a file that must be there.
inline std::string read_file(const std::filesystem::path& path) {
  std::optional<std::string> bytes = read_file_if_there(path);
  if (!bytes) {
    throw std::runtime_error(path.string() + ": cannot be read: " + std::generic_category().message(ENOENT));
  }
  return *std::move(bytes);
}

}  // namespace dit

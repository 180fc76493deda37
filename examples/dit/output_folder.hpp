// SPDX-License-Identifier: MIT
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <moxie/io/safetensors.hpp>
#include <stdexcept>
#include <string>

namespace dit {

/// Throws std::runtime_error where a file would be written over what is read.
inline void expect_another_file(const std::filesystem::path& read, const std::filesystem::path& written) {
  if (std::filesystem::exists(written) && std::filesystem::equivalent(read, written)) {
    throw std::runtime_error(written.string() + " is what is read: choose another --out");
  }
}

/// The folder of a run's files: made where there is none, one run at a time. One that was made in vain goes again.
///
///     const OutputFolder files("out");
///     files.expect_room_for("samples.safetensors", bytes);
///     save(files("samples.safetensors"));
class OutputFolder {
 public:
  /// Removes what a run that was killed while it saved has left. Throws std::runtime_error if another run is going on in this
  /// folder.
  explicit OutputFolder(std::filesystem::path folder)
      : folder_(std::move(folder)),
        made_(std::filesystem::create_directories(folder_)),
        descriptor_(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (descriptor_ >= 0 && ::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(descriptor_);
      throw std::runtime_error(folder_.string() + ": another run is going on in this folder");
    }
    for (const std::filesystem::directory_entry& entry : std::filesystem::directory_iterator(folder_)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with(".moxie-") && name.ends_with(".tmp")) {
        remove_if_left(entry.path());
      }
    }
  }
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;
  ~OutputFolder() {
    if (made_) {
      std::error_code ignored;  // which a folder with files is
      std::filesystem::remove(folder_, ignored);
    }
    if (descriptor_ >= 0) {
      ::close(descriptor_);
    }
  }

  std::filesystem::path operator()(const std::string& name) const { return folder_ / name; }

  /// Throws std::runtime_error unless a file of this size could be written now.
  void expect_room_for(const std::string& name, std::uintmax_t bytes) const {
    const moxie::ReplacementFile writable((*this)(name));
    if (std::error_code error; std::filesystem::space(folder_, error).available < bytes && !error) {
      throw std::runtime_error((*this)(name).string() + ": there is no room for its " + std::to_string(bytes) + " bytes");
    }
  }

 private:
  // Who writes a file holds its lock.
  static void remove_if_left(const std::filesystem::path& path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (descriptor >= 0) {
      if (::flock(descriptor, LOCK_EX | LOCK_NB) == 0) {
        ::unlink(path.c_str());
      }
      ::close(descriptor);
    }
  }

  std::filesystem::path folder_;
  bool made_;
  int descriptor_;
};

}  // namespace dit

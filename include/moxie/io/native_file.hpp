// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <moxie/core/error.hpp>
#include <mutex>
#include <type_traits>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace moxie::inline MOXIE_NAMESPACE::detail {

/// What `NativeFile::read_at` returns where the file ends too early.
inline constexpr int file_too_short = -1;

/// Converts between integer types that are one type on some systems and two on others.
template <class To, class From>
constexpr To integer_as(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return static_cast<To>(value);
  }
}

#if defined(__unix__) || defined(__APPLE__)

/// An open file of the operating system. Every read and write says its position, because processes
/// share the file's own offset after fork. Threads may read at once.
///
/// Functions that can fail return an error number, 0 for success.
class NativeFile {
 public:
  static constexpr bool renames_while_open = true;

  NativeFile() = default;
  NativeFile(NativeFile&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  NativeFile& operator=(NativeFile&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~NativeFile() { static_cast<void>(close()); }

  /// Opens a file to read it.
  int open(const std::filesystem::path& path) {
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    return descriptor_ < 0 ? errno : 0;
  }

  /// Creates a file to write it, with the permissions of `like` if there is such a file, else those of
  /// any new file. Fails if `path` exists. Locks it, which tells it from what a killed process left.
  int create(const std::filesystem::path& path, const std::filesystem::path& like) {
    struct stat status {};
    const bool replaces = ::stat(like.c_str(), &status) == 0;
    const auto mode = integer_as<mode_t>(replaces ? status.st_mode & 0777U : 0666U);
    descriptor_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (descriptor_ < 0) {
      return errno;
    }
    static_cast<void>(::flock(descriptor_, LOCK_EX | LOCK_NB));
    if (replaces) {
      // Restores what the umask took away. A file system without permissions may refuse; none are lost.
      static_cast<void>(::fchmod(descriptor_, mode));
    }
    return 0;
  }

  bool is_open() const { return descriptor_ >= 0; }

  /// The bytes of the open file, whatever its name means by now; -1 if it has none that can be counted.
  Index size() const {
    struct stat status {};
    const bool known = ::fstat(descriptor_, &status) == 0 && status.st_size <= (std::numeric_limits<Index>::max)();
    return known ? integer_as<Index>(status.st_size) : -1;
  }

  int read_at(Index at, void* to, Index count) const {
    for (Index done = 0; done < count;) {
      char* const rest = static_cast<char*>(to) + done;
      const ssize_t got = ::pread(descriptor_, rest, piece_of(count - done), integer_as<off_t>(at + done));
      if (got == 0) {
        return file_too_short;
      }
      if (got < 0 && errno != EINTR) {
        return errno;
      }
      done += (std::max)(got, ssize_t{0});
    }
    return 0;
  }

  int write_at(Index at, const void* from, Index count) {
    for (Index done = 0; done < count;) {
      const char* const rest = static_cast<const char*>(from) + done;
      const ssize_t put = ::pwrite(descriptor_, rest, piece_of(count - done), integer_as<off_t>(at + done));
      if (put < 0 && errno != EINTR) {
        return errno;
      }
      done += (std::max)(put, ssize_t{0});
    }
    return 0;
  }

  /// Returns when the written bytes are on the disk.
  int sync() { return ::fsync(descriptor_) == 0 ? 0 : errno; }

  int close() {
    const int descriptor = std::exchange(descriptor_, -1);
    return descriptor < 0 || ::close(descriptor) == 0 ? 0 : errno;
  }

 private:
  // Systems limit one call to about 2 GiB.
  static std::size_t piece_of(Index count) { return static_cast<std::size_t>((std::min)(count, Index{1} << 30)); }

  int descriptor_ = -1;
};

/// Makes the renames in a folder last. Ignores errors: some file systems refuse, and there is nothing
/// to undo.
inline void sync_directory(const std::filesystem::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor >= 0) {
    static_cast<void>(::fsync(descriptor));
    static_cast<void>(::close(descriptor));
  }
}

/// Tells a process from those that fork made of it.
inline long process_number() { return long{::getpid()}; }

#else

/// The same by means of the standard library, where no process forks. Readers wait for each other.
class NativeFile {
 public:
  static constexpr bool renames_while_open = false;

  int open(const std::filesystem::path& path) {
    errno = 0;
    reader_ = std::make_unique<Reader>();
    reader_->stream.open(path, std::ios::binary);
    if (reader_->stream) {
      return 0;
    }
    reader_.reset();
    return errno != 0 ? errno : EIO;
  }
  int create(const std::filesystem::path& path, const std::filesystem::path& /*like*/) {
    errno = 0;
    writer_.reset(std::fopen(path.string().c_str(), "wbx"));
    return writer_ != nullptr ? 0 : errno != 0 ? errno : EIO;
  }
  bool is_open() const { return reader_ != nullptr || writer_ != nullptr; }
  Index size() const {
    const std::lock_guard lock(reader_->mutex);
    reader_->stream.seekg(0, std::ios::end);
    return static_cast<Index>(reader_->stream.tellg());
  }
  int read_at(Index at, void* to, Index count) const {
    if (reader_ == nullptr) {
      return EBADF;
    }
    const std::lock_guard lock(reader_->mutex);
    reader_->stream.clear();
    reader_->stream.seekg(at).read(static_cast<char*>(to), count);
    return reader_->stream ? 0 : file_too_short;
  }
  // Precondition: each write continues where the last one ended.
  int write_at(Index /*at*/, const void* from, Index count) {
    const auto bytes = static_cast<std::size_t>(count);
    return std::fwrite(from, 1, bytes, writer_.get()) == bytes ? 0 : errno;
  }
  int sync() { return std::fflush(writer_.get()) == 0 ? 0 : errno; }
  int close() {
    reader_.reset();
    return writer_ == nullptr || std::fclose(writer_.release()) == 0 ? 0 : errno;
  }

 private:
  struct Reader {
    std::ifstream stream;
    std::mutex mutex;
  };
  struct Close {
    void operator()(std::FILE* file) const { static_cast<void>(std::fclose(file)); }
  };

  std::unique_ptr<Reader> reader_;
  std::unique_ptr<std::FILE, Close> writer_;
};

inline void sync_directory(const std::filesystem::path& /*path*/) {}
inline long process_number() { return 0; }

#endif

}  // namespace moxie::inline MOXIE_NAMESPACE::detail

// SPDX-License-Identifier: MIT
//
// Reads damaged safetensors files. Each has to be read whole or refused with a FileError, within a
// bound on memory; sanitizers find the rest. Usage:
//
//     safetensors_fuzz [EXECUTIONS [SEED [FIRST]]]        100000, 1 and 0 where they are left out
//
// Execution n of a seed is always the same: `safetensors_fuzz 1 SEED n` repeats it.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fuzz/safetensors_damage.hpp>
#include <moxie/io/safetensors.hpp>
#include <new>
#include <stdexcept>
#include <string>
#include <temporary_folder.hpp>
#include <vector>

namespace {

// Bytes that operator new has given and delete has not taken back, and the most there were.
std::atomic<std::size_t> held{0};
std::atomic<std::size_t> most_held{0};

constexpr std::size_t size_place = alignof(std::max_align_t);

}  // namespace

#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 looks through the operators and warns of pairs that do match.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif

void* operator new(std::size_t size) {
  auto* const block = static_cast<char*>(std::malloc(size + size_place));
  if (block == nullptr) {
    throw std::bad_alloc();
  }
  *reinterpret_cast<std::size_t*>(block) = size;
  held += size;
  most_held = std::max(most_held.load(), held.load());
  return block + size_place;
}
void operator delete(void* block) noexcept {
  if (block != nullptr) {
    char* const start = static_cast<char*>(block) - size_place;
    held -= *reinterpret_cast<std::size_t*>(start);
    std::free(start);
  }
}
void operator delete(void* block, std::size_t /*size*/) noexcept { operator delete(block); }

namespace {

namespace fs = std::filesystem;
using moxie::Index;

// One file that is written again and again, which is faster than a new one each time.
class ScratchFile {
 public:
  explicit ScratchFile(fs::path path)
      : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {}
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;
  ~ScratchFile() { static_cast<void>(::close(descriptor_)); }

  const fs::path& path() const { return path_; }
  void write(const std::string& bytes) {
    const bool whole = ::pwrite(descriptor_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()) &&
                       ::ftruncate(descriptor_, static_cast<off_t>(bytes.size())) == 0;
    expect(whole, "the scratch file cannot be written");
  }

  static void expect(bool holds, const std::string& what) {
    if (!holds) {
      throw std::logic_error(what);
    }
  }

 private:
  fs::path path_;
  int descriptor_;
};

template <class T>
void read_numbers(const moxie::SafetensorsFile& file, const std::string& name) {
  const moxie::StoredTensor& tensor = file.info(name);
  if (moxie::reads_as<T>(tensor.dtype)) {
    ScratchFile::expect(static_cast<Index>(file.read<T>(name).size()) == tensor.count, "a tensor has another size");
  }
}

// Reads every tensor, and compares its bytes with those of the file.
void read_all(const moxie::SafetensorsFile& file, const std::string& bytes) {
  Index total = 0;
  const std::vector<std::string> names = file.names();
  for (const std::string& name : names) {
    total += file.info(name).bytes;
  }
  ScratchFile::expect(total <= static_cast<Index>(bytes.size()), "there are more tensors than bytes");
  const std::size_t data = bytes.size() - static_cast<std::size_t>(total);
  for (const std::string& name : names) {
    const moxie::StoredTensor& tensor = file.info(name);
    const std::vector<std::byte> stored = file.read_bytes(name);
    const auto* const expected =
        reinterpret_cast<const std::byte*>(bytes.data() + data + static_cast<std::size_t>(tensor.offset));
    ScratchFile::expect(std::equal(stored.begin(), stored.end(), expected), "a tensor has other bytes than the file");
    read_numbers<float>(file, name);
    read_numbers<double>(file, name);
    read_numbers<std::int64_t>(file, name);
    read_numbers<std::uint8_t>(file, name);
  }
}

struct Outcome {
  bool opened = false;
  bool loaded = false;
};

// Throws std::logic_error, or anything that is not a FileError, where the reader is wrong.
Outcome execute(const fs::path& path, const std::string& bytes, moxie::Parameters<float>& target) {
  Outcome outcome;
  target.flat().setConstant(7);
  try {
    moxie::SafetensorsFile file(path);
    outcome.opened = true;
    read_all(file, bytes);
    file.rename(moxie::without_wrappers);
    moxie::load_parameters(file, target);
    outcome.loaded = true;
  } catch (const moxie::FileError& error) {
    const std::string message = error.what();
    ScratchFile::expect(message.starts_with(path.string() + ": "), "a message does not name the file: " + message);
    ScratchFile::expect(message.size() < path.string().size() + 1000, "a message is long: " + message);
    ScratchFile::expect(std::none_of(message.begin(), message.end(), [](char c) { return c >= 0 && c < 32; }),
                        "a message has control characters: " + message);
    ScratchFile::expect((target.flat() == 7).all(), "a file that is refused was loaded in part");
  }
  return outcome;
}

// Memory for one file: 64 KiB and 16 bytes for each of its bytes.
std::size_t most_memory(const std::string& bytes) { return (std::size_t{1} << 16U) + 16 * bytes.size(); }

std::uint64_t argument(int count, char** values, int i, std::uint64_t otherwise) {
  return i < count ? std::strtoull(values[i], nullptr, 10) : otherwise;
}

int fuzz(std::uint64_t executions, std::uint64_t seed, std::uint64_t first) {
  const moxie::test::TemporaryFolder folder;
  ScratchFile scratch(folder / "file");
  const std::vector<std::string> originals = moxie::test::whole_files();
  moxie::Parameters<float> target(moxie::test::small_layout());
  std::uint64_t opened = 0;
  std::uint64_t loaded = 0;
  std::size_t most = 0;
  const auto start = std::chrono::steady_clock::now();
  for (std::uint64_t n = first; n < first + executions; ++n) {
    moxie::test::SafetensorsDamage damage(seed, n);
    const std::string bytes = damage.damaged(originals[n % originals.size()]);
    try {
      scratch.write(bytes);
      const std::size_t before = held;
      most_held = before;
      const Outcome outcome = execute(scratch.path(), bytes, target);
      const std::size_t taken = most_held - before;
      ScratchFile::expect(taken <= most_memory(bytes), "it took " + std::to_string(taken) + " bytes of memory");
      most = std::max(most, taken);
      opened += outcome.opened ? 1 : 0;
      loaded += outcome.loaded ? 1 : 0;
    } catch (const std::exception& error) {
      std::printf("safetensors_fuzz: execution %llu of seed %llu: %s\n", static_cast<unsigned long long>(n),
                  static_cast<unsigned long long>(seed), error.what());
      return 1;
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("safetensors_fuzz: %llu executions, %.0f a second: %llu files opened, %llu loaded, at most %zu KiB\n",
              static_cast<unsigned long long>(executions), static_cast<double>(executions) / seconds.count(),
              static_cast<unsigned long long>(opened), static_cast<unsigned long long>(loaded), most >> 10U);
  // Damage that is always refused would test little.
  const bool both = executions < 1000 || (opened > executions / 50 && opened < executions && loaded > executions / 200);
  if (!both) {
    std::printf("safetensors_fuzz: hardly any file was opened, or all were\n");
  }
  return both ? 0 : 1;
}

}  // namespace

int main(int count, char** values) {
  return fuzz(argument(count, values, 1, 100'000), argument(count, values, 2, 1), argument(count, values, 3, 0));
}

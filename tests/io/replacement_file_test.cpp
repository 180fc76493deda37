// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <exception>
#include <filesystem>
#include <io/files.hpp>
#include <io/in_child.hpp>
#include <moxie/io/replacement_file.hpp>
#include <string>
#include <temporary_folder.hpp>
#include <thread>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#endif

namespace {

namespace fs = std::filesystem;
using moxie::ReplacementFile;
using moxie::test::bytes_of;
using moxie::test::contains;
using moxie::test::message_of;
using moxie::test::write_bytes;
using TemporaryDirectory = moxie::test::TemporaryFolder;

void replace(const fs::path& path, const std::string& bytes) {
  ReplacementFile file(path);
  file.write(bytes.data(), bytes.size());
  file.commit();
}

}  // namespace

TEST_CASE("ReplacementFile: what is written in parts of any size is there after commit, and nothing before") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  write_bytes(path, "old");
  std::string expected;
  {
    ReplacementFile file(path);
    int i = 0;
    for (const int size : {0, 1, 65535, 3, 65536, 65537, 200'000, 7, 0, 65530, 6, 1}) {
      const std::string part(std::size_t(size), char('a' + i++));
      file.write(part.data(), part.size());
      expected += part;
    }
    CHECK(bytes_of(path) == "old");
    file.commit();
    CHECK(bytes_of(path) == expected);
  }
  CHECK(bytes_of(path) == expected);
  CHECK(directory.entries() == 1);
}

TEST_CASE("ReplacementFile: without commit the old file stays, and nothing else") {
  const TemporaryDirectory directory;
  write_bytes(directory / "file", "old");
  for (const std::string name : {"file", "new"}) {
    ReplacementFile file(directory / name);
    file.write("new", 3);
    CHECK(directory.entries() == 2);
  }
  CHECK(bytes_of(directory / "file") == "old");
  CHECK(directory.entries() == 1);
}

TEST_CASE("ReplacementFile: two writers of one path leave one whole file, and a reader never sees another") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  const std::string zeros(20'000, '0');
  const std::string ones(20'000, '1');
  replace(path, zeros);
  std::atomic<int> running{2};
  std::atomic<int> failed{0};
  const auto saves = [&](const std::string& bytes) {
    try {
      for (int i = 0; i < 20; ++i) {
        replace(path, bytes);
      }
    } catch (const std::exception&) {
      ++failed;
    }
    --running;
  };
  std::thread first([&] { saves(zeros); });
  std::thread second([&] { saves(ones); });
  int broken = 0;
  while (running > 0) {
    const std::string bytes = bytes_of(path);
    broken += bytes == zeros || bytes == ones ? 0 : 1;
  }
  first.join();
  second.join();
  CHECK(broken == 0);
  CHECK(failed == 0);
  CHECK(directory.entries() == 1);
}

TEST_CASE("ReplacementFile: a path that cannot be replaced is refused") {
  const TemporaryDirectory directory;
  CHECK(contains(message_of([&] { replace(directory / "none/file", ""); }), "cannot be written"));
  fs::create_directory(directory / "sub");
  CHECK(contains(message_of([&] { replace(directory / "sub", ""); }), "is not a regular file"));
  CHECK(contains(message_of([&] { replace("", ""); }), "cannot be written"));
  CHECK(directory.entries() == 1);
}

#if defined(__unix__) || defined(__APPLE__)

TEST_CASE("ReplacementFile: a child process that ends with a copy of it neither writes nor removes anything") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  auto* const file = new ReplacementFile(path);
  file->write("abc", 3);
  const auto child = [&] {
    delete file;  // as a child does that returns from the function that forked
    return 0;
  };
  CHECK(moxie::test::in_child(child, [] {}) == 0);
  CHECK(directory.entries() == 1);
  file->write("def", 3);
  file->commit();
  delete file;
  CHECK(bytes_of(path) == "abcdef");
  CHECK(directory.entries() == 1);
}

TEST_CASE("ReplacementFile: a save that runs out of space leaves the old file and nothing else") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  replace(path, "old");

  // Once at the first write, once when the last of the buffered bytes go out.
  for (const int size : {400'000, 4800}) {
    const std::string large(std::size_t(size), 'x');
    rlimit old_limit{};
    REQUIRE(getrlimit(RLIMIT_FSIZE, &old_limit) == 0);
    rlimit limit = old_limit;
    limit.rlim_cur = 4096;
    auto* const old_handler = std::signal(SIGXFSZ, SIG_IGN);
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const std::string message = message_of([&] { replace(path, large); });
    const std::string elsewhere = message_of([&] { replace(directory / "new", large); });
    setrlimit(RLIMIT_FSIZE, &old_limit);
    std::signal(SIGXFSZ, old_handler);
    CHECK(contains(message, path.string() + ": cannot be written: "));
    CHECK(contains(elsewhere, "cannot be written"));
    CHECK(bytes_of(path) == "old");
    CHECK(directory.entries() == 1);
  }
}

TEST_CASE("ReplacementFile: keeps the permissions of the file it replaces") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "file";
  const mode_t old_mask = umask(027);
  replace(path, "");
  CHECK(fs::status(path).permissions() == fs::perms{0640});
  for (const unsigned mode : {0600U, 0666U, 0444U, 0755U}) {
    fs::permissions(path, fs::perms{mode});
    replace(path, "");
    CHECK(fs::status(path).permissions() == fs::perms{mode});
  }
  umask(old_mask);
}

TEST_CASE("ReplacementFile: follows symbolic links and keeps them") {
  const TemporaryDirectory directory;
  fs::create_directory(directory / "data");
  write_bytes(directory / "data/old", "old");
  fs::create_symlink("data/old", directory / "latest");
  fs::create_symlink(directory / "latest", directory / "chain");
  fs::create_symlink("data/new", directory / "dangling");
  fs::create_symlink("loop", directory / "loop");
  replace(directory / "chain", "one");
  replace(directory / "dangling", "two");
  CHECK(contains(message_of([&] { replace(directory / "loop", ""); }), "too many symbolic links"));
  for (const std::string link : {"latest", "chain", "dangling", "loop"}) {
    CHECK(fs::is_symlink(directory / link));
  }
  CHECK(bytes_of(directory / "data/old") == "one");
  CHECK(bytes_of(directory / "data/new") == "two");
  CHECK(directory.entries() == 5);
}

TEST_CASE("ReplacementFile: a pipe or a device is neither replaced nor written") {
  const TemporaryDirectory directory;
  REQUIRE(mkfifo((directory / "pipe").c_str(), 0600) == 0);
  fs::create_symlink("/dev/null", directory / "null");
  for (const std::string name : {"pipe", "null"}) {
    CHECK(contains(message_of([&] { replace(directory / name, ""); }), "is not a regular file"));
  }
  CHECK(fs::is_fifo(directory / "pipe"));
  CHECK(directory.entries() == 2);
}

TEST_CASE("ReplacementFile: a name may be as long as the file system takes") {
  const TemporaryDirectory directory;
  const fs::path path = directory / std::string(255, 'n');
  replace(path, "");
  CHECK(fs::is_regular_file(path));
}

#endif

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <io/files.hpp>
#include <moxie/io/native_file.hpp>
#include <string>
#include <temporary_folder.hpp>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

using moxie::detail::NativeFile;

TEST_CASE("NativeFile: reads any bytes of the open file, and says where it ends too early") {
  const moxie::test::TemporaryFolder directory;
  moxie::test::write_bytes(directory / "file", "0123456789");
  NativeFile file;
  CHECK(file.open(directory / "none") == ENOENT);
  CHECK_FALSE(file.is_open());
  REQUIRE(file.open(directory / "file") == 0);
  CHECK(file.size() == 10);
  std::array<char, 4> four{};
  CHECK(file.read_at(6, four.data(), 4) == 0);
  CHECK(std::string(four.data(), 4) == "6789");
  CHECK(file.read_at(2, four.data(), 4) == 0);
  CHECK(std::string(four.data(), 4) == "2345");
  CHECK(file.read_at(7, four.data(), 4) == moxie::detail::file_too_short);
  CHECK(file.read_at(7, four.data(), 3) == 0);
  CHECK(file.read_at(20, four.data(), 0) == 0);

  NativeFile moved(std::move(file));
  CHECK(moved.read_at(0, four.data(), 4) == 0);
  CHECK(std::string(four.data(), 4) == "0123");
  CHECK(file.read_at(0, four.data(), 4) == EBADF);
}

TEST_CASE("NativeFile: creates a file that was not there, and no other") {
  const moxie::test::TemporaryFolder directory;
  NativeFile file;
  REQUIRE(file.create(directory / "file", directory / "none") == 0);
  CHECK(file.write_at(0, "abc", 3) == 0);
  CHECK(file.write_at(3, "de", 2) == 0);
  CHECK(file.sync() == 0);
  CHECK(file.close() == 0);
  CHECK(file.close() == 0);
  CHECK(moxie::test::bytes_of(directory / "file") == "abcde");
  NativeFile second;
  CHECK(second.create(directory / "file", directory / "none") == EEXIST);
  CHECK(moxie::test::bytes_of(directory / "file") == "abcde");
}

#if defined(__unix__) || defined(__APPLE__)

TEST_CASE("NativeFile: neither reads nor writes move the offset that forked processes share") {
  const moxie::test::TemporaryFolder directory;
  const int lowest_free = ::dup(0);  // what the next file opened gets
  REQUIRE(lowest_free >= 0);
  ::close(lowest_free);
  NativeFile file;
  REQUIRE(file.create(directory / "file", directory / "none") == 0);
  CHECK(file.write_at(0, "0123456789", 10) == 0);
  CHECK(::lseek(lowest_free, 0, SEEK_CUR) == 0);
  CHECK(file.close() == 0);
  REQUIRE(file.open(directory / "file") == 0);
  std::array<char, 4> four{};
  CHECK(file.read_at(2, four.data(), 4) == 0);
  CHECK(std::string(four.data(), 4) == "2345");
  CHECK(::lseek(lowest_free, 0, SEEK_CUR) == 0);
}

#endif

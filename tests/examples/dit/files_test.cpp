// SPDX-License-Identifier: MIT
#include "dit/files.hpp"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <fstream>
#include <functional>
#include <string>
#include <temporary_folder.hpp>

namespace {

std::string complaint(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("read_file: all bytes of a regular file, through a link too") {
  const moxie::test::TemporaryFolder folder;
  std::string bytes;
  for (int i = 0; i < 200000; ++i) {
    bytes += char(i * 31);
  }
  std::ofstream(folder / "file", std::ios::binary) << bytes;
  std::filesystem::create_symlink("file", folder / "link");
  CHECK(dit::read_file(folder / "file") == bytes);
  CHECK(dit::read_file(folder / "link") == bytes);
  std::ofstream(folder / "empty");
  CHECK(dit::read_file(folder / "empty").empty());
}

TEST_CASE("read_file: no file is nothing, or an error that names it") {
  const moxie::test::TemporaryFolder folder;
  CHECK(!dit::read_file_if_there(folder / "absent"));
  CHECK(contains(complaint([&] { dit::read_file(folder / "absent"); }), "absent: cannot be read"));
  std::filesystem::create_symlink("loop", folder / "loop");
  CHECK(contains(complaint([&] { dit::read_file_if_there(folder / "loop"); }), "loop: cannot be read"));
}

TEST_CASE("read_file: a pipe, a folder and a device are refused at once") {
  const moxie::test::TemporaryFolder folder;
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  for (const std::filesystem::path& path : {folder / "pipe", folder.path, std::filesystem::path("/dev/zero")}) {
    CAPTURE(path);
    CHECK(contains(complaint([&] { dit::read_file_if_there(path); }), "is not a regular file"));
  }
}

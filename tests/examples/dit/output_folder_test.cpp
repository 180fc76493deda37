// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/output_folder.hpp>
#include <fstream>
#include <optional>
#include <temporary_folder.hpp>

using dit::OutputFolder;
namespace fs = std::filesystem;

TEST_CASE("OutputFolder: is made, and goes again with nothing in it; another one stays") {
  const moxie::test::TemporaryFolder parent;
  {
    const OutputFolder folder(parent / "a" / "b");
    CHECK(fs::is_directory(parent / "a" / "b"));
  }
  CHECK_FALSE(fs::exists(parent / "a" / "b"));
  {
    const OutputFolder folder(parent / "c");
    std::ofstream(folder("file")) << "kept";
  }
  CHECK(fs::exists(parent / "c" / "file"));
  fs::create_directory(parent / "d");
  { const OutputFolder folder(parent / "d"); }
  CHECK(fs::is_directory(parent / "d"));
}

TEST_CASE("OutputFolder: one run at a time; what a killed one has left is removed") {
  const moxie::test::TemporaryFolder parent;
  std::ofstream(parent / ".moxie-0123.tmp") << "half a checkpoint";
  moxie::ReplacementFile being_written(parent / "file");  // by a command that does not take the folder
  std::optional<OutputFolder> first(parent.path);
  CHECK_FALSE(fs::exists(parent / ".moxie-0123.tmp"));
  CHECK_THROWS_WITH_AS(OutputFolder second(parent.path), doctest::Contains("another run"), std::runtime_error);
  first.reset();
  CHECK_NOTHROW(OutputFolder second(parent.path));
  being_written.commit();
  CHECK(fs::exists(parent / "file"));
}

TEST_CASE("OutputFolder: a file that cannot be written is found out before") {
  const moxie::test::TemporaryFolder parent;
  const OutputFolder folder(parent.path);
  CHECK_NOTHROW(folder.expect_room_for("file", 1000));
  CHECK(fs::is_empty(parent.path));
  CHECK_THROWS_WITH_AS(folder.expect_room_for("file", std::uintmax_t{1} << 62U), doctest::Contains("no room"),
                       std::runtime_error);
  fs::create_directory(parent / "file");
  CHECK_THROWS_WITH_AS(folder.expect_room_for("file", 0), doctest::Contains("cannot be written"), std::runtime_error);
}

TEST_CASE("expect_another_file: by any name") {
  const moxie::test::TemporaryFolder folder;
  std::ofstream(folder / "a") << "a";
  fs::create_symlink("a", folder / "b");
  CHECK_THROWS_AS(dit::expect_another_file(folder / "a", folder / "b"), std::runtime_error);
  CHECK_NOTHROW(dit::expect_another_file(folder / "a", folder / "c"));
}

// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>
#include <stdlib.h>

#include <cstddef>
#include <cstdlib>
#include <dit/files.hpp>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <moxie/core/matrix.hpp>
#include <stdexcept>
#include <string>
#include <temporary_folder.hpp>
#include <utility>

/// What the tests of pictures share.
namespace dit::test {

namespace fs = std::filesystem;
using moxie::Index;

/// A fresh directory that goes away with its contents. Its name has what shells stumble over.
struct TemporaryDirectory {
  moxie::test::TemporaryFolder root;
  fs::path path = root / "it's $HOME; {a} \"b\" \\c";
  TemporaryDirectory() { fs::create_directory(path); }
};

/// Another PATH for a while.
struct ChangedPath {
  std::string old;
  explicit ChangedPath(const std::string& value) : old(std::getenv("PATH") == nullptr ? "" : std::getenv("PATH")) {
    setenv("PATH", value.c_str(), 1);
  }
  ChangedPath(const ChangedPath&) = delete;
  ChangedPath& operator=(const ChangedPath&) = delete;
  ~ChangedPath() { setenv("PATH", old.c_str(), 1); }
};

inline bool gnuplot_is_missing() {
  if (std::system("gnuplot --version >/dev/null 2>&1") == 0) {
    return false;
  }
  MESSAGE("skipped: gnuplot is not installed");
  return true;
}

inline std::string file_bytes(const fs::path& path) { return dit::read_file(path); }

/// Width and height from the header of a PNG file.
inline std::pair<int, int> png_size(const fs::path& path) {
  const std::string bytes = file_bytes(path);
  REQUIRE(bytes.size() > 33);
  REQUIRE(bytes.substr(0, 8) == "\x89PNG\r\n\x1A\n");
  REQUIRE(bytes.substr(12, 4) == "IHDR");
  const auto number = [&](std::size_t at) {
    int n = 0;
    for (std::size_t i = at; i < at + 4; ++i) {
      n = n << 8 | static_cast<unsigned char>(bytes[i]);
    }
    return n;
  };
  return {number(16), number(20)};
}

inline std::size_t files_in(const fs::path& directory) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(directory), fs::directory_iterator()));
}

/// What `draw` complains about, or "".
template <class Draw>
std::string complaint(Draw&& draw) {
  try {
    draw();
    return "";
  } catch (const std::runtime_error& e) {
    return e.what();
  }
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

inline moxie::Matrix<double> equal_shares(Index layers, Index experts) {
  return moxie::Matrix<double>::Constant(layers, experts, 1.0 / double(experts));
}

/// The script that `draw` gives to gnuplot, which does not run.
template <class Draw>
std::string script_of(Draw&& draw) {
  const TemporaryDirectory dir;
  {
    std::ofstream(dir.root / "gnuplot") << "#!/bin/sh\n/bin/cat >'" << (dir.root / "script").string() << "'\nexit 1\n";
    fs::permissions(dir.root / "gnuplot", fs::perms::owner_all);
    const ChangedPath changed(dir.root.path.string());
    CHECK(contains(complaint([&] { draw(dir.path / "picture.png"); }), "gnuplot failed"));
  }
  return file_bytes(dir.root / "script");
}

}  // namespace dit::test

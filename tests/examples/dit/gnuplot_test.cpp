// SPDX-License-Identifier: MIT
#include "dit/gnuplot.hpp"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <examples/dit/comma_locale.hpp>
#include <examples/dit/picture_checks.hpp>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

using namespace dit::test;

namespace {

dit::detail::Script script() {
  dit::detail::Script script(1900, 540);
  script.place_axes(1, 2, 1234.5, 6);
  script.title("it's", 24);
  script.colorbox(1500, 0.25, 12, 200);
  dit::detail::add_tic(script, true, "tic", 1234567.5);
  script << "\nplot 0\n";
  return script;
}

void draw(const fs::path& path) {
  dit::detail::Script drawn(900, 540);
  drawn << "plot 0\n";
  drawn.draw(path);
}

}  // namespace

TEST_CASE("Script: numbers have a point and no groups, whatever the locale is") {
  const std::string expected = script().text();
  CHECK(contains(expected, "size 1900,540"));
  CHECK(contains(expected, "'tic' 1234567.5"));
  CHECK(contains(expected, "set rmargin at screen 0.6502631579"));
  const CommaLocale comma;
  CHECK(script().text() == expected);
}

TEST_CASE("Script: when gnuplot is missing or fails, the error says so and the old picture stays") {
  const TemporaryDirectory dir;
  const fs::path path = dir.path / "loss.png";
  std::ofstream(path) << "the old picture";
  const fs::path bin = dir.root / "bin";
  fs::create_directory(bin);
  const auto failure = [&] { return complaint([&] { draw(path); }); };
  const auto stand_in = [&](const std::string& text) {
    std::ofstream(bin / "gnuplot") << "#!/bin/sh\n" << text;
    fs::permissions(bin / "gnuplot", fs::perms::owner_all);
  };
  const ChangedPath changed(bin.string());

  std::string message = failure();
  CAPTURE(message);
  CHECK(contains(message, "gnuplot was not found"));
  CHECK(contains(message, path.string()));

  stand_in("echo 'line 7: no such terminal' >&2\nexit 1\n");
  message = failure();
  CHECK(contains(message, "gnuplot failed: line 7: no such terminal"));

  stand_in("printf '\\211PNG\\r\\n\\032\\n and the disk is full'\nexit 0\n");
  message = failure();
  CHECK(contains(message, "gnuplot failed"));

  stand_in("kill -9 $$\n");
  message = failure();
  CHECK(contains(message, "gnuplot failed"));

  CHECK(file_bytes(path) == "the old picture");
  CHECK(files_in(dir.path) == 1);
}

TEST_CASE("Script: nothing has a name while gnuplot draws, so nothing is left where both are killed") {
  const TemporaryDirectory dir;
  const ChangedPath changed(dir.root.path.string());
  std::ofstream(dir.root / "gnuplot") << "#!/bin/sh\n/bin/ls -A '" << (dir.root / "pictures").string() << "' >'"
                                      << (dir.root / "seen").string() << "'\nexit 1\n";
  fs::permissions(dir.root / "gnuplot", fs::perms::owner_all);
  fs::create_directory(dir.root / "pictures");
  CHECK(contains(complaint([&] { draw(dir.root / "pictures" / "a.png"); }), "gnuplot failed"));
  CHECK(file_bytes(dir.root / "seen").empty());
  CHECK(files_in(dir.root / "pictures") == 0);
}

TEST_CASE("Script: a directory that does not exist is an error, and so is what is no regular file") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  CHECK(contains(complaint([&] { draw(dir.path / "absent" / "loss.png"); }), "cannot be written"));
  const fs::path pipe = dir.path / "pipe.png";
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(contains(complaint([&] { draw(pipe); }), "not a regular file"));
  CHECK(fs::is_fifo(pipe));
}

TEST_CASE("Script: a new picture replaces the old one") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  const fs::path path = dir.path / "loss.png";
  std::ofstream(path) << "the old picture";
  draw(path);
  CHECK(png_size(path) == std::pair{900, 540});
  CHECK(files_in(dir.path) == 1);
}

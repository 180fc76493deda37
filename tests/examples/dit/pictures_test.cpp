// SPDX-License-Identifier: MIT
#include "dit/pictures.hpp"

#include <doctest/doctest.h>
#include <stdlib.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <moxie/core/random.hpp>
#include <stdexcept>
#include <string>
#include <temporary_folder.hpp>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using dit::Index;

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

bool gnuplot_is_missing() {
  if (std::system("gnuplot --version >/dev/null 2>&1") == 0) {
    return false;
  }
  MESSAGE("skipped: gnuplot is not installed");
  return true;
}

std::string file_bytes(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// Width and height from the header of a PNG file.
std::pair<int, int> png_size(const fs::path& path) {
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

std::size_t files_in(const fs::path& directory) {
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

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

moxie::Matrix<double> equal_shares(Index layers, Index experts) {
  return moxie::Matrix<double>::Constant(layers, experts, 1.0 / double(experts));
}

const dit::Series loss{"loss", {0, 1, 2, 3}, {1.0, 0.5, 0.3, 0.25}};

}  // namespace

TEST_CASE("draw_samples: a picture with room for every image, gray and in colour") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  for (const Index channels : {1, 3}) {
    for (const int classes : {1, 2, 10}) {
      CAPTURE(channels);
      CAPTURE(classes);
      moxie::Matrix<float> images(2 * classes, channels * 28 * 28);
      moxie::Rng{1}.fill_uniform(moxie::RowView<float>(images), -1.2, 1.2);
      images(0, 0) = std::numeric_limits<float>::quiet_NaN();
      images(0, 1) = std::numeric_limits<float>::infinity();
      std::vector<std::int64_t> labels;
      std::vector<std::string> names;
      for (int i = 0; i < 2 * classes; ++i) {
        labels.push_back(i % classes);
        names.emplace_back(i == 0 ? "it's {a}_b^c \\n" : "Kätzchen");
      }
      names.resize(static_cast<std::size_t>(classes));
      const fs::path path = dir.path / "samples.png";
      dit::draw_samples(path, images, labels, names, channels, 28, 28, 3, "A 'title' of {two}_^\nlines");
      const auto [width, height] = png_size(path);
      CHECK(width >= 3 * (3 * 29 + 1));
      CHECK(width < 3 * (3 * 29 + 1) + 300);
      CHECK(height >= 3 * (classes * 29 + 1));
      CHECK(height < 3 * (classes * 29 + 1) + 100);
      CHECK(files_in(dir.path) == 1);
    }
  }
}

TEST_CASE("draw_samples: refuses images and labels that do not fit") {
  const moxie::Matrix<float> images = moxie::Matrix<float>::Zero(2, 12);
  const std::vector<std::int64_t> labels = {0, 1};
  const std::vector<std::string> names = {"a", "b"};
  const fs::path path = "never-written.png";
  CHECK_THROWS_AS(dit::draw_samples(path, images, labels, names, 1, 2, 5), moxie::ShapeError);
  CHECK_THROWS_AS(dit::draw_samples(path, images, std::vector<std::int64_t>{0}, names, 3, 2, 2), moxie::ShapeError);
  CHECK_THROWS_AS(dit::draw_samples(path, images, std::vector<std::int64_t>{0, 2}, names, 3, 2, 2), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_samples(path, images, std::vector<std::int64_t>{0, -1}, names, 3, 2, 2), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_samples(path, images, labels, names, 2, 2, 3), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_samples(path, images, labels, names, 3, 2, 2, 0), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_samples(path, images, labels, {}, 3, 2, 2), moxie::ValueError);
  CHECK(!fs::exists(path));
}

TEST_CASE("draw_curve: draws any number of points, several scales, and gaps") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  const fs::path path = dir.path / "loss.png";
  std::vector<std::vector<dit::Series>> cases = {
      {loss},
      {{"one point", {3}, {5}}},
      {{"zeros", {1, 2}, {0, 0}}},
      {{"negative", {1, 2}, {-1, -5}}},
      {{"gap", {1, 2, 3, 4}, {1, NAN, INFINITY, 2}}},
      {{"tiny", {1, 2, 3}, {1e-12, 1e-6, 1e-3}}},
      {loss, {"no points", {}, {}}},
      {loss, {"balance", {0, 1}, {0.01, 0.02}}},
  };
  dit::Series longer{"it's {a}_b^c", {}, {}};
  for (int i = 0; i < 5000; ++i) {
    longer.x.push_back(i);
    longer.y.push_back(std::exp(-i / 500.0) + moxie::Rng{1}.uniform(static_cast<std::uint64_t>(i)));
  }
  cases.push_back({longer});
  for (const auto& series : cases) {
    CAPTURE(series.back().name);
    dit::draw_curve(path, "Training", "step", series);
    CHECK(png_size(path) == std::pair{900, 540});
    CHECK(files_in(dir.path) == 1);
    fs::remove(path);
  }
}

TEST_CASE("draw_curve: refuses what it cannot draw") {
  CHECK_THROWS_AS(dit::draw_curve("never-written.png", "", "", {{"a", {1, 2}, {1}}}), moxie::ShapeError);
  CHECK_THROWS_AS(dit::draw_curve("never-written.png", "", "", {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_curve("never-written.png", "", "", {{"a", {1, 2}, {NAN, INFINITY}}}), moxie::ValueError);
  CHECK(!fs::exists("never-written.png"));
}

TEST_CASE("smoothed: keeps a constant and the first value, and is not moved by an outlier") {
  std::vector<double> y(400, 2.0);
  CHECK(dit::detail::smoothed(y) == y);
  CHECK(dit::detail::smoothed({}).empty());
  y[0] = 9.0;
  y[200] = 1000.0;
  y[300] = NAN;
  const std::vector<double> s = dit::detail::smoothed(y);
  CHECK(s[0] == 9.0);
  CHECK(s[199] == 2.0);
  CHECK(s[200] == 2.0);
  CHECK(s[299] == 2.0);
  CHECK(std::isnan(s[300]));

  for (std::size_t i = 0; i < 400; ++i) {
    y[i] = double(i);
  }
  CHECK(dit::detail::smoothed(y)[100] == doctest::Approx(100.0));
}

TEST_CASE("draw_expert_load: every cell has room for its number, from 1 x 1 to 30 x 64") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  const fs::path path = dir.path / "load.png";
  for (const auto& size : {std::pair{1, 1}, {2, 2}, {6, 8}, {30, 2}, {2, 64}, {30, 64}}) {
    const int layers = size.first;
    const int experts = size.second;
    CAPTURE(layers);
    CAPTURE(experts);
    dit::draw_expert_load(path, equal_shares(layers, experts), "Expert load");
    const auto [width, height] = png_size(path);
    CHECK(width >= 36 * experts + 100);
    CHECK(height >= 22 * layers + 80);
    CHECK(files_in(dir.path) == 1);
  }
  moxie::Matrix<double> unequal = moxie::Matrix<double>::Zero(3, 4);
  unequal.col(2).setOnes();
  dit::draw_expert_load(path, unequal);
}

TEST_CASE("draw_expert_load: refuses shares that are none") {
  moxie::Matrix<double> shares = equal_shares(2, 4);
  CHECK_THROWS_AS(dit::draw_expert_load("never-written.png", shares.topRows(0)), moxie::ValueError);
  for (const double wrong : {-0.1, 1.5, double(NAN)}) {
    shares(1, 2) = wrong;
    CHECK_THROWS_AS(dit::draw_expert_load("never-written.png", shares), moxie::ValueError);
  }
  CHECK(!fs::exists("never-written.png"));
}

TEST_CASE("draw_heat_maps: a canvas that fits its maps, and stays below 4000 pixels while a number has one") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  const fs::path path = dir.path / "maps.png";
  const auto size_of = [&](std::size_t maps, Index rows, Index cols, const std::string& title, const dit::HeatMapAxes& axes) {
    dit::draw_heat_maps(path, "Maps", std::vector<dit::HeatMap>(maps, {title, equal_shares(rows, cols)}), axes);
    CHECK(files_in(dir.path) == 1);
    return png_size(path);
  };
  // Around the wall: 30 and the width of the names to the left, 90 to the right; 62 above maps with titles, 44 above others,
  // and 50 below. Between maps: 8 beside each other, 8 and a title of 18 above each other.
  CHECK(size_of(6, 10, 8, "layer", {"class", "expert", {}}) == std::pair{54 + 6 * 104 - 8 + 90, 62 + 120 + 50});
  CHECK(size_of(7, 10, 8, "layer", {"class", "expert", {}}) == std::pair{54 + 6 * 104 - 8 + 90, 62 + 2 * 146 - 26 + 50});
  CHECK(size_of(6, 10, 8, "", {"layer", "expert", {}, 2}) == std::pair{54 + 2 * 104 - 8 + 90, 44 + 3 * 128 - 8 + 50});
  const std::vector<std::string> names(10, "twelve signs");
  CHECK(size_of(6, 10, 8, "layer", {"class", "expert", names}).first == 30 + 84 + 6 * 104 - 8 + 90);
  // 28 layers of 1000 classes: not below each other.
  CHECK(size_of(28, 1000, 16, "layer", {"class", "expert", {}}) == std::pair{54 + 14 * 188 - 8 + 90, 62 + 2 * 1026 - 26 + 50});
  // 40 layers, 64 experts: smaller maps, square as the image is.
  const auto [width, height] = size_of(2560, 16, 16, "", {"layer", "expert", {}, 64, 4.5});
  CHECK(width == 54 + 64 * 59 - 8 + 90);
  CHECK(height == 44 + 40 * 59 - 8 + 50);
  // The small ones have room for the scale, and for their texts.
  for (const Index n : {1, 2}) {
    const auto [small_width, small_height] = size_of(1, n, n, "", {"a name that is long", "columns", {}});
    CHECK(small_width >= 180);
    CHECK(small_height >= 44 + 8 * 19);
  }
}

TEST_CASE("draw_heat_maps: a single row or column is drawn, and NaN is not 0") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  for (const auto& size : {std::pair{1, 1}, {1, 3}, {3, 1}, {3, 3}}) {
    CAPTURE(size.first);
    CAPTURE(size.second);
    const moxie::Matrix<double> ones = moxie::Matrix<double>::Ones(size.first, size.second);
    const auto picture_of = [&](double first) {
      moxie::Matrix<double> shares = ones;
      shares(0, 0) = first;
      // The second map keeps the scale at 100 %.
      dit::draw_heat_maps(dir.path / "map.png", "Map", {{"layer 0", shares}, {"layer 1", ones}}, {"class", "expert", {}});
      return file_bytes(dir.path / "map.png");
    };
    const std::vector<std::string> pictures = {picture_of(1), picture_of(0.5), picture_of(0), picture_of(NAN)};
    CHECK(picture_of(1) == pictures[0]);
    for (std::size_t i = 0; i < pictures.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        CHECK(pictures[i] != pictures[j]);
      }
    }
  }
}

TEST_CASE("draw_heat_maps: refuses maps and names that do not fit, and draws nothing") {
  const fs::path path = "never-written.png";
  using Maps = std::vector<dit::HeatMap>;
  const dit::HeatMap good{"", equal_shares(2, 3)};
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "", Maps{}, {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "", Maps{{"", moxie::Matrix<double>(0, 3)}}, {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "", Maps{{"", moxie::Matrix<double>(2, 0)}}, {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "", Maps{good, {"", equal_shares(3, 2)}}, {}), moxie::ShapeError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "", Maps{good}, {"rows", "columns", {"one"}}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "", Maps{good}, {"rows", "columns", {}, -1}), moxie::ValueError);
  for (const double wrong : {-0.1, 1.5, std::numeric_limits<double>::infinity()}) {
    dit::HeatMap bad = good;
    bad.shares(1, 2) = wrong;
    CHECK_THROWS_AS(dit::draw_heat_maps(path, "", Maps{good, bad}, {}), moxie::ValueError);
  }
  CHECK(!fs::exists(path));
}

TEST_CASE("tic_step: every line while there is room, then every second, fifth, ...") {
  CHECK(dit::detail::tic_step(10, 120, 11) == 1);
  CHECK(dit::detail::tic_step(10, 110, 11) == 1);
  CHECK(dit::detail::tic_step(10, 109, 11) == 2);
  CHECK(dit::detail::tic_step(50, 180, 11) == 5);
  CHECK(dit::detail::tic_step(1000, 1000, 11) == 20);
  CHECK(dit::detail::tic_step(1, 36, 11) == 1);
}

TEST_CASE("pictures: when gnuplot is missing or fails, the error says so and the old picture stays") {
  const TemporaryDirectory dir;
  const fs::path path = dir.path / "loss.png";
  std::ofstream(path) << "the old picture";
  const fs::path bin = dir.root / "bin";
  fs::create_directory(bin);
  const auto failure = [&] { return complaint([&] { dit::draw_curve(path, "Training", "step", {loss}); }); };
  const auto stand_in = [&](const std::string& script) {
    std::ofstream(bin / "gnuplot") << "#!/bin/sh\n" << script;
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
  message = complaint([&] { dit::draw_heat_maps(path, "Maps", {{"", equal_shares(2, 3)}}, {}); });
  CHECK(contains(message, "gnuplot failed"));

  CHECK(file_bytes(path) == "the old picture");
  CHECK(files_in(dir.path) == 1);
}

TEST_CASE("pictures: a directory that does not exist is an error, not a silence") {
  const TemporaryDirectory dir;
  const std::string message = complaint([&] { dit::draw_curve(dir.path / "absent" / "loss.png", "Training", "step", {loss}); });
  CHECK(contains(message, "cannot write"));
}

TEST_CASE("pictures: a new picture replaces the old one") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  const fs::path path = dir.path / "loss.png";
  std::ofstream(path) << "the old picture";
  dit::draw_curve(path, "Training", "step", {loss});
  CHECK(png_size(path) == std::pair{900, 540});
}

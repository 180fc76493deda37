// SPDX-License-Identifier: MIT
#include "dit/heat_maps.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <examples/dit/comma_locale.hpp>
#include <examples/dit/picture_checks.hpp>
#include <filesystem>
#include <limits>
#include <string>
#include <utility>
#include <vector>

using namespace dit::test;
using dit::Index;

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

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
  for (const double wrong : {-0.1, 1.5, double(not_a_number)}) {
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
    const std::vector<std::string> pictures = {picture_of(1), picture_of(0.5), picture_of(0), picture_of(not_a_number)};
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

TEST_CASE("draw_heat_maps: a name of 20,000 letters is cut") {
  const std::string script = script_of([](const fs::path& path) {
    dit::draw_heat_maps(path, "Maps", {{"layer", equal_shares(1, 3)}}, {"class", "expert", {std::string(20000, 'x')}});
  });
  CHECK(contains(script, "'" + std::string(40, 'x') + "…' "));
  CHECK(script.size() < 5000);
}

TEST_CASE("draw_expert_load, draw_heat_maps: numbers have a point and no groups, whatever the locale is") {
  const auto load = [](const fs::path& path) { dit::draw_expert_load(path, equal_shares(2, 1500)); };
  const auto maps = [](const fs::path& path) {
    dit::draw_heat_maps(path, "Maps", std::vector<dit::HeatMap>(3, {"", equal_shares(1500, 3)}), {"class", "expert", {}});
  };
  const std::pair expected{script_of(load), script_of(maps)};
  CHECK(contains(expected.first, "set cbtics 0.066667"));
  CHECK(contains(expected.first, "\n1499 1 0.1 0x"));
  const CommaLocale comma;
  CHECK(script_of(load) == expected.first);
  CHECK(script_of(maps) == expected.second);
}

TEST_CASE("tic_step: every line while there is room, then every second, fifth, ...") {
  CHECK(dit::detail::tic_step(10, 120, 11) == 1);
  CHECK(dit::detail::tic_step(10, 110, 11) == 1);
  CHECK(dit::detail::tic_step(10, 109, 11) == 2);
  CHECK(dit::detail::tic_step(50, 180, 11) == 5);
  CHECK(dit::detail::tic_step(1000, 1000, 11) == 20);
  CHECK(dit::detail::tic_step(1, 36, 11) == 1);
}

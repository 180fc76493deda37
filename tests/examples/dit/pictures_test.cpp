// SPDX-License-Identifier: MIT
#include "dit/pictures.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <examples/dit/comma_locale.hpp>
#include <examples/dit/picture_checks.hpp>
#include <filesystem>
#include <limits>
#include <moxie/core/random.hpp>
#include <string>
#include <utility>
#include <vector>

using namespace dit::test;
using dit::Index;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double infinite = std::numeric_limits<double>::infinity();

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

TEST_CASE("draw_samples: a name of 20,000 letters is cut, and the picture drawn") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryDirectory dir;
  const moxie::Matrix<float> images = moxie::Matrix<float>::Zero(2, 28 * 28);
  dit::draw_samples(dir.path / "samples.png", images, std::vector<std::int64_t>{0, 1}, {std::string(20000, 'x'), "\xFF\x1B[2J"},
                    1, 28, 28, 1);
  const auto [width, height] = png_size(dir.path / "samples.png");
  CHECK(width == 24 + 9 * 41 + 3 * 30 + 16);
  CHECK(height == 44 + 3 * 59 + 16);
}

TEST_CASE("draw_samples, draw_curve: numbers have a point and no groups, whatever the locale is") {
  moxie::Matrix<float> images(2, 30 * 40);
  moxie::Rng{1}.fill_uniform(moxie::RowView<float>(images), -1, 1);
  const std::vector<std::int64_t> labels(2, 0);
  const auto samples = [&](const fs::path& path) { dit::draw_samples(path, images, labels, {"class"}, 1, 30, 40, 2); };
  dit::Series steep{"loss", {}, {}};
  for (int i = 0; i < 2000; ++i) {
    steep.x.push_back(i);
    steep.y.push_back(2500 * std::exp(-i / 100.0));
  }
  const auto curve = [&](const fs::path& path) { dit::draw_curve(path, "Training", "step", {steep}); };
  const std::pair expected{script_of(samples), script_of(curve)};
  CHECK(contains(expected.second, "'2000' 2000, '5000' 5000"));
  CHECK(contains(expected.second, "\n1999 "));
  const CommaLocale comma;
  CHECK(script_of(samples) == expected.first);
  CHECK(script_of(curve) == expected.second);
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
      {{"gap", {1, 2, 3, 4}, {1, not_a_number, infinite, 2}}},
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
  CHECK_THROWS_AS(dit::draw_curve("never-written.png", "", "", {{"a", {1, 2}, {not_a_number, infinite}}}), moxie::ValueError);
  CHECK(!fs::exists("never-written.png"));
}

TEST_CASE("smoothed: keeps a constant and the first value, and is not moved by an outlier") {
  std::vector<double> y(400, 2.0);
  CHECK(dit::detail::smoothed(y) == y);
  CHECK(dit::detail::smoothed({}).empty());
  y[0] = 9.0;
  y[200] = 1000.0;
  y[300] = not_a_number;
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

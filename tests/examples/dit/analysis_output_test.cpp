// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <dit/analysis_output.hpp>
#include <dit/files.hpp>
#include <examples/dit/comma_locale.hpp>
#include <fstream>
#include <sstream>
#include <temporary_folder.hpp>

using dit::Index;
using dit::Matrix;
using dit::RoutingCounts;
namespace fs = std::filesystem;

namespace {

using moxie::test::TemporaryFolder;

// One image of 4 tokens in each of 2 classes and 2 bins: in layer 0 the position chooses the expert, in layer 1 the class, in
// layer 2 the bin.
RoutingCounts counted() {
  RoutingCounts counts({.layers = 3, .experts = 2, .classes = 2, .positions = 4, .bins = 2});
  for (Index layer = 0; layer < 3; ++layer) {
    for (Index bin = 0; bin < 2; ++bin) {
      std::array<Index, 8> expert{};
      for (Index t = 0; t < 8; ++t) {
        expert[std::size_t(t)] = layer == 0 ? t % 2 : layer == 1 ? t / 4 : bin;
      }
      const std::array<float, 8> weight{1, 1, 1, 1, 1, 1, 1, 1};
      moxie::SparsePlan<float> plan;
      plan.build(8, 2, 1, expert, weight);
      for (int i = 0; i < 500; ++i) {  // many, so that the correction for few is small
        counts.add(layer, bin, plan, std::array<Index, 2>{0, 1});
      }
    }
  }
  return counts;
}

bool gnuplot_is_missing() {
  if (std::system("gnuplot --version >/dev/null 2>&1") == 0) {
    return false;
  }
  MESSAGE("skipped: gnuplot is not installed");
  return true;
}

}  // namespace

TEST_CASE("information_by_layer: one bit of what decides, none of the rest") {
  const std::vector<dit::LayerInformation> layers = dit::information_by_layer(counted());
  REQUIRE(layers.size() == 3);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(layers[i].of_position == doctest::Approx(i == 0 ? 1 : 0).epsilon(0.01));
    CHECK(layers[i].of_class == doctest::Approx(i == 1 ? 1 : 0).epsilon(0.01));
    CHECK(layers[i].of_timestep == doctest::Approx(i == 2 ? 1 : 0).epsilon(0.01));
    CHECK(layers[i].load == doctest::Approx(1));
  }
  std::ostringstream out;
  dit::print_information(out, counted());
  CHECK(out.str().find("|     0 |   0.0000 |   0.99") != std::string::npos);
  CHECK(out.str().find("in shallow layers\":  0.99") != std::string::npos);
}

TEST_CASE("save_counts: the counts, by name and shape") {
  const TemporaryFolder folder;
  const RoutingCounts counts = counted();
  dit::save_counts(folder.path / "counts", counts);
  const moxie::SafetensorsFile file(folder.path / "counts");
  CHECK(file.info("by_class").shape == std::vector<Index>{3, 2, 2, 2});
  CHECK(file.info("by_position").shape == std::vector<Index>{3, 2, 4, 2});
  const std::vector<double> by_class = file.read<double>("by_class");
  const std::vector<double> by_position = file.read<double>("by_position");
  for (Index layer = 0; layer < 3; ++layer) {
    for (Index bin = 0; bin < 2; ++bin) {
      const Matrix<double> of_class = counts.by_class(layer, bin);
      const Matrix<double> of_position = counts.by_position(layer, bin);
      CHECK(std::equal(of_class.data(), of_class.data() + 4, by_class.begin() + 4 * (2 * layer + bin)));
      CHECK(std::equal(of_position.data(), of_position.data() + 8, by_position.begin() + 8 * (2 * layer + bin)));
    }
  }
}

TEST_CASE("write_counts_csv: a line for each count, or nothing at all") {
  const TemporaryFolder folder;
  dit::write_counts_csv(folder.path / "counts.csv", counted());
  std::ifstream in(folder.path / "counts.csv");
  std::string text((std::istreambuf_iterator<char>(in)), {});
  CHECK(std::count(text.begin(), text.end(), '\n') == 1 + 3 * 2 * (2 + 4) * 2);
  CHECK(text.starts_with("key,layer,bin,index,expert,count\nclass,0,0,0,0,1000\n"));
  CHECK(text.find("\nposition,2,1,3,1,1000\n") != std::string::npos);
  CHECK_THROWS_AS(dit::write_counts_csv(folder.path / "absent" / "counts.csv", counted()), std::runtime_error);
  CHECK(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 1);
}

TEST_CASE("write_counts_csv, print_information: numbers have a point and no groups, whatever the locale is") {
  dit::RoutingCounts counts({.layers = 1, .experts = 2, .classes = 1, .positions = 1500, .bins = 1});
  moxie::SparsePlan<float> plan;
  const std::vector<Index> experts(1500, 1);
  plan.build(1500, 2, 1, experts, std::vector<float>(1500, 0.5F));
  counts.add(0, 0, plan, std::array<Index, 1>{0});
  const moxie::test::TemporaryFolder folder;
  const auto texts = [&] {
    dit::write_counts_csv(folder.path / "counts.csv", counts);
    std::ostringstream out;
    dit::print_information(out, counts);
    return dit::read_file(folder.path / "counts.csv") + out.str();
  };
  const std::string expected = texts();
  CHECK(expected.find("\nclass,0,0,0,1,1500\n") != std::string::npos);
  CHECK(expected.find("\nposition,0,0,1499,1,1\n") != std::string::npos);
  CHECK(expected.find("of   1.0000 |") != std::string::npos);
  const dit::test::CommaLocale comma;
  CHECK(texts() == expected);
}

TEST_CASE("draw_routing: three families of heat maps, as large as their numbers need") {
  if (gnuplot_is_missing()) {
    return;
  }
  const TemporaryFolder folder;
  RoutingCounts counts = counted();
  dit::draw_routing_by_class(folder.path / "class.png", counts, {"left", "right"});
  dit::draw_routing_by_position(folder.path / "position.png", counts);
  dit::draw_routing_by_timestep(folder.path / "timestep.png", counts);
  // A model of size, nothing counted: all white, and legible.
  const RoutingCounts large({.layers = 28, .experts = 16, .classes = 1000, .positions = 256, .bins = 50});
  dit::draw_routing_by_class(folder.path / "large class.png", large, std::vector<std::string>(1000, "name"));
  dit::draw_routing_by_position(folder.path / "large position.png", large);
  dit::draw_routing_by_timestep(folder.path / "large timestep.png", large);
  CHECK(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 6);
  for (const auto& entry : fs::directory_iterator(folder.path)) {
    CHECK(dit::detail::is_whole_png(dit::read_file(entry.path())));
  }
}

TEST_CASE("draw_heat_maps: bad input is refused, and the old picture stays") {
  const TemporaryFolder folder;
  const fs::path path = folder.path / "picture.png";
  std::ofstream(path) << "old";
  const dit::HeatMap good{"", Matrix<double>::Constant(2, 3, 0.5)};
  using Maps = std::vector<dit::HeatMap>;
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "t", Maps{}, {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "t", Maps{good, {"", Matrix<double>::Constant(3, 2, 0.5)}}, {}), moxie::ShapeError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "t", Maps{{"", Matrix<double>::Constant(2, 3, 1.5)}}, {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "t", Maps{{"", Matrix<double>::Constant(2, 3, -0.1)}}, {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "t", Maps{{"", Matrix<double>(0, 3)}}, {}), moxie::ValueError);
  CHECK_THROWS_AS(dit::draw_heat_maps(path, "t", Maps{good}, {"rows", "columns", {"only one"}}), moxie::ValueError);
  CHECK(fs::file_size(path) == 3);
}

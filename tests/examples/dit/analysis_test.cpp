// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <dit/analysis.hpp>
#include <moxie/core/random.hpp>
#include <moxie/core/sequences.hpp>

using dit::RoutingCounts;
using moxie::Index;
using moxie::Matrix;

namespace {

/// Tokens 0 to 5 of two images with three positions; each token chooses one of four experts.
moxie::SparsePlan<float> plan_of(const std::array<Index, 6>& experts) {
  const std::array<float, 6> weights{1, 1, 1, 1, 1, 1};
  moxie::SparsePlan<float> plan;
  plan.build(6, 4, 1, experts, weights);
  return plan;
}

}  // namespace

TEST_CASE("mutual_information: nothing of independent tables, all of a key that decides, whatever the order") {
  const Matrix<double> independent = Eigen::VectorXd::LinSpaced(3, 100, 300) * Eigen::RowVectorXd::LinSpaced(4, 100, 400);
  CHECK(dit::mutual_information(independent) == doctest::Approx(0).epsilon(1e-9));

  const Matrix<double> decided = 1e6 * Matrix<double>::Identity(8, 8);
  const double correction = 49 / (2 * 8e6 * std::log(2.0));
  CHECK(dit::mutual_information(decided) == doctest::Approx(3 - correction).epsilon(1e-12));

  Matrix<double> any(2, 3);
  any << 100, 900, 50, 700, 20, 500;
  Matrix<double> turned(2, 3);
  turned << 500, 20, 700, 50, 900, 100;
  CHECK(dit::mutual_information(any) > 0.1);
  CHECK(dit::mutual_information(any) == doctest::Approx(dit::mutual_information(turned)).epsilon(1e-12));

  Matrix<double> wider = Matrix<double>::Zero(3, 4);  // a key and an expert that do not occur change nothing
  wider.topLeftCorner(2, 3) = any;
  CHECK(dit::mutual_information(wider) == doctest::Approx(dit::mutual_information(any)).epsilon(1e-12));
  CHECK(dit::mutual_information(Matrix<double>::Zero(2, 3)) == 0);
}

TEST_CASE("mutual_information: independent counts do not look like dependence") {
  // Half of the estimates are cut at zero, so their mean is a little above it; uncorrected ones would have 0.035 bits.
  const moxie::Rng rng(3);
  double mean = 0;
  for (std::uint64_t trial = 0; trial < 200; ++trial) {
    Matrix<double> counts = Matrix<double>::Zero(8, 8);
    for (std::uint64_t i = 0; i < 1000; ++i) {
      counts(rng.split(trial).below(8, 2 * i), rng.split(trial).below(8, 2 * i + 1)) += 1;
    }
    mean += dit::mutual_information(counts) / 200;
  }
  CHECK(mean < 0.01);
}

TEST_CASE("RoutingCounts: assignments of images that have a label, by class, position and bin") {
  RoutingCounts counts({.layers = 2, .experts = 4, .classes = 3, .positions = 3, .bins = 2});
  const std::array<Index, 6> experts{0, 1, 1, 3, 3, 1};
  counts.add(1, 0, plan_of(experts), std::array<Index, 2>{2, 0});
  counts.add(1, 1, plan_of(experts), std::array<Index, 1>{2});  // the second image is of no class

  Matrix<double> by_class(3, 4);
  by_class << 0, 1, 0, 2, 0, 0, 0, 0, 1, 2, 0, 0;
  CHECK(counts.by_class(1, 0) == by_class);
  by_class.row(0).setZero();
  CHECK(counts.by_class(1, 1) == by_class);
  Matrix<double> by_position(3, 4);
  by_position << 1, 0, 0, 1, 0, 1, 0, 1, 0, 2, 0, 0;
  CHECK(counts.by_position(1, 0) == by_position);
  Matrix<double> by_timestep(2, 4);
  by_timestep << 1, 3, 0, 2, 1, 2, 0, 0;
  CHECK(counts.by_timestep(1) == by_timestep);
  CHECK(counts.by_class(1).colwise().sum() == by_timestep.colwise().sum());
  CHECK(counts.by_position(1).colwise().sum() == by_timestep.colwise().sum());
  CHECK(counts.by_class(0).sum() == 0);
  CHECK(counts.load().row(0).sum() == 0);
  CHECK(counts.load().row(1).sum() == doctest::Approx(1));
  CHECK(counts.load()(1, 1) == doctest::Approx(5.0 / 9));
}

TEST_CASE("RoutingCounts: combine weights of soft plans") {
  moxie::DensePlan<float> plan;
  plan.resize(moxie::Sequences(2).over(4), 2, 2);  // two images of two tokens, two experts of two slots
  plan.dispatch().eigen().setConstant(0.5F);
  plan.combine().eigen() << 0.5F, 0.25F, 0.25F, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0.25F, 0.25F, 0.25F, 0.25F;
  RoutingCounts counts({.layers = 1, .experts = 2, .classes = 2, .positions = 2});
  counts.add(0, 0, plan, std::array<Index, 2>{1, 1});
  Matrix<double> by_position(2, 2);
  by_position << 1.75, 0.25, 0.5, 1.5;
  CHECK(counts.by_position(0) == by_position);
  CHECK(counts.by_class(0).row(0).sum() == 0);
  CHECK(counts.by_class(0).row(1) == by_position.colwise().sum());
}

TEST_CASE("RoutingCounts: what does not fit is refused, and not counted") {
  RoutingCounts counts({.layers = 1, .experts = 4, .classes = 3, .positions = 3});
  const auto plan = plan_of({0, 1, 1, 3, 3, 1});
  const std::array<Index, 2> labels{0, 1};
  CHECK_THROWS_AS(counts.add(1, 0, plan, labels), moxie::ValueError);
  CHECK_THROWS_AS(counts.add(0, 1, plan, labels), moxie::ValueError);
  CHECK_THROWS_AS(counts.add(0, -1, plan, labels), moxie::ValueError);
  CHECK_THROWS_AS(counts.add(0, 0, plan, std::array<Index, 2>{0, 3}), moxie::ValueError);
  CHECK(counts.by_class(0).sum() == 0);
  RoutingCounts fewer({.layers = 1, .experts = 3, .classes = 3, .positions = 3});
  CHECK_THROWS_AS(fewer.add(0, 0, plan, labels), moxie::ShapeError);
  RoutingCounts longer({.layers = 1, .experts = 4, .classes = 3, .positions = 4});
  CHECK_THROWS_AS(longer.add(0, 0, plan, labels), moxie::ShapeError);
  CHECK_THROWS_AS(RoutingCounts({.layers = 0, .experts = 4, .classes = 3, .positions = 3}), moxie::ValueError);
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <compare/distance.hpp>
#include <limits>
#include <moxie/core/random.hpp>

using compare::Exec;
using compare::frechet_distance;
using compare::Index;
using compare::Matrix;
using compare::precision_recall;
using moxie::random_normal;
using moxie::Rng;

TEST_CASE("frechet_distance: of sets whose distance is known") {
  const Matrix<float> a = random_normal<float>(400, 5, Rng(1));
  CHECK(frechet_distance(a, a) == doctest::Approx(0).epsilon(1e-9));
  // Moved by c, everything else the same: |c|².
  Eigen::RowVectorXf c(5);
  c << 1, -2, 0, 0.5F, 3;
  const Matrix<float> moved = a.rowwise() + c;
  CHECK(frechet_distance(a, moved) == doctest::Approx(double(c.squaredNorm())).epsilon(1e-5));
  CHECK(frechet_distance(moved, a) == doctest::Approx(double(c.squaredNorm())).epsilon(1e-5));
  // Scaled about the mean by s: (s - 1)² tr Σ.
  const Eigen::RowVectorXf mean = a.colwise().mean();
  const Matrix<float> scaled = ((a.rowwise() - mean) * 3).rowwise() + mean;
  const Matrix<float> centred = a.rowwise() - mean;
  const double trace = double(centred.squaredNorm()) / 399;
  CHECK(frechet_distance(a, scaled) == doctest::Approx(4 * trace).epsilon(1e-4));
  // The same after a rotation of both.
  const Matrix<float> b = random_normal<float>(300, 5, Rng(2), 2.0);
  const Eigen::MatrixXf q = Eigen::HouseholderQR<Eigen::MatrixXf>(random_normal<float>(5, 5, Rng(3))).householderQ();
  CHECK(frechet_distance(a * q, b * q) == doctest::Approx(frechet_distance(a, b)).epsilon(1e-4));
  // Whatever threads Eigen has.
  const Matrix<float> wide = random_normal<float>(500, 128, Rng(4));
  const double one = (Eigen::setNbThreads(1), frechet_distance(wide, wide.array() * 1.5F));
  CHECK((Eigen::setNbThreads(2), frechet_distance(wide, wide.array() * 1.5F)) == one);
  Eigen::setNbThreads(0);
  // Fewer images than features: the covariance has no inverse, and needs none.
  CHECK(frechet_distance(a.topRows(3), a.topRows(3)) == doctest::Approx(0).epsilon(1e-6));
}

TEST_CASE("precision_recall: near and far, and what one set leaves out") {
  const Matrix<float> a = random_normal<float>(200, 4, Rng(1));
  const Matrix<float> far = a.array() + 100.0F;
  const auto same = precision_recall(a, a, 3, Exec{2});
  CHECK(same.precision == 1);
  CHECK(same.recall == 1);
  const auto apart = precision_recall(a, far, 3, Exec{2});
  CHECK(apart.precision == 0);
  CHECK(apart.recall == 0);
  // Real images are of two kinds, drawn ones of the first alone.
  Matrix<float> both(400, 4);
  both << a, far;
  const auto half = precision_recall(both, random_normal<float>(200, 4, Rng(2)), 3, Exec{2});
  CHECK(half.precision > 0.8);
  CHECK(half.recall > 0.4);
  CHECK(half.recall <= 0.5);
  const auto swapped = precision_recall(random_normal<float>(200, 4, Rng(2)), both, 3, Exec{1});
  CHECK(swapped.precision == half.recall);
  CHECK(swapped.recall == half.precision);
}

TEST_CASE("distances: of sets that cannot be compared") {
  const Matrix<float> a = random_normal<float>(10, 4, Rng(1));
  Matrix<float> bad = a;
  bad(3, 2) = std::numeric_limits<float>::quiet_NaN();
  for (const Matrix<float>& b : {Matrix<float>(10, 3), Matrix<float>(a.topRows(1)), Matrix<float>(0, 4), bad}) {
    CHECK_THROWS_AS(frechet_distance(a, b), moxie::ValueError);
    CHECK_THROWS_AS(frechet_distance(b, a), moxie::ValueError);
    CHECK_THROWS_AS(precision_recall(a, b, 3, Exec{1}), moxie::ValueError);
  }
  CHECK_THROWS_AS(precision_recall(a, a, 0, Exec{1}), moxie::ValueError);
  CHECK_THROWS_AS(precision_recall(a, a, 10, Exec{1}), moxie::ValueError);
}

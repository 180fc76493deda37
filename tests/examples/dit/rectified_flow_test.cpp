// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/rectified_flow.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;

namespace {

// A "model" that knows the velocity of one straight path for each label: v = noise - image(label), noise taken from the start.
struct StraightModel {
  struct Tape {};
  dit::ModelConfig shape{.image_size = 2, .channels = 1, .patch = 2, .dim = 4, .depth = 1, .heads = 1, .classes = 1};
  Matrix<double> noise;
  mutable std::vector<double> times;

  const dit::ModelConfig& config() const { return shape; }
  void forward(dit::ParameterView<const double> /*p*/, const Matrix<double>& x, const std::vector<double>& t,
               const std::vector<Index>& labels, Matrix<double>& v, Tape& /*tape*/, const Exec& /*exec*/) const {
    times.push_back(t.front());
    for (Index i = 0; i < x.rows(); ++i) {
      const double image = labels[std::size_t(i)] == 0 ? 1.0 : 0.5;  // the class, and no class
      v.row(i) = noise.array() - image;
    }
  }
};

}  // namespace

TEST_CASE("sample: Euler's method follows a straight path to its end, and guidance extrapolates") {
  StraightModel model;
  model.noise.resize(1, 4);
  Rng(3).split(7).fill_normal(dit::RowView<double>(model.noise));
  StraightModel::Tape tape;
  for (const double guidance : {1.0, 2.0, 3.0}) {
    model.times.clear();
    const Matrix<double> z = dit::sample(model, dit::ParameterView<const double>(), std::vector<Index>{0}, 5, guidance, Rng(3),
                                         7, tape, Exec{1}, [](auto...) {});
    // v = v(∅) + g (v(0) - v(∅)) leads to image ∅ + g (image 0 - image ∅).
    CHECK((z.array() - (0.5 + guidance * 0.5)).abs().maxCoeff() < 1e-12);
    REQUIRE(model.times.size() == 5);
    CHECK(model.times.front() == 1.0);
    CHECK(model.times.back() == doctest::Approx(0.2));
  }
}

TEST_CASE("FlowBatch: x_t lies on the path from image to noise, and labels are dropped as often as asked") {
  const Matrix<float> data = moxie::random_normal<float>(50, 6, Rng(1));
  std::vector<std::int64_t> labels;
  for (int i = 0; i < 50; ++i) {
    labels.push_back(i % 5);
  }
  dit::FlowBatch<double> batch;
  batch.draw(data, labels, 4000, 5, 0.25, Rng(2), Exec{1});
  double dropped = 0;
  double mean = 0;
  for (Index b = 0; b < 4000; ++b) {
    const double t = batch.times[std::size_t(b)];
    REQUIRE(t > 0);
    REQUIRE(t < 1);
    mean += std::log(t / (1 - t)) / 4000;                                        // logit-normal
    const Eigen::RowVectorXd x = batch.images.row(b) - t * batch.target.row(b);  // x_t - t (z - x) = x
    Index nearest = 0;
    const double distance = (data.cast<double>().rowwise() - x).rowwise().norm().minCoeff(&nearest);
    REQUIRE(distance < 1e-6);
    const Index label = batch.labels[std::size_t(b)];
    dropped += label == 5 ? 1 : 0;
    REQUIRE((label == 5 || label == labels[std::size_t(nearest)]));
  }
  CHECK(dropped / 4000 == doctest::Approx(0.25).epsilon(0.12));
  CHECK(std::abs(mean) < 0.06);
  dit::FlowBatch<double> again;
  again.draw(data, labels, 4000, 5, 0.25, Rng(2), Exec{7});
  CHECK(again.images == batch.images);
  CHECK(again.labels == batch.labels);
}

TEST_CASE("FlowBatch: the loss is the mean square, and dv its gradient") {
  dit::FlowBatch<double> batch;
  batch.target = moxie::random_normal<double>(3, 4, Rng(1));
  Matrix<double> v = moxie::random_normal<double>(3, 4, Rng(2));
  Matrix<double> dv(3, 4), ignored(3, 4);
  const double loss = batch.loss(v, dv);
  CHECK(loss == doctest::Approx((v - batch.target).squaredNorm() / 12));
  v(1, 2) += 1e-6;
  CHECK((batch.loss(v, ignored) - loss) / 1e-6 == doctest::Approx(dv(1, 2)).epsilon(1e-5));
}

TEST_CASE("guide: the first columns of both halves become the guided prediction, the others stay") {
  Matrix<double> v(4, 3);
  v << 1, 2, 3, 4, 5, 6,  // with labels
      0, 1, 7, 2, 2, 8;   // without
  dit::guide<double>(v, 2, 3);
  Matrix<double> expected(4, 3);
  expected << 3, 4, 3, 8, 11, 6, 3, 4, 7, 8, 11, 8;
  CHECK(v == expected);
}

TEST_CASE("FlowBatch: outputs beyond the velocity have no part in the loss") {
  dit::FlowBatch<double> batch;
  batch.target = moxie::random_normal<double>(2, 3, Rng(5));
  Matrix<double> v = moxie::random_normal<double>(2, 6, Rng(6));
  Matrix<double> dv(2, 6);
  const double loss = batch.loss(v, dv);
  CHECK(loss == doctest::Approx((v.leftCols(3) - batch.target).squaredNorm() / 6));
  CHECK((dv.leftCols(3) - (v.leftCols(3) - batch.target) / 3).cwiseAbs().maxCoeff() < 1e-15);
  CHECK(dv.rightCols(3).isZero());
}

TEST_CASE("integrate: each prediction is observed with its time, and leads to an image") {
  StraightModel model;
  model.noise.resize(1, 4);
  Rng(3).fill_normal(dit::RowView<double>(model.noise));
  StraightModel::Tape tape;
  Matrix<double> z = model.noise;
  std::vector<Index> steps;
  dit::integrate(model, dit::ParameterView<const double>(), z, std::vector<Index>{0}, 4, 1.0, tape, Exec{1},
                 [&](Index i, dit::RowView<const double> at, dit::RowView<const double> v) {
                   steps.push_back(i);
                   CHECK((at.eigen() - double(i) / 4 * v.eigen()).isApproxToConstant(1.0, 1e-12));
                 });
  CHECK(steps == std::vector<Index>{4, 3, 2, 1});
  CHECK(z.isApproxToConstant(1.0, 1e-12));
}

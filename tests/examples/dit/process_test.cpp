// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/process.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
using dit::RowView;

namespace {

struct Data {
  Matrix<float> images = moxie::random_normal<float>(50, 6, Rng(1));
  std::vector<std::int64_t> labels;
  Data() {
    for (int i = 0; i < 50; ++i) {
      labels.push_back(i % 5);
    }
  }
};

const dit::Process flow = dit::RectifiedFlow{};
const dit::Process ddpm = dit::GaussianDiffusion(dit::DiffusionSchedule(dit::NoiseSchedule::linear, 100));

}  // namespace

TEST_CASE("Batch: images of the data with their labels, dropped as often as asked, for any number of threads") {
  const Data data;
  for (const dit::Process& process : {flow, ddpm}) {
    dit::Batch<double> batch;
    batch.draw(process, false, data.images, data.labels, 4000, 5, 0.25, Rng(2), Exec{1});
    double dropped = 0;
    for (Index b = 0; b < 4000; ++b) {
      Index nearest = 0;
      REQUIRE((data.images.cast<double>().rowwise() - batch.clean.row(b)).rowwise().norm().minCoeff(&nearest) == 0.0);
      const Index label = batch.labels[std::size_t(b)];
      dropped += label == 5 ? 1 : 0;
      REQUIRE((label == 5 || label == data.labels[std::size_t(nearest)]));
    }
    CHECK(std::abs(dropped / 4000 - 0.25) < 0.03);
    CHECK(std::abs(batch.noise.mean()) < 0.03);
    CHECK(std::abs(batch.noise.squaredNorm() / 24000 - 1) < 0.05);
    dit::Batch<double> again;
    again.draw(process, false, data.images, data.labels, 4000, 5, 0.25, Rng(2), Exec{7});
    CHECK(again.images == batch.images);
    CHECK(again.times == batch.times);
    CHECK(again.labels == batch.labels);
  }
}

TEST_CASE("Batch: x_t is where the process has an image at its time") {
  const Data data;
  dit::Batch<double> batch;
  batch.draw(flow, false, data.images, data.labels, 20, 5, 0, Rng(2), Exec{2});
  for (Index b = 0; b < 20; ++b) {
    const double t = batch.times[std::size_t(b)];
    CHECK((batch.images.row(b) - (1 - t) * batch.clean.row(b) - t * batch.noise.row(b)).norm() < 1e-12);
  }
  batch.draw(ddpm, false, data.images, data.labels, 20, 5, 0, Rng(2), Exec{2});
  for (Index b = 0; b < 20; ++b) {
    const auto t = std::size_t(batch.times[std::size_t(b)]);
    CHECK(double(t) == batch.times[std::size_t(b)]);
    const double a = std::get<dit::GaussianDiffusion>(ddpm).schedule().alphas_cumprod[t];
    CHECK((batch.images.row(b) - std::sqrt(a) * batch.clean.row(b) - std::sqrt(1 - a) * batch.noise.row(b)).norm() < 1e-12);
  }
}

TEST_CASE("Batch: stratified times are one in each of as many parts as there are images") {
  const Data data;
  dit::Batch<double> batch;
  for (const bool stratified : {true, false}) {
    batch.draw(dit::RectifiedFlow{false}, stratified, data.images, data.labels, 64, 5, 0, Rng(3), Exec{2});
    Index in_their_part = 0;
    for (Index b = 0; b < 64; ++b) {
      in_their_part += Index(batch.times[std::size_t(b)] * 64) == b ? 1 : 0;
    }
    CHECK((in_their_part == 64) == stratified);
    batch.draw(ddpm, stratified, data.images, data.labels, 100, 5, 0, Rng(3), Exec{2});
    Index own_step = 0;
    for (Index b = 0; b < 100; ++b) {
      own_step += batch.times[std::size_t(b)] == double(b) ? 1 : 0;
    }
    CHECK((own_step == 100) == stratified);
  }
}

TEST_CASE("Batch: the loss of parts adds up to that of the whole, and doutput is its gradient") {
  const Data data;
  for (const dit::Process& process : {flow, ddpm}) {
    dit::Batch<double> batch;
    batch.draw(process, false, data.images, data.labels, 6, 5, 0, Rng(4), Exec{1});
    Matrix<double> output = 0.3 * moxie::random_normal<double>(6, 12, Rng(5));
    Matrix<double> doutput(6, 12);
    const double whole = batch.loss(process, 0, output, doutput);
    double sum = 0;
    for (Index first = 0; first < 6; first += 2) {
      Matrix<double> part(2, 12);
      sum += batch.loss(process, first, output.middleRows(first, 2), part) / 3;
      CHECK((part / 3 - doutput.middleRows(first, 2)).norm() < 1e-12 * doutput.norm());
    }
    CHECK(sum == doctest::Approx(whole));
    CHECK(doutput.leftCols(6).norm() > 0.0);
    for (Index j = 0; j < 6; ++j) {  // of the predicted velocity or noise: the bound's own gradient for it is left out
      if (process.index() == 1) {
        continue;
      }
      output(2, j) += 1e-5;
      const double up = batch.loss(process, 0, output, {});
      output(2, j) -= 2e-5;
      const double down = batch.loss(process, 0, output, {});
      output(2, j) += 1e-5;
      CHECK(std::abs((up - down) / 2e-5 - doutput(2, j)) < 1e-8);
    }
  }
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/sampling.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
using dit::RowView;

namespace {

using View = dit::ParameterView<const double>;
const dit::ModelConfig shape{.image_size = 2, .channels = 1, .patch = 2, .dim = 4, .depth = 1, .heads = 1, .classes = 1};

// A "model" that knows the velocity of a path for each label, v = (noise - image(label)) (1 + bend (2t - 1)), noise taken from
// the start: straight, or with a velocity that is linear in time and leads to the same image.
struct PathModel {
  struct Tape {};
  Matrix<double> noise;
  double bend = 0;
  mutable std::vector<double> times;
  mutable std::vector<Index> rows;

  const dit::ModelConfig& config() const { return shape; }
  void forward(View /*p*/, const Matrix<double>& x, const std::vector<double>& t, const std::vector<Index>& labels,
               Matrix<double>& v, Tape& /*tape*/, const Exec& /*exec*/) const {
    times.push_back(t.front());
    rows.push_back(x.rows());
    for (Index i = 0; i < x.rows(); ++i) {
      const double image = labels[std::size_t(i)] == 0 ? 1.0 : 0.5;  // the class, and no class
      v.row(i) = (noise.array() - image) * (1 + bend * (2 * t.front() - 1));
    }
  }
};

PathModel path(double bend = 0) {
  PathModel model;
  model.noise.resize(1, 4);
  model.bend = bend;
  Rng(3).split(7).fill_normal(RowView<double>(model.noise));
  return model;
}

template <class Model>
Matrix<double> draw(const dit::Process& process, const dit::SamplerConfig& config, const Model& model,
                    const std::vector<Index>& labels = {0}, std::uint64_t first = 7, int threads = 1) {
  typename Model::Tape tape;
  return dit::Sampler<Model, double>(process, config, model)(View(), labels, Rng(3), first, tape, Exec{threads},
                                                             [](auto...) {});
}

const dit::Process flow = dit::RectifiedFlow{};

dit::GaussianDiffusion diffusion(dit::StepVariance variance) {
  return dit::GaussianDiffusion(dit::DiffusionSchedule(dit::NoiseSchedule::linear, 200), variance);
}

// Predicts the noise between x_t and an image that it knows: every sampler has to find the image.
struct KnowingModel {
  struct Tape {};
  dit::ModelConfig known = shape;
  mutable std::vector<double> times;

  const dit::ModelConfig& config() const { return known; }
  static double image(Index label) { return label == 0 ? 0.6 : -0.2; }
  void forward(View /*p*/, const Matrix<double>& x, const std::vector<double>& t, const std::vector<Index>& labels,
               Matrix<double>& v, Tape& /*tape*/, const Exec& /*exec*/) const {
    times.push_back(t.front());
    v.setConstant(-1);  // the smallest variance
    const dit::GaussianDiffusion process = diffusion(dit::StepVariance::learned_range);
    const double a = process.schedule().alphas_cumprod[std::size_t(t.front())];
    for (Index i = 0; i < x.rows(); ++i) {
      v.row(i).leftCols(4) = (x.row(i).array() - std::sqrt(a) * image(labels[std::size_t(i)])) / std::sqrt(1 - a);
    }
  }
};

}  // namespace

TEST_CASE("Sampler: Euler's method follows a straight path to its end, and guidance extrapolates") {
  const PathModel model = path();
  for (const double guidance : {1.0, 2.0, 3.0}) {
    model.times.clear();
    model.rows.clear();
    const Matrix<double> z = draw(flow, {.steps = "5", .guidance = guidance}, model);
    // v = v(∅) + g (v(0) - v(∅)) leads to image ∅ + g (image 0 - image ∅).
    CHECK((z.array() - (0.5 + guidance * 0.5)).abs().maxCoeff() < 1e-12);
    REQUIRE(model.times.size() == 5);
    CHECK(model.times.front() == 1.0);
    CHECK(model.times.back() == doctest::Approx(0.2));
    CHECK(model.rows.front() == (guidance == 1 ? 1 : 2));  // no second prediction where it does not count
  }
}

TEST_CASE("Sampler: Heun's method is exact for velocities that are linear in time, Euler's is not") {
  const PathModel model = path(0.8);
  CHECK((draw(flow, {.method = "heun", .steps = "3", .guidance = 1}, model).array() - 1).abs().maxCoeff() < 1e-12);
  CHECK(model.times == std::vector<double>{1, 2.0 / 3, 2.0 / 3, 1.0 / 3, 1.0 / 3, 0});
  CHECK((draw(flow, {.method = "euler", .steps = "3", .guidance = 1}, model).array() - 1).abs().maxCoeff() > 0.1);
}

TEST_CASE("Sampler: each prediction is observed with its place on the way, and leads to an image") {
  const PathModel model = path();
  PathModel::Tape tape;
  Matrix<double> z = model.noise;
  std::vector<double> seen;
  const dit::Sampler<PathModel, double> sampler(flow, {.steps = "4", .guidance = 1}, model);
  sampler.integrate(View(), z, {0}, Rng(0), 0, tape, Exec{1}, [&](double t, RowView<const double> at, RowView<const double> v) {
    seen.push_back(t);
    CHECK((at.eigen() - t * v.eigen()).isApproxToConstant(1.0, 1e-12));
  });
  CHECK(seen == std::vector<double>{1, 0.75, 0.5, 0.25});
  CHECK(z.isApproxToConstant(1.0, 1e-12));
}

TEST_CASE("Sampler: DDPM and DDIM find an image that the model knows, with and without a learned variance") {
  for (const auto variance :
       {dit::StepVariance::learned_range, dit::StepVariance::fixed_small, dit::StepVariance::fixed_large}) {
    KnowingModel model;
    model.known.learn_sigma = variance == dit::StepVariance::learned_range;
    for (const dit::SamplerConfig& config :
         {dit::SamplerConfig{.method = "", .steps = "", .guidance = 1},
          dit::SamplerConfig{.method = "ddpm", .steps = "20", .guidance = 1},
          dit::SamplerConfig{.method = "", .steps = "ddim50", .guidance = 1},
          dit::SamplerConfig{.method = "ddim", .steps = "10,5", .guidance = 1, .eta = 0.5}}) {
      model.times.clear();
      const Matrix<double> z = draw(diffusion(variance), config, model, {0, 1});
      CHECK((z.row(0).array() - 0.6).abs().maxCoeff() < 1e-9);
      CHECK((z.row(1).array() + 0.2).abs().maxCoeff() < 1e-9);
      CHECK(model.times.back() == 0);  // as the long diffusion numbers its steps
      const std::size_t expected = config.steps.empty() ? 200 : config.steps == "20" ? 20 : config.steps == "10,5" ? 15 : 50;
      CHECK(model.times.size() == expected);
    }
    const Matrix<double> guided = draw(diffusion(variance), {.steps = "50", .guidance = 2}, model, {0});
    CHECK((guided.array() - 1.4).abs().maxCoeff() < 1e-9);
    const Matrix<double> clipped = draw(diffusion(variance), {.steps = "50", .guidance = 2, .clip = true}, model, {0});
    CHECK((clipped.array() - 1).abs().maxCoeff() < 1e-9);
  }
}

TEST_CASE("Sampler: an image does not depend on the batch that it is drawn in, nor on the number of threads") {
  // Noise that matters: a prediction of no noise at all.
  struct SilentModel {
    struct Tape {};
    const dit::ModelConfig& config() const { return shape; }
    void forward(View /*p*/, const Matrix<double>& /*x*/, const std::vector<double>& /*t*/,
                 const std::vector<Index>& /*labels*/, Matrix<double>& v, Tape& /*tape*/, const Exec& /*exec*/) const {
      v.setZero();
    }
  } const model;
  const dit::Process process = diffusion(dit::StepVariance::fixed_large);
  const Matrix<double> both = draw(process, {.steps = "10"}, model, {0, 0}, 4, 2);
  CHECK(draw(process, {.steps = "10"}, model, {0}, 5, 1).row(0) == both.row(1));
  CHECK((both.row(0) - both.row(1)).norm() > 0.1);
  const Matrix<double> quiet = draw(process, {.method = "ddim", .steps = "10"}, model, {0}, 4);
  const Matrix<double> noisy = draw(process, {.method = "ddim", .steps = "10", .eta = 1}, model, {0}, 4);
  CHECK((quiet - noisy).norm() > 1e-3);
}

TEST_CASE("Sampler: what does not go together is refused") {
  const PathModel model = path();
  const dit::Process ddpm = diffusion(dit::StepVariance::fixed_small);
  using Config = dit::SamplerConfig;
  for (const Config& bad :
       {Config{.method = "ddpm"}, Config{.method = "ddim"}, Config{.method = "rk4"}, Config{.guided_channels = 2},
        Config{.guidance = std::nan("")}, Config{.eta = -1}, Config{.eta = 2}, Config{.eta = 0.5}, Config{.clip = true}}) {
    CHECK_THROWS_AS(draw(flow, bad, model), moxie::ValueError);
  }
  CHECK_THROWS_AS(draw(ddpm, {.steps = "10", .eta = 0.5}, model), moxie::ValueError);
  CHECK_THROWS_AS(draw(ddpm, {.method = "euler"}, model), moxie::ValueError);
  for (const char* steps : {"0", "-3", "ten", "5,5", "", "2.5"}) {
    CHECK_THROWS_AS(draw(flow, {.steps = steps}, model), std::invalid_argument);
  }
  for (const char* steps : {"0", "201", "ddim", "ddim150", "1"}) {
    CHECK_THROWS_AS(draw(ddpm, {.steps = steps}, model), std::invalid_argument);
  }
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

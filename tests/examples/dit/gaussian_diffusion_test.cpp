// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/gaussian_diffusion.hpp>
#include <moxie/core/random.hpp>

using dit::DiffusionSchedule;
using dit::GaussianDiffusion;
using dit::Index;
using dit::NoiseSchedule;
using dit::RowView;
using dit::StepVariance;
using moxie::Matrix;
using moxie::Rng;

namespace {

std::vector<Index> list(std::initializer_list<Index> steps) { return steps; }

}  // namespace

TEST_CASE("respaced_steps: all, sections, strides") {
  CHECK(dit::respaced_steps(4, "") == list({0, 1, 2, 3}));
  CHECK(dit::respaced_steps(10, "3") == list({0, 4, 9}));            // 4.5 is rounded to even
  CHECK(dit::respaced_steps(10, "2,3") == list({0, 4, 5, 7, 9}));    // two sections of five
  CHECK(dit::respaced_steps(10, "1,1,2") == list({0, 4, 7, 9}));     // of four, three and three
  CHECK(dit::respaced_steps(10, "ddim5") == list({0, 2, 4, 6, 8}));  // every second
  CHECK(dit::respaced_steps(10, "ddim10").size() == 10);
  CHECK(dit::respaced_steps(10, "ddim4") == list({0, 3, 6, 9}));
  const auto sections = dit::respaced_steps(1000, "10,15,20");
  CHECK(sections.size() == 45);
  CHECK(sections.front() == 0);
  CHECK(sections.back() == 999);
  const auto quarter = dit::respaced_steps(1000, "250");
  CHECK(quarter.size() == 250);
  CHECK(quarter.back() == 999);
  for (std::size_t i = 1; i < quarter.size(); ++i) {
    REQUIRE(quarter[i] > quarter[i - 1]);
  }
  for (const char* bad : {"ddim", "ddim7", "ddim0", "ddimx", "11", "0", "-3", "5,", ",5", "5,6", "2 3", "2.5", "ten", "ddim5,2",
                          "99999999999999999999"}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(dit::respaced_steps(10, bad), std::invalid_argument);
  }
}

TEST_CASE("DiffusionSchedule: kept steps have the cumulative products of the long diffusion") {
  for (const NoiseSchedule noise : {NoiseSchedule::linear, NoiseSchedule::cosine}) {
    const DiffusionSchedule all(noise);
    for (const char* respacing : {"250", "ddim50", "10,15,20", "2"}) {
      const DiffusionSchedule some(noise, 1000, respacing);
      REQUIRE(some.timesteps.size() == std::size_t(some.steps()));
      for (std::size_t i = 0; i < some.betas.size(); ++i) {
        const double expected = all.alphas_cumprod[std::size_t(some.timesteps[i])];
        REQUIRE(some.alphas_cumprod[i] == doctest::Approx(expected).epsilon(1e-11));
        REQUIRE(some.betas[i] > 0);
        REQUIRE(some.betas[i] < 1);
      }
      CHECK(some.alphas_cumprod_prev.front() == 1);
      CHECK(some.alphas_cumprod_next.back() == 0);
      CHECK(some.posterior_variance.front() == 0);
      CHECK(some.posterior_log_variance_clipped[0] == some.posterior_log_variance_clipped[1]);
    }
    CHECK(all.alphas_cumprod.back() < 1e-4);  // nothing but noise is left
  }
  CHECK(DiffusionSchedule(NoiseSchedule::linear).betas.front() == doctest::Approx(1e-4));
  CHECK(DiffusionSchedule(NoiseSchedule::linear, 500).betas.back() == doctest::Approx(0.04));
  CHECK(DiffusionSchedule(NoiseSchedule::cosine).betas.back() == doctest::Approx(0.999));
  CHECK_THROWS_AS(DiffusionSchedule(NoiseSchedule::linear, 1), std::invalid_argument);
  CHECK_THROWS_AS(DiffusionSchedule(NoiseSchedule::linear, -5), std::invalid_argument);
  CHECK_THROWS_AS(DiffusionSchedule(NoiseSchedule::linear, 1000, "1"), std::invalid_argument);
}

TEST_CASE("GaussianDiffusion: with the noise itself as prediction, every sampler finds the image") {
  for (const StepVariance variance : {StepVariance::learned_range, StepVariance::fixed_large, StepVariance::fixed_small}) {
    const GaussianDiffusion diffusion(DiffusionSchedule(NoiseSchedule::cosine, 1000, "20"), variance);
    const Rng rng(11);
    for (const double image : {-0.9, 0.3}) {
      // What leads from the image to x in t steps.
      const auto noise_of = [&](double x, Index t) { return (x - diffusion.noised(image, t, 0)) / diffusion.noised(0, t, 1); };
      for (const double eta : {0.0, 0.5, 1.0}) {
        double ddim = 1.7;
        double ddpm = 1.7;
        for (Index t = diffusion.schedule().steps() - 1; t >= 0; --t) {
          const double noise = rng.normal(std::uint64_t(t));
          CHECK(diffusion.predict(ddim, noise_of(ddim, t), 0.5, t, false).x_start == doctest::Approx(image));
          ddim = diffusion.ddim_step(ddim, noise_of(ddim, t), t, noise, eta, false);
          ddpm = diffusion.ddpm_step(ddpm, noise_of(ddpm, t), 0.5, t, noise, true);
        }
        CHECK(ddim == doctest::Approx(image));
        CHECK(ddpm == doctest::Approx(image));
      }
      // The path without noise, there and back.
      const double start = diffusion.noised(image, 3, 0.8);
      const double next = diffusion.ddim_reverse_step(start, 0.8, 3, false);
      CHECK(next == doctest::Approx(diffusion.noised(image, 4, 0.8)));
      CHECK(diffusion.ddim_step(next, 0.8, 4, 0, 0, false) == doctest::Approx(start));
    }
  }
}

TEST_CASE("GaussianDiffusion: eta = 1 is DDPM with the small variance, and clipping keeps images in [-1, 1]") {
  const GaussianDiffusion diffusion(DiffusionSchedule(NoiseSchedule::linear, 1000, "50"), StepVariance::fixed_small);
  for (const Index t : {1, 2, 25, 49}) {
    for (const double noise : {-1.0, 0.0, 2.0}) {
      CHECK(diffusion.ddim_step(0.7, -0.4, t, noise, 1, false) ==
            doctest::Approx(diffusion.ddpm_step(0.7, -0.4, 0, t, noise, false)).epsilon(1e-9));
    }
    CHECK(diffusion.predict(50, -0.4, 0, t, true).x_start == 1);
    CHECK(diffusion.predict(-50, -0.4, 0, t, true).x_start == -1);
  }
  // Learned: v = 1 is β, v = -1 the posterior's variance.
  const GaussianDiffusion learned(diffusion.schedule());
  CHECK(learned.log_variance(1, 7) == doctest::Approx(std::log(diffusion.schedule().betas[7])));
  CHECK(learned.log_variance(-1, 7) == doctest::Approx(diffusion.schedule().posterior_log_variance_clipped[7]));
  CHECK(learned.output_columns(5) == 10);
  CHECK(diffusion.output_columns(5) == 5);
}

// The bound's gradient goes to v alone, so v's part is the derivative of the loss, and ε's that of the mean square.
TEST_CASE("GaussianDiffusion: the loss's gradient is that of differences, at the first, a middle and the last step") {
  const Index n = 12;
  for (const StepVariance variance : {StepVariance::learned_range, StepVariance::fixed_large}) {
    const GaussianDiffusion diffusion(DiffusionSchedule(NoiseSchedule::linear, 1000, "100"), variance);
    const Index columns = diffusion.output_columns(n);
    for (const Index t : {0, 1, 50, 99}) {
      for (const bool rescaled : {false, true}) {
        CAPTURE(t);
        Matrix<double> x(1, n);
        Matrix<double> noise(1, n);
        Matrix<double> x_t(1, n);
        Matrix<double> output(1, columns);
        Rng(21).fill_normal(RowView<double>(noise));
        Rng(22).fill_normal(RowView<double>(output));
        Rng(23).fill_uniform(RowView<double>(x), -1, 1);
        x(0, 0) = -1;  // the outermost steps of a pixel
        x(0, 1) = 1;
        for (Index j = 0; j < n; ++j) {
          output(0, j) = noise(0, j) + 0.1 * output(0, j);
          x_t(0, j) = diffusion.noised(x(0, j), t, noise(0, j));
        }
        const auto loss = [&](RowView<double> gradient) {
          return diffusion.loss<double>(x, x_t, noise, output, 0, t, rescaled, 1.5, gradient);
        };
        Matrix<double> gradient(1, columns);
        const auto value = loss(gradient);
        CHECK((value.vb > 0) == (variance == StepVariance::learned_range));
        CHECK(value.total() == value.mse + value.vb);
        for (Index j = 0; j < columns; ++j) {
          const double h = 1e-5;
          const double before = output(0, j);
          output(0, j) = before + h;
          const auto above = loss({});
          output(0, j) = before - h;
          const auto below = loss({});
          output(0, j) = before;
          const double difference = j < n ? above.mse - below.mse : above.total() - below.total();
          CHECK(gradient(0, j) == doctest::Approx(1.5 * difference / (2 * h)).epsilon(1e-5));
        }
      }
    }
  }
}

TEST_CASE("DiffusionSchedule: steps that would leave nothing of the image are refused") {
  for (const dit::Index steps : {2, 10, 20}) {
    CHECK_THROWS_AS(dit::DiffusionSchedule(dit::NoiseSchedule::linear, steps), std::invalid_argument);
    CHECK(dit::DiffusionSchedule(dit::NoiseSchedule::cosine, steps).steps() == steps);
  }
  CHECK(dit::DiffusionSchedule(dit::NoiseSchedule::linear, 21).alphas_cumprod.back() > 0.0);
}

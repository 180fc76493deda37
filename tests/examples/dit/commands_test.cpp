// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/commands.hpp>

using dit::commands::DrawingOptions;
using Labels = std::vector<std::int64_t>;

TEST_CASE("DrawingOptions: the classes in turn, all or those that were asked for") {
  CHECK(DrawingOptions{.per_class = 2}.labels(3) == Labels{0, 1, 2, 0, 1, 2});
  CHECK(DrawingOptions{.per_class = 2, .classes = {4, 1}}.labels(5) == Labels{4, 1, 4, 1});
  for (const dit::Index bad : {-1, 5}) {
    CHECK_THROWS_AS(DrawingOptions({.per_class = 1, .classes = {0, bad}}).labels(5), moxie::ValueError);
  }
}

TEST_CASE("DrawingOptions: the process's own number of steps, unless there is another") {
  const DrawingOptions options;
  CHECK(options.sampler_for(dit::RectifiedFlow{}).steps == "25");
  const auto diffusion = [](dit::Index steps) {
    return dit::GaussianDiffusion(dit::DiffusionSchedule(dit::NoiseSchedule::cosine, steps));
  };
  CHECK(options.sampler_for(diffusion(1000)).steps == "250");
  CHECK(options.sampler_for(diffusion(100)).steps == "100");
  CHECK(DrawingOptions{.sampler = {.steps = "ddim7"}}.sampler_for(diffusion(1000)).steps == "ddim7");
}

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
  dit::TrainingConfig config;
  CHECK(options.sampler_for(config).steps == "25");
  config.process = "ddpm";
  CHECK(options.sampler_for(config).steps == "250");
  config.diffusion_steps = 100;
  CHECK(options.sampler_for(config).steps == "100");
  CHECK(DrawingOptions{.sampler = {.steps = "ddim7"}}.sampler_for(config).steps == "ddim7");
}

TEST_CASE("DrawingOptions: guidance of a model that knows both, with and without classes") {
  dit::TrainingConfig config;
  CHECK(DrawingOptions{}.sampler_for(config).guidance == 3);
  CHECK(DrawingOptions{.guidance = 2}.sampler_for(config).guidance == 2);
  for (const double dropout : {0.0, 1.0}) {
    config.recipe.label_dropout = dropout;
    CHECK(DrawingOptions{}.sampler_for(config).guidance == 1);
    CHECK(DrawingOptions{.guidance = 1}.sampler_for(config).guidance == 1);
    CHECK_THROWS_AS(DrawingOptions{.guidance = 2}.sampler_for(config), moxie::ValueError);
  }
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <compare/runner.hpp>

using compare::Classifier;
using compare::Exec;
using compare::Index;
using compare::Matrix;
using compare::Rng;

namespace {

compare::Run small(const std::string& feed_forward) {
  compare::Run run{feed_forward, "test", 4, {}};
  run.config.model = {.image_size = 28, .channels = 1, .patch = 7, .dim = 16, .depth = 2, .heads = 2, .classes = 10};
  run.config.feed_forward = feed_forward;
  run.config.experts = 4;
  run.config.hidden_dim = 8;
  run.config.shared_hidden_dim = 8;
  run.config.slots_per_expert = 4;
  run.config.recipe.batch = 8;
  return run;
}

const compare::Measures measures{.every = 2, .validation = 70, .samples = 20, .sampling_steps = "2", .neighbours = 2};

}  // namespace

TEST_CASE("execute: measures every feed-forward alike, the same with any number of threads") {
  const dit::DataSet data = dit::generated_shapes(60, Rng(1));
  const dit::DataSet test = dit::generated_shapes(100, Rng(2));
  const Classifier<float> classifier({.features = 8});
  moxie::Parameters<float> weights(classifier.layout());
  classifier.initialize(weights, Rng(3));
  const compare::Judge judge_of{classifier, weights,
                                judge(classifier, weights, test.images, Exec{1}).features.topRows(measures.samples)};
  std::vector<compare::Run> runs;
  for (const char* name : {"shared", "top-k", "expert-choice", "soft", "dense"}) {
    runs.push_back(small(name));
  }
  runs[0].config.process = "ddpm";
  runs[0].config.model.learn_sigma = true;
  runs[1].config.mixture_from = 1;
  runs[1].config.token_capacity = 0.5;
  runs.push_back(small("dense"));
  runs.back().name = "Switch-DiT";
  runs.back().config.model.switch_experts = 3;
  for (const compare::Run& run : runs) {
    CAPTURE(run.name);
    std::int64_t calls = 0;
    const auto result = execute(run, measures, data, test, judge_of, Exec{1}, [&](std::int64_t step) {
      CHECK(step >= 1);
      CHECK(step <= 4);
      ++calls;
    });
    CHECK(calls >= 4 + 2);
    CHECK(result["name"] == run.name);
    CHECK(result["config"] == nlohmann::json(run.config));
    CHECK(result["parameters"] == dit::model_of(run.config).layout().parameter_count());
    CHECK(result["validation"].size() == 2);
    CHECK(result["validation"][0][0] == 2);
    CHECK(result["validation"][1][0] == 4);
    CHECK(result["validation"][1][1] == result["validation_loss"]);
    CHECK(result["validation_loss"].get<double>() > 0);
    for (const char* share : {"agreement", "precision", "recall"}) {
      CHECK(result[share].get<double>() >= 0);
      CHECK(result[share].get<double>() <= 1);
    }
    CHECK(result["frechet"].get<double>() > 0);
    const std::size_t blocks = run.name == "dense" ? 0 : run.name == "top-k" ? 1 : 2;
    CHECK(result.contains("blocks") == (blocks > 0));
    for (const auto& block : result.value("blocks", nlohmann::json::array())) {
      CHECK(block["max_violation"].get<double>() >= 0);
      CHECK(block["entropy"].get<double>() <= 1.0 + 1e-9);
      CHECK((block["dropped"].get<double>() > 0) == (run.name == "top-k"));
      if (run.name == "Switch-DiT") {  // all tokens of an image, whatever its class, go where its time sends them
        CHECK(block["bits_of_position"].get<double>() == doctest::Approx(0).epsilon(1e-9));
        CHECK(block["unserved"] == 0);
      }
    }
    CHECK(result.value("blocks", nlohmann::json::array()).size() == blocks);

    const auto again = execute(run, measures, data, test, judge_of, Exec{2}, [](auto...) {});
    for (const char* same : {"validation_loss", "training_loss", "agreement", "frechet", "precision", "recall"}) {
      CHECK(again[same] == result[same]);
    }
  }
}

TEST_CASE("step_memory: is at least the weights, gradients, moments and averages, and of a larger model more") {
  const dit::DataSet data = dit::generated_shapes(60, Rng(1));
  compare::Run run = small("top-k");
  run.config.hidden_dim = 4096;
  const auto parameters = dit::model_of(run.config).layout().parameter_count();
  const std::int64_t bytes = compare::step_memory(run, data, Exec{1});
  CHECK(bytes >= 5 * 4 * parameters);
  CHECK(bytes < 10 * 4 * parameters + (Index{1} << 26));
  run.config.hidden_dim = 16384;
  CHECK(compare::step_memory(run, data, Exec{1}) > 2 * bytes);
}

TEST_CASE("step_times: a time for every run in every round") {
  const dit::DataSet data = dit::generated_shapes(60, Rng(1));
  const std::vector<compare::Run> runs = {small("dense"), small("soft")};
  Index calls = 0;
  const auto times = compare::step_times(runs, data, 3, 2, Exec{1}, [&] { ++calls; });
  CHECK(calls == 2 * 3 * (3 + 2));
  REQUIRE(times.size() == 2);
  for (const auto& rounds : times) {
    CHECK(rounds.size() == 3);
    CHECK(*std::min_element(rounds.begin(), rounds.end()) > 0);
  }
  CHECK_THROWS_WITH(compare::step_times(runs, data, 1, 1, Exec{1}, [] { throw std::runtime_error("interrupted"); }),
                    "interrupted");
}

TEST_CASE("execute: an observer that throws ends the run") {
  const dit::DataSet data = dit::generated_shapes(70, Rng(1));
  const Classifier<float> classifier({.features = 8});
  const moxie::Parameters<float> weights(classifier.layout());
  const compare::Judge judge_of{classifier, weights, Matrix<float>::Zero(20, 8)};
  CHECK_THROWS_WITH(execute(small("dense"), measures, data, data, judge_of, Exec{1},
                            [](auto...) { throw std::runtime_error("interrupted"); }),
                    "interrupted");
}

TEST_CASE("execute: a run that diverges is a result with an error") {
  const dit::DataSet data = dit::generated_shapes(70, Rng(1));
  const Classifier<float> classifier({.features = 8});
  const moxie::Parameters<float> weights(classifier.layout());
  const compare::Judge judge_of{classifier, weights, Matrix<float>::Zero(20, 8)};
  compare::Run run = small("dense");
  run.config.recipe.optimizer = {.rate = 1e30, .warm_up = 0};
  const auto result = execute(run, measures, data, data, judge_of, Exec{1}, [](auto...) {});
  CHECK(result["name"] == "dense");
  CHECK(result["error"].get<std::string>().starts_with("step 2:"));
}

TEST_CASE("count_routing: what was chosen, and not what a capacity left of it") {
  // All tokens prefer experts 0 and 1, which have room for one token of an image each.
  moxie::TopKMoE<float> layer(
      {.model_dim = 4, .experts = 4, .top_k = 2, .expert = {.hidden_dim = 4}, .capacity = {.factor = 0.5}});
  layer.initialize(Rng(1));
  const auto gate = layer.parameters().view()["gate.weight"];
  for (Index e = 0; e < 4; ++e) {
    gate.eigen().row(e).setConstant(-float(e));
  }
  const Matrix<float> x = Matrix<float>::Ones(8, 4);  // two images of four tokens
  Matrix<float> y(8, 4);
  auto tape = layer.make_tape();
  layer.forward({x, 4}, y, tape, Exec{1});
  CHECK(tape.plan().rows() == 4);
  dit::RoutingCounts counts({.layers = 1, .experts = 4, .classes = 2, .positions = 4, .bins = 1});
  compare::count_routing(counts, 0, 0, tape, {0, 1});
  Matrix<double> expected = Matrix<double>::Zero(2, 4);
  expected.leftCols(2).setConstant(4);
  CHECK(counts.by_class(0) == expected);
  CHECK(compare::unserved(tape.plan()) == 0.75);
}

TEST_CASE("Validation: the same noise and times for every call, of the process's own times") {
  const dit::DataSet data = dit::generated_shapes(120, Rng(1));
  dit::TrainingConfig config = small("dense").config;
  const compare::Validation validation(config, data, 110, Exec{1});
  CHECK_THROWS_AS(compare::Validation(config, data, 121, Exec{1}), moxie::ValueError);
  {
    const auto model = dit::model_of(config);
    moxie::Parameters<float> weights(model.layout());
    model.initialize(weights, Rng(1));
    auto tape = model.make_tape();
    std::vector<double> times;
    std::size_t images = 0;
    const auto once = validation(model, weights.view(), tape, Exec{1}, [&](double time, const auto& labels) {
      times.push_back(time);
      images += labels.size();
    });
    CHECK(images == 110);
    CHECK(times.size() == 3);
    CHECK(std::is_sorted(times.begin(), times.end()));
    CHECK(times.front() > 0);
    CHECK(times.back() < 1);
    CHECK(validation(model, weights.view(), tape, Exec{2}, [](auto...) {}) == once);
  }
}

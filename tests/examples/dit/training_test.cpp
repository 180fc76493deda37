// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/sampling.hpp>
#include <dit/training.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <temporary_folder.hpp>

using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
using moxie::Parameters;
using nlohmann::json;

namespace {

dit::TrainingConfig small_config(const std::string& feed_forward = "shared") {
  dit::TrainingConfig c;
  c.model = {.image_size = 4, .channels = 1, .patch = 2, .dim = 8, .depth = 2, .heads = 2, .classes = 2};
  c.feed_forward = feed_forward;
  c.experts = 4;
  c.hidden_dim = 6;
  c.shared_hidden_dim = 6;
  c.recipe.batch = 8;
  c.recipe.optimizer.warm_up = 3;
  return c;
}

// Two classes: bright left half, bright right half.
dit::DataSet two_halves() {
  dit::DataSet set;
  set.class_names = {"left", "right"};
  set.images.resize(10, 16);
  for (Index i = 0; i < 10; ++i) {
    set.labels.push_back(i % 2);
    for (Index j = 0; j < 16; ++j) {
      set.images(i, j) = (j % 4 < 2) == (i % 2 == 0) ? 1.0F : -1.0F;
    }
  }
  return set;
}

using moxie::test::TemporaryFolder;

}  // namespace

TEST_CASE("Training: going on from a checkpoint is the undisturbed run, bit for bit, with another number of threads") {
  const TemporaryFolder folder;
  const dit::DataSet data = two_halves();
  for (const char* feed_forward : {"shared", "top-k", "expert-choice", "soft", "dense"}) {
    CAPTURE(feed_forward);
    dit::TrainingConfig config = small_config(feed_forward);
    if (config.feed_forward == "top-k") {  // with biases that steps move, in one of two blocks
      config.recipe.bias_rate = 0.01;
      config.mixture_from = 1;
    }
    if (config.feed_forward == "dense") {  // with all that has a state or a draw of its own
      config.process = "ddpm";
      config.model.learn_sigma = true;
      config.model.switch_experts = 3;
      config.recipe.micro_batch = 4;
      config.recipe.stratified = true;
    }
    {
      const auto model = dit::model_of(config);
      dit::Training whole(config, model, data);
      for (int i = 0; i < 7; ++i) {
        whole.step(Exec{1});
      }
      dit::Training first(config, model, data);
      for (int i = 0; i < 4; ++i) {
        first.step(Exec{2});
      }
      first.save(folder / "checkpoint");
      dit::Training second(config, model, data);
      second.load(moxie::SafetensorsFile(folder / "checkpoint"));
      CHECK(second.steps() == 4);
      for (int i = 0; i < 3; ++i) {
        second.step(Exec{3});
      }
      CHECK((second.averages().flat() == whole.averages().flat()).all());
      REQUIRE(second.history().size() == 7);
      for (std::size_t i = 0; i < 7; ++i) {
        CHECK(second.history()[i].loss == whole.history()[i].loss);
        CHECK(second.history()[i].gradient_norm == whole.history()[i].gradient_norm);
      }
    }
  }
}

TEST_CASE("Training: learns two classes, and guided samples show the class that was asked for") {
  const dit::DataSet data = two_halves();
  dit::TrainingConfig config = small_config();
  config.recipe.optimizer.rate = 5e-3;
  config.recipe.batch = 32;
  config.recipe.optimizer.ema_decay = 0.98;
  {
    const auto model = dit::model_of(config);
    dit::Training training(config, model, data);
    for (int i = 0; i < 1000; ++i) {
      training.step(Exec{1});
    }
    CHECK(training.history().back().loss < 0.5F * training.history().front().loss);
    auto tape = model.make_tape();
    int calls = 0;
    const dit::Sampler<std::decay_t<decltype(model)>, float> sampler(training.process(), {.steps = "20", .guidance = 2}, model);
    const Matrix<float> images =
        sampler(training.averages().view(), {0, 1, 0, 1}, Rng(5), 0, tape, Exec{1}, [&](auto...) { ++calls; });
    CHECK(calls == 20);
    for (Index i = 0; i < 4; ++i) {
      const auto own = (data.images.row(i) - images.row(i)).norm();
      const auto other = (data.images.row(i + 1) - images.row(i)).norm();
      CHECK(own < 0.5F * other);
    }
  }
}

TEST_CASE("Training: a checkpoint that does not fit is refused, and nothing changes") {
  const TemporaryFolder folder;
  const dit::DataSet data = two_halves();
  const dit::TrainingConfig config = small_config();
  {
    const auto model = dit::model_of(config);
    dit::Training training(config, model, data);
    training.step(Exec{1});
    training.save(folder / "good");
    CHECK(json(dit::config_of(moxie::SafetensorsFile(folder / "good"))) == json(config));
    const Parameters<float> before = training.averages();

    dit::TrainingConfig wider = config;
    wider.hidden_dim = 7;
    const auto other = dit::model_of(wider);
    dit::Training(wider, other, data).save(folder / "wider");
    CHECK_THROWS_AS(training.load(moxie::SafetensorsFile(folder / "wider")), moxie::SafetensorsError);
    for (const auto& change : std::vector<std::function<void(dit::DataSet&)>>{
             [](dit::DataSet& set) { set.class_names[1] = "top"; }, [](dit::DataSet& set) { set.labels[3] = 0; },
             [](dit::DataSet& set) { set.images(7, 5) *= -1; },
             [](dit::DataSet& set) {
               set.images.conservativeResize(9, Eigen::NoChange);
               set.labels.pop_back();
             }}) {
      dit::DataSet another = data;
      change(another);
      dit::Training(config, model, another).save(folder / "another");
      CHECK_THROWS_AS(training.load(moxie::SafetensorsFile(folder / "another")), moxie::SafetensorsError);
    }
    moxie::save_parameters(folder / "foreign", training.averages());
    CHECK_THROWS_AS(training.load(moxie::SafetensorsFile(folder / "foreign")), moxie::SafetensorsError);
    CHECK_THROWS_AS(dit::config_of(moxie::SafetensorsFile(folder / "foreign")), moxie::SafetensorsError);

    std::ifstream in(folder / "good", std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(in)), {});
    std::ofstream(folder / "short", std::ios::binary) << bytes.substr(0, bytes.size() - 4);
    CHECK_THROWS_AS(moxie::SafetensorsFile(folder / "short"), moxie::SafetensorsError);
    CHECK(training.steps() == 1);
    CHECK((training.averages().flat() == before.flat()).all());
  }
}

TEST_CASE("Training: a rehearsal changes nothing") {
  const dit::DataSet data = two_halves();
  const dit::TrainingConfig config = small_config();
  {
    const auto model = dit::model_of(config);
    dit::Training rehearsed(config, model, data);
    dit::Training other(config, model, data);
    rehearsed.rehearse(Exec{1});
    CHECK(rehearsed.steps() == 0);
    CHECK(rehearsed.history().empty());
    for (int i = 0; i < 2; ++i) {
      CHECK(rehearsed.step(Exec{1}).gradient_norm == other.step(Exec{1}).gradient_norm);
    }
    CHECK((rehearsed.averages().flat() == other.averages().flat()).all());
  }
}

TEST_CASE("Training: a data set that the model is not made for") {
  const dit::TrainingConfig config = small_config();
  {
    const auto model = dit::model_of(config);
    dit::DataSet data = two_halves();
    data.class_names.emplace_back("neither");
    CHECK_THROWS_AS(dit::Training(config, model, data), moxie::ValueError);
    data = two_halves();
    data.images.conservativeResize(Eigen::NoChange, 12);
    CHECK_THROWS_AS(dit::Training(config, model, data), moxie::ValueError);
  }
}

TEST_CASE("Training: a loss that is not finite stops the run and leaves the weights") {
  dit::DataSet data = two_halves();
  const dit::TrainingConfig config = small_config();
  {
    const auto model = dit::model_of(config);
    dit::Training training(config, model, data);
    training.step(Exec{1});
    const Parameters<float> before = training.averages();
    data.images.setConstant(std::numeric_limits<float>::quiet_NaN());
    CHECK_THROWS_AS(training.step(Exec{1}), moxie::ValueError);
    CHECK(training.steps() == 1);
    CHECK((training.averages().flat() == before.flat()).all());
  }
}

TEST_CASE("Training: micro-batches make the step of the whole batch") {
  const dit::DataSet data = two_halves();
  dit::TrainingConfig config = small_config("dense");
  {
    const auto model = dit::model_of(config);
    dit::Training whole(config, model, data);
    dit::TrainingConfig parts = config;
    parts.recipe.micro_batch = 2;
    dit::Training accumulated(parts, model, data);
    for (int i = 0; i < 5; ++i) {
      const dit::StepReport a = whole.step(Exec{1});
      const dit::StepReport b = accumulated.step(Exec{1});
      CHECK(double(a.loss) == doctest::Approx(double(b.loss)).epsilon(1e-5));
      CHECK(double(a.gradient_norm) == doctest::Approx(double(b.gradient_norm)).epsilon(1e-4));
    }
    parts.recipe.micro_batch = 3;
    CHECK_THROWS_AS(dit::Training(parts, model, data), moxie::ValueError);
  }
}

TEST_CASE("Training: the busiest expert's load is reported, and Switch-DiT's prior is part of its balance loss") {
  const dit::DataSet data = two_halves();
  dit::TrainingConfig config = small_config();
  config.recipe.balance = 0;
  {
    const auto model = dit::model_of(config);
    dit::Training training(config, model, data);
    const dit::StepReport report = training.step(Exec{1});
    CHECK(report.max_load >= 1.0F);
    CHECK(report.max_load <= 2.0F);  // 4 experts, 2 for each token
    CHECK(report.balance_loss == 0.0F);
  }
  config.feed_forward = "dense";
  config.model.switch_experts = 2;
  config.model.switch_top_k = 1;
  {
    const auto model = dit::model_of(config);
    dit::Training training(config, model, data);
    CHECK(training.step(Exec{1}).balance_loss > 0.0F);
  }
}

TEST_CASE("Training: a step moves the selection biases by the whole batch's choices") {
  const TemporaryFolder folder;
  const dit::DataSet data = two_halves();
  const auto biases = [&](const dit::TrainingConfig& config, int steps) {
    const auto model = dit::model_of(config);
    dit::Training training(config, model, data);
    for (int i = 0; i < steps; ++i) {
      training.step(Exec{2});
    }
    training.save(folder / "checkpoint.safetensors");
    return moxie::SafetensorsFile(folder / "checkpoint.safetensors").read<float>("blocks.1.moe.gate.e_score_correction_bias");
  };
  dit::TrainingConfig config = small_config();
  config.recipe.bias_rate = 0.25;
  const std::vector<float> zero(4, 0);
  CHECK(biases(config, 0) == zero);
  const std::vector<float> moved = biases(config, 1);
  CHECK(moved != zero);
  for (const float b : moved) {
    CHECK((b == 0 || std::abs(b) == 0.25F));
  }
  config.recipe.micro_batch = 2;
  CHECK(biases(config, 1) == moved);
}

TEST_CASE("SpikeGuard: ten steps far above the lowest ten, and not a single one") {
  dit::SpikeGuard guard(3, 48);
  dit::SpikeGuard off(0, 48);
  for (int i = 0; i < 100; ++i) {
    CHECK_FALSE(guard.add(1.0 / (1 + i)));
  }
  CHECK_FALSE(guard.rising());
  CHECK_FALSE(guard.add(0.1));  // a single bad batch of ten times the loss
  for (int i = 0; i < 9; ++i) {
    CHECK_FALSE(guard.add(0.01));
  }
  int steps = 1;
  while (!guard.add(0.05)) {
    ++steps;
    REQUIRE(steps < 20);
  }
  CHECK(guard.rising());
  CHECK(steps == 6);  // (4 · 0.01 + 6 · 0.05) / 10 is above 3 · 0.0105
  for (int i = 0; i < 50; ++i) {
    CHECK_FALSE(off.add(std::exp(i)));
  }
}

TEST_CASE("SpikeGuard: small batches are judged by more steps") {
  const Rng rng(3);
  dit::SpikeGuard guard(4, 1);
  for (std::uint64_t i = 0; i < 20000; ++i) {
    CHECK_FALSE(guard.add(std::exp(1.5 * rng.normal(i))));  // a loss that means nothing by itself
    CHECK_FALSE(guard.rising());
  }
}

TEST_CASE("SpikeGuard: what was saved last is from before the rise") {
  dit::SpikeGuard guard(4, 1000);
  for (int i = 0; i < 20; ++i) {
    guard.add(1);
  }
  double saved = 0;
  for (double loss = 1; !guard.add(loss); loss *= 1.3) {
    saved = guard.rising() ? saved : loss;
    REQUIRE(loss < 1e3);
  }
  CHECK(saved < 6.0);
}

TEST_CASE("Training: weights that are not finite are not saved over a good checkpoint") {
  const TemporaryFolder folder;
  const dit::DataSet data = two_halves();
  dit::TrainingConfig config = small_config();
  config.recipe.optimizer.warm_up = 0;
  config.recipe.optimizer.rate = 1e39;  // infinite as a float
  {
    const auto model = dit::model_of(config);
    dit::Training training(config, model, data);
    training.save(folder / "checkpoint");
    training.step(Exec{1});
    CHECK_THROWS_AS(training.save(folder / "checkpoint"), moxie::ValueError);
    dit::Training again(config, model, data);
    again.load(moxie::SafetensorsFile(folder / "checkpoint"));
    CHECK(again.steps() == 0);
  }
}

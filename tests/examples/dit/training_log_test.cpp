// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <dit/training_log.hpp>
#include <filesystem>
#include <fstream>
#include <temporary_folder.hpp>

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

struct TemporaryFile {
  moxie::test::TemporaryFolder folder;
  fs::path path = folder / "log.jsonl";

  std::vector<json> lines() const {
    std::vector<json> all;
    std::ifstream in(path);
    for (std::string line; std::getline(in, line);) {
      all.push_back(json::parse(line));
    }
    return all;
  }
};

constexpr dit::StepReport report{0.5F, 0.25F, 2.0F, 1.5F};

}  // namespace

TEST_CASE("TrainingLog: an object for each step, written when it is added") {
  const TemporaryFile file;
  dit::TrainingLog log(file.path, 0);
  CHECK(file.lines().empty());
  log.add(1, report, 100);
  log.add(2, report, 200);
  const std::vector<json> lines = file.lines();
  REQUIRE(lines.size() == 2);
  CHECK(lines[0] == json{{"step", 1},
                         {"loss", 0.5},
                         {"balance_loss", 0.25},
                         {"gradient_norm", 2},
                         {"max_load", 1.5},
                         {"images_per_second", 100}});
  CHECK(lines[1]["step"] == 2);
}

TEST_CASE("TrainingLog: going on keeps the steps of the checkpoint, and drops later ones and a cut-off line") {
  const TemporaryFile file;
  {
    dit::TrainingLog log(file.path, 0);
    for (int step = 1; step <= 5; ++step) {
      log.add(step, report, step);
    }
  }
  std::ofstream(file.path, std::ios::app)
      << "{\"step\":2}\n{\"step\":-5}\n{\"step\":18446744073709551615}\n[3]\n{\"step\":2,\"lo";
  {
    dit::TrainingLog log(file.path, 3);
    log.add(4, report, 40);
  }
  std::vector<json> lines = file.lines();
  REQUIRE(lines.size() == 4);
  CHECK(lines[2]["images_per_second"] == 3);
  CHECK(lines[3]["images_per_second"] == 40);
  dit::TrainingLog(file.path, 0);
  CHECK(file.lines().empty());
}

TEST_CASE("TrainingLog: a pipe is refused at once, whether a run begins or goes on") {
  const TemporaryFile file;
  REQUIRE(mkfifo(file.path.c_str(), 0600) == 0);
  for (const std::int64_t steps : {0, 3}) {
    CHECK_THROWS_WITH_AS(dit::TrainingLog(file.path, steps), doctest::Contains("is not a regular file"), std::runtime_error);
  }
  CHECK(fs::is_fifo(file.path));
}

TEST_CASE("TrainingLog: what cannot be written is an error") {
  CHECK_THROWS_AS(dit::TrainingLog("/nowhere/log.jsonl", 0), std::runtime_error);
}

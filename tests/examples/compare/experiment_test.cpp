// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <compare/experiment.hpp>
#include <dit/cost.hpp>
#include <fstream>
#include <temporary_folder.hpp>

using compare::Experiment;
using compare::Run;
using nlohmann::json;

namespace {

json small() {
  return json::parse(R"({
    "measures": {"samples": 40, "validation": 100},
    "base": {"hidden_dim": 64, "recipe": {"batch": 12, "balance": 0.5}},
    "groups": [
      {"name": "a", "steps": 40, "seeds": [3, 4], "runs": [
        {"name": "one", "set": {"feed_forward": "dense"}},
        {"name": "two", "set": {"recipe": {"balance": 0}}}]},
      {"name": "b", "steps": 10, "seeds": [3], "runs": [{"name": "three"}]}]})");
}

}  // namespace

TEST_CASE("Experiment: fields are merged into one another, a run for each seed") {
  const Experiment e = Experiment::parse(small());
  REQUIRE(e.runs.size() == 5);
  CHECK(e.runs[0].name == "one");
  CHECK(e.runs[0].group == "a");
  CHECK(e.runs[0].steps == 40);
  CHECK(e.runs[0].config.recipe.seed == 3);
  CHECK(e.runs[1].name == "one");
  CHECK(e.runs[1].config.recipe.seed == 4);
  CHECK(e.runs[0].config.feed_forward == "dense");
  CHECK(e.runs[0].config.recipe.balance == 0.5);
  CHECK(e.runs[2].config.feed_forward == "shared");
  CHECK(e.runs[2].config.recipe.balance == 0);
  CHECK(e.runs[2].config.recipe.batch == 12);
  CHECK(e.runs[4].config.hidden_dim == 64);
  CHECK(e.runs[4].steps == 10);
  CHECK(e.measures.samples == 40);
  CHECK(e.measures.sampling_steps == "25");
}

TEST_CASE("Experiment: what is not understood is named") {
  const auto complaint = [](auto&& change) {
    json file = small();
    change(file);
    try {
      Experiment::parse(file);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
    return std::string("nothing");
  };
  const auto names = [&](const char* what, auto&& change) {
    const std::string text = complaint(change);
    CAPTURE(text);
    CHECK(text.find(what) != std::string::npos);
  };
  names("'loud'", [](json& f) { f["loud"] = 1; });
  names("'loud'", [](json& f) { f["groups"][0]["loud"] = 1; });
  names("'loud'", [](json& f) { f["groups"][0]["runs"][0]["loud"] = 1; });
  names("/loud", [](json& f) { f["measures"]["loud"] = 1; });
  names("/recipe/loud", [](json& f) { f["base"]["recipe"]["loud"] = 1; });
  names("/model/dim", [](json& f) { f["groups"][0]["runs"][0]["set"]["model"]["dim"] = 2.5; });
  names("one: is there twice", [](json& f) { f["groups"][0]["runs"][1]["name"] = "one"; });
  names("one: is there twice", [](json& f) { f["groups"][0]["seeds"] = {3, 3}; });
  names("steps", [](json& f) { f["groups"][1]["steps"] = 0; });
  for (const char* bad : {"-1", "2.5", "1e3", "18446744073709551616", "1e30", "\"3\"", "null"}) {
    CAPTURE(bad);
    names("a seed: is", [&](json& f) { f["groups"][0]["seeds"] = json::array({json::parse(bad)}); });
    names("steps: is", [&](json& f) { f["groups"][0]["steps"] = json::parse(bad); });
  }
  names("steps: is", [](json& f) { f["groups"][0]["steps"] = 9223372036854775808U; });
  names("nothing", [](json& f) { f["groups"][0]["seeds"] = json::array({18446744073709551615U}); });
  names("samples", [](json& f) { f["measures"]["samples"] = 3; });
  names("no run", [](json& f) { f["groups"] = json::array(); });
  names("name", [](json& f) { f["groups"][0]["runs"][0].erase("name"); });
  names("groups", [](json& f) { f.erase("groups"); });
  names("nothing", [](json& f) { f["groups"][0]["beside"] = {{"third", "three"}}; });
  names("no run 'four'", [](json& f) { f["groups"][0]["beside"] = {{"third", "four"}}; });
  names("two runs 'two'", [](json& f) { f["groups"][0]["beside"] = {{"two", "three"}}; });
  const auto claim = [](const char* better) {
    return json{{"claim", "c"}, {"source", "s"}, {"group", "a"}, {"better", better}, {"than", "two"}};
  };
  names("nothing", [&](json& f) { f["claims"] = json::array({claim("one")}); });
  names("c: there is no run 'three' in its group", [&](json& f) { f["claims"] = json::array({claim("three")}); });
  names("nothing", [&](json& f) {
    f["groups"][0]["beside"] = {{"third", "three"}};
    f["claims"] = json::array({claim("third")});
  });
  names("'loud'", [&](json& f) {
    f["claims"] = json::array({claim("one")});
    f["claims"][0]["loud"] = 1;
  });
}

TEST_CASE("Experiment: shorter ones keep the first group and its first seed") {
  Experiment e = Experiment::parse(small());
  e.leave_first_group();
  REQUIRE(e.runs.size() == 2);
  CHECK(e.runs[1].name == "two");
  CHECK(e.runs[1].steps == 40);
  e = Experiment::parse(small());
  e.shorten();
  REQUIRE(e.runs.size() == 2);
  CHECK(e.runs[0].config.recipe.seed == 3);
  CHECK(e.runs[0].steps == 2);
  CHECK(e.measures.samples == 8);
}

TEST_CASE("Experiment: a file that is not there, or none of JSON") {
  const moxie::test::TemporaryFolder folder;
  CHECK_THROWS_AS(Experiment::read(folder / "none"), std::runtime_error);
  std::ofstream(folder / "file") << "{\"groups\": [";
  CHECK_THROWS_AS(Experiment::read(folder / "file"), std::runtime_error);
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THROWS_WITH_AS(Experiment::read(folder / "pipe"), doctest::Contains("is not a regular file"), std::runtime_error);
  std::ofstream(folder / "file") << small();
  CHECK(Experiment::read(folder / "file").runs.size() == 5);
}

TEST_CASE("Experiment: the one of the example is understood, and its runs compute alike") {
  Experiment e = Experiment::read(MOXIE_GOLDEN_DIR "/../../examples/compare/comparison.json");
  CHECK(std::count_if(e.runs.begin(), e.runs.end(), [](const Run& run) { return run.group == "main"; }) == 9 * 3);
  const auto work = [](const Run& run) { return double(dit::cost_of(run.config).multiply_adds); };
  for (const Run& run : e.runs) {
    CAPTURE(run.name);
    if (run.group == "main" || run.group == "shared experts" || run.group == "slots") {
      CHECK(std::abs(work(run) / work(e.runs[0]) - 1) < 0.02);
    }
  }
  e.shorten();
  CHECK(e.runs.size() == 9);
  for (const Run& run : e.runs) {
    CHECK(run.group == "main");
    CHECK(run.steps == 100);
    CHECK(run.config.recipe.seed == 1);
  }
  CHECK(e.measures.samples == 200);
}

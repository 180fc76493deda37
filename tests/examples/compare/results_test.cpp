// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <compare/results.hpp>
#include <fstream>
#include <temporary_folder.hpp>

using compare::Results;
using compare::Run;

namespace {

nlohmann::json line_of(const Run& run) {
  return {{"name", run.name}, {"group", run.group}, {"steps", run.steps}, {"config", run.config}, {"frechet", 1.0 / 3}};
}

Run named(const std::string& name, std::uint64_t seed) {
  Run run{name, "group", 10, {}};
  run.config.recipe.seed = seed;
  return run;
}

}  // namespace

TEST_CASE("Results: a finished run is found again, by name and seed") {
  const moxie::test::TemporaryFolder folder;
  Results results(folder / "results.jsonl");
  CHECK_FALSE(results.has(named("a", 1)));
  results.add(line_of(named("a", 1)));
  results.add(line_of(named("b", 18446744073709551615U)));
  CHECK(results.has(named("a", 1)));
  CHECK_FALSE(results.has(named("a", 2)));
  const Results again(folder / "results.jsonl");
  CHECK(again.entries() == results.entries());
  CHECK(again.has(named("b", 18446744073709551615U)));
  CHECK(again.entries()[0]["frechet"] == 1.0 / 3);

  Run changed = named("a", 1);
  changed.config.experts = 5;
  CHECK_THROWS_AS(again.has(changed), std::runtime_error);
  changed = named("a", 1);
  changed.steps = 11;
  CHECK_THROWS_AS(again.has(changed), std::runtime_error);
}

TEST_CASE("Results: a last line that was cut off is dropped, and another that is no result is not") {
  const moxie::test::TemporaryFolder folder;
  const auto path = folder / "results.jsonl";
  const std::string good = line_of(named("a", 1)).dump();
  std::ofstream(path) << good << "\n" << good.substr(0, good.size() / 2);
  Results results(path);
  CHECK(results.entries().size() == 1);
  results.add(line_of(named("b", 1)));
  CHECK(Results(path).entries().size() == 2);
  std::ofstream(path) << good << "\n" << line_of(named("b", 1)).dump();  // whole, but for the end of the line
  CHECK(Results(path).entries().size() == 2);
  for (const char* bad : {"{\"name\": 1", "[]", "", "{\"name\": \"a\"}", R"({"name": "a", "steps": 1, "config": {}})"}) {
    std::ofstream(path) << bad << "\n" << good << "\n";
    CHECK_THROWS_AS(Results{path}, std::runtime_error);
  }
}

TEST_CASE("Results: a pipe is refused at once") {
  const moxie::test::TemporaryFolder folder;
  REQUIRE(mkfifo((folder / "results.jsonl").c_str(), 0600) == 0);
  CHECK_THROWS_WITH_AS(Results(folder / "results.jsonl"), doctest::Contains("is not a regular file"), std::runtime_error);
}

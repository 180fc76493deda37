// SPDX-License-Identifier: MIT
#pragma once

#include <dit/configuration.hpp>
#include <dit/files.hpp>
#include <filesystem>
#include <limits>
#include <set>
#include <stdexcept>

/// What is trained, and how it is measured: one JSON file.
namespace compare {

using dit::Index;

/// How every run is measured. Counts are of images.
struct Measures {
  std::int64_t every = 250;  ///< steps between two validation losses
  Index validation = 2000;
  Index samples = 1000;  ///< drawn, and real ones beside them
  std::string sampling_steps = "25";
  double guidance = 3;
  Index neighbours = 3;  ///< of precision and recall
  std::int64_t classifier_steps = 6000;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Measures, every, validation, samples, sampling_steps, guidance, neighbours,
                                                classifier_steps)

/// One model from the first step to the last: a line of the results.
struct Run {
  std::string name;
  std::string group;
  std::int64_t steps = 0;
  dit::TrainingConfig config;  ///< with the seed
};

/// A file of runs:
///
///     {"measures": {...},
///      "base": {"batch": 48, ...},                         what all runs have in common, fields of TrainingConfig
///      "groups": [{"name": "main", "steps": 2000, "seeds": [1, 2, 3],
///                  "runs": [{"name": "dense", "set": {"feed_forward": "dense"}}, ...],
///                  "beside": {"8 experts": "shared", ...}}],                 runs of other groups, as the group's tables call
///                  them
///      "claims": [{"claim": "...", "source": "...", "group": "main", "better": "shared", "than": "dense"}, ...]}
///
/// Fields are merged into one another (RFC 7396). "beside" and "claims" are for report.py. Throws std::runtime_error that names
/// the file for what is not understood.
struct Experiment {
  Measures measures;
  std::vector<Run> runs;

  static Experiment read(const std::filesystem::path& path) {
    const std::string text = dit::read_file(path);
    try {
      return parse(nlohmann::json::parse(text, nullptr, true, true));
    } catch (const std::exception& error) {
      throw std::runtime_error(path.string() + ": " + error.what());
    }
  }

  /// Leaves the first group with one seed.
  void leave_first_group() {
    const Run first = runs.front();
    std::erase_if(
        runs, [&](const Run& run) { return run.group != first.group || run.config.recipe.seed != first.config.recipe.seed; });
  }

  /// Leaves that with a twentieth of the steps and a fifth of the images: a look at everything in minutes.
  void shorten() {
    leave_first_group();
    const auto shorter = [](auto n, auto parts, auto least) { return std::max<decltype(n)>(n / parts, least); };
    for (Run& run : runs) {
      run.steps = shorter(run.steps, 20, 1);
    }
    measures.every = shorter(measures.every, 5, 1);
    measures.validation = shorter(measures.validation, 5, 1);
    measures.samples = shorter(measures.samples, 5, measures.neighbours + 1);
    measures.classifier_steps = shorter(measures.classifier_steps, 5, 1);
  }

  static Experiment parse(const nlohmann::json& file) {
    expect_keys(file, {"measures", "base", "groups", "claims"}, "the file");
    Experiment experiment;
    experiment.measures = understood<Measures>(file.value("measures", nlohmann::json::object()), "measures");
    const Measures& m = experiment.measures;
    moxie::detail::expect_value(m.every >= 1 && m.validation >= 1 && m.samples >= 2 && m.neighbours >= 1 &&
                                    m.samples > m.neighbours && m.classifier_steps >= 1,
                                "measures", "counts must be at least 1, and more samples than neighbours");
    std::set<std::pair<std::string, std::uint64_t>> seen;
    for (const nlohmann::json& group : file.at("groups")) {
      expect_keys(group, {"name", "steps", "seeds", "runs", "beside"}, "a group");
      for (const nlohmann::json& entry : group.at("runs")) {
        expect_keys(entry, {"name", "set"}, "a run");
        nlohmann::json config = file.value("base", nlohmann::json::object());
        config.merge_patch(entry.value("set", nlohmann::json::object()));
        Run run{entry.at("name"),
                group.at("name"),
                std::int64_t(whole_number(group.at("steps"), "steps", std::numeric_limits<std::int64_t>::max())),
                {}};
        run.config = understood<dit::TrainingConfig>(config, run.name);
        moxie::detail::expect_value(run.steps >= 1, run.name, "steps must be at least 1");
        for (const nlohmann::json& number : group.at("seeds")) {
          const std::uint64_t seed = whole_number(number, "a seed");
          moxie::detail::expect_value(seen.insert({run.name, seed}).second, run.name, "is there twice with one seed");
          run.config.recipe.seed = seed;
          experiment.runs.push_back(run);
        }
      }
    }
    moxie::detail::expect_value(!experiment.runs.empty(), "groups", "there is no run");
    expect_names(file, experiment.runs);
    return experiment;
  }

 private:
  static void expect_keys(const nlohmann::json& object, const std::set<std::string>& known, const std::string& what) {
    moxie::detail::expect_value(object.is_object(), what, "is not an object");
    for (const auto& [key, value] : object.items()) {
      moxie::detail::expect_value(known.contains(key), what, "has '" + key + "', which is not understood");
    }
  }
  /// A number that is neither negative, nor rounded, nor too large for its type. Throws ValueError.
  static std::uint64_t whole_number(const nlohmann::json& number, const std::string& what,
                                    std::uint64_t most = std::numeric_limits<std::uint64_t>::max()) {
    const bool whole = number.is_number_unsigned() || (number.is_number_integer() && number.get<std::int64_t>() >= 0);
    const std::uint64_t value = whole ? number.get<std::uint64_t>() : 0;
    moxie::detail::expect_value(whole && value <= most, what,
                                "is " + number.dump() + ", expected a whole number from 0 to " + std::to_string(most));
    return value;
  }
  /// What "beside" and "claims" name has to be there.
  static void expect_names(const nlohmann::json& file, const std::vector<Run>& runs) {
    std::set<std::string> all;
    std::map<std::string, std::set<std::string>> of_group;
    for (const Run& run : runs) {
      all.insert(run.name);
      of_group[run.group].insert(run.name);
    }
    for (const nlohmann::json& group : file.at("groups")) {
      const std::string& name = group.at("name").get_ref<const std::string&>();
      for (const auto& [here, run] : group.value("beside", std::map<std::string, std::string>())) {
        moxie::detail::expect_value(all.contains(run), name, "there is no run '" + run + "' to stand beside its own");
        moxie::detail::expect_value(of_group[name].insert(here).second, name, "has two runs '" + here + "'");
      }
    }
    for (const nlohmann::json& claim : file.value("claims", nlohmann::json::array())) {
      expect_keys(claim, {"claim", "source", "group", "better", "than", "by"}, "a claim");
      const std::string& what = claim.at("claim").get_ref<const std::string&>();
      for (const char* side : {"better", "than"}) {
        const std::string& name = claim.at(side).get_ref<const std::string&>();
        moxie::detail::expect_value(of_group[claim.at("group")].contains(name), what,
                                    "there is no run '" + name + "' in its group");
      }
    }
  }
  /// The default with what `patch` says; of which nothing may be left over.
  template <class T>
  static T understood(const nlohmann::json& patch, const std::string& what) {
    nlohmann::json merged = T{};
    merged.merge_patch(patch);
    T value = merged.get<T>();
    for (const nlohmann::json& change : nlohmann::json::diff(merged, value)) {
      throw moxie::ValueError(what + ": " + change["path"].get<std::string>() + " is not understood");
    }
    return value;
  }
};

}  // namespace compare

// SPDX-License-Identifier: MIT
#pragma once

#include <compare/experiment.hpp>
#include <moxie/io/safetensors.hpp>

namespace compare {

/// Finished runs as JSON lines, each an object with the run's "name", "group", "steps" and "config", and what was measured.
class Results {
 public:
  /// What the file holds, nothing where there is none. A last line that was cut off is dropped. Throws std::runtime_error for
  /// another that is not a result.
  explicit Results(std::filesystem::path path) : path_(std::move(path)) {
    const std::string text = dit::read_file_if_there(path_).value_or("");
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = std::min(text.find('\n', at), text.size());
      const std::string line = text.substr(at, end - at);
      at = end + 1;
      const nlohmann::json entry = nlohmann::json::parse(line, nullptr, false);
      const bool result = entry.is_object() && entry.contains("name") && entry.contains("steps") && entry.contains("config") &&
                          entry["config"].is_object() && entry["config"].contains("recipe") &&
                          entry["config"]["recipe"].is_object() && entry["config"]["recipe"].contains("seed");
      if (!result && end < text.size()) {
        throw std::runtime_error(path_.string() + ": line " + std::to_string(entries_.size() + 1) + " is not a result");
      }
      if (result) {
        entries_.push_back(entry);
      }
    }
  }

  const std::vector<nlohmann::json>& entries() const { return entries_; }

  /// Whether this run has been finished. Throws std::runtime_error if one of its name and seed was of another kind.
  bool has(const Run& run) const {
    const nlohmann::json config = run.config;
    for (const nlohmann::json& entry : entries_) {
      if (entry["name"] == run.name && entry["config"]["recipe"]["seed"] == run.config.recipe.seed) {
        if (entry["config"] != config || entry["steps"] != run.steps) {
          throw std::runtime_error(path_.string() + ": has a run '" + run.name + "' of seed " +
                                   std::to_string(run.config.recipe.seed) +
                                   " with other options: choose another --out, or take it out");
        }
        return true;
      }
    }
    return false;
  }

  /// Adds a line. The file is replaced when the new one is complete. Throws SafetensorsError if it cannot be.
  void add(const nlohmann::json& entry) {
    entries_.push_back(entry);
    moxie::ReplacementFile file(path_);
    for (const nlohmann::json& line : entries_) {
      const std::string text = line.dump() + "\n";
      file.write(text.data(), text.size());
    }
    file.commit();
  }

 private:
  std::filesystem::path path_;
  std::vector<nlohmann::json> entries_;
};

}  // namespace compare

// SPDX-License-Identifier: MIT
#pragma once

#include <dit/files.hpp>
#include <dit/training.hpp>
#include <filesystem>
#include <fstream>
#include <locale>
#include <nlohmann/json.hpp>

namespace dit {

/// The steps of a training as JSON lines: an object for each, in order, written when it is done.
///
///     {"step":1,"loss":1.98,"balance_loss":0.04,"gradient_norm":2.1,"max_load":1.4,"images_per_second":370}
class TrainingLog {
 public:
  /// Goes on with what an old file says of the first `steps` steps; later ones, which a checkpoint does not have, are dropped,
  /// and so is a line that was cut off. Throws std::runtime_error if the file cannot be written, or is no regular one.
  TrainingLog(const std::filesystem::path& path, std::int64_t steps) : path_(path) {
    std::string kept;
    std::int64_t last = 0;
    const std::string old = read_file_if_there(path).value_or("");
    for (std::size_t at = 0, end = 0; steps > 0 && (end = old.find('\n', at)) != std::string::npos; at = end + 1) {
      const std::string line = old.substr(at, end - at);
      const nlohmann::json entry = nlohmann::json::parse(line, nullptr, false);
      const auto step = entry.is_object() ? entry.value("step", nlohmann::json()) : nlohmann::json();
      if (step.is_number_integer() && step > last && step <= steps) {
        kept += line + '\n';
        last = step.get<std::int64_t>();
      }
    }
    moxie::ReplacementFile file(path);
    file.write(kept.data(), kept.size());
    file.commit();
    out_.imbue(std::locale::classic());
    out_.open(path, std::ios::binary | std::ios::app);
  }

  /// Throws std::runtime_error if it cannot be written.
  void add(std::int64_t step, const StepReport& report, double images_per_second) {
    nlohmann::ordered_json line;
    line["step"] = step;
    line["loss"] = report.loss;
    line["balance_loss"] = report.balance_loss;
    line["gradient_norm"] = report.gradient_norm;
    line["max_load"] = report.max_load;
    line["images_per_second"] = images_per_second;
    out_ << line.dump() << std::endl;
    if (!out_) {
      throw std::runtime_error(path_.string() + ": cannot be written");
    }
  }

 private:
  std::filesystem::path path_;
  std::ofstream out_;
};

}  // namespace dit

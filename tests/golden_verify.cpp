// SPDX-License-Identifier: MIT
// Compares the layers with what the reference implementations computed. `golden_verify --help` says how.
#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <moxie/io/safetensors.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "golden_verify/deepseek_moe.hpp"
#include "golden_verify/diffusion.hpp"
#include "golden_verify/dit_model.hpp"
#include "golden_verify/ditmoe_block.hpp"
#include "golden_verify/golden_case.hpp"
#include "golden_verify/softmoe.hpp"
#include "golden_verify/switchdit.hpp"
#include "golden_verify/vmoe.hpp"
#if defined(MOXIE_GOLDEN_DEVICE)
#include "cuda/on_device.hpp"
#endif

namespace {

using golden::GoldenCase;
using golden::GoldenError;

/// A kind of golden file: `name` begins the metadata entry `case` of each. A new one is a header beside the others, with a
/// function that reads the hyper-parameters, requires the tensors, runs the layer and compares, and a line here.
struct Family {
  std::string_view name;
  void (*in_double)(GoldenCase&);
  void (*in_float)(GoldenCase&);
  void (*device_double)(GoldenCase&) = nullptr;  ///< of the CUDA backend, for families of layers that it has
  void (*device_float)(GoldenCase&) = nullptr;
};

#if defined(MOXIE_GOLDEN_DEVICE)
using moxie::test::OnDevice;
#define MOXIE_GOLDEN_LAYER(verify) \
  golden::verify<double>, golden::verify<float>, golden::verify<double, OnDevice>, golden::verify<float, OnDevice>
#else
#define MOXIE_GOLDEN_LAYER(verify) golden::verify<double>, golden::verify<float>
#endif

constexpr std::array families{
    Family{"capacity_table", golden::verify_capacity_table<double>, golden::verify_capacity_table<float>},
    Family{"deepseek_moe", MOXIE_GOLDEN_LAYER(verify_deepseek_moe)},
    Family{"dense_dit", golden::verify_dense_dit<double>, golden::verify_dense_dit<float>},
    Family{"diffusion_schedule", golden::verify_diffusion_schedule<double>, golden::verify_diffusion_schedule<float>},
    Family{"diffusion_steps", golden::verify_diffusion_steps<double>, golden::verify_diffusion_steps<float>},
    Family{"ditmoe_block", MOXIE_GOLDEN_LAYER(verify_ditmoe_block)},
    Family{"ditmoe_model", golden::verify_ditmoe_model<double>, golden::verify_ditmoe_model<float>},
    Family{"expert_choice", MOXIE_GOLDEN_LAYER(verify_expert_choice)},
    Family{"flash_attention_qknorm", golden::verify_flash_attention<double>, golden::verify_flash_attention<float>},
    Family{"rectified_flow", golden::verify_rectified_flow<double>, golden::verify_rectified_flow<float>},
    Family{"routing_ties", golden::verify_routing_ties<double>, golden::verify_routing_ties<float>},
    Family{"softmoe", MOXIE_GOLDEN_LAYER(verify_softmoe)},
    Family{"switchdit_model", golden::verify_switchdit_model<double>, golden::verify_switchdit_model<float>},
    Family{"switchdit_prior", golden::verify_switchdit_prior<double>, golden::verify_switchdit_prior<float>},
    Family{"switchdit_taskmoe", golden::verify_switchdit_taskmoe<double>, golden::verify_switchdit_taskmoe<float>},
    Family{"topk_capacity", MOXIE_GOLDEN_LAYER(verify_topk_capacity)},
};

constexpr int most_failures = 76;  // below the other meanings
constexpr int usage_error = 126;
constexpr int nothing_verified = 77;  // ctest's and automake's "skipped"

/// The family with the longest name that the case begins with. Throws GoldenError if there is none.
const Family& family_of(std::string_view name) {
  const Family* best = nullptr;
  for (const Family& family : families) {
    if (name.starts_with(family.name) && (best == nullptr || family.name.size() > best->name.size())) {
      best = &family;
    }
  }
  if (best == nullptr) {
    throw GoldenError("the family of case '" + moxie::printable(name) + "' is unknown");
  }
  return *best;
}

void print_report(const GoldenCase& golden) {
  for (const GoldenCase::Group& group : golden.groups()) {
    std::printf("  %-48s %4td tensor%s  error %-8.2e  tolerance %-6.0e  %s%s%s%s\n", group.name.c_str(), group.tensors,
                group.tensors == 1 ? " " : "s", group.error, group.tolerance, group.ok() ? "ok" : "BAD",
                group.note.empty() ? "" : "  (", group.note.c_str(), group.note.empty() ? "" : ")");
  }
  for (const std::string& tensor : golden.left_out()) {
    std::printf("  not compared: %s\n", tensor.c_str());
  }
}

/// A file that the backend has no layer for.
struct Skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What is wrong with a file, empty for one that passes.
std::vector<std::string> verify(const std::string& path, bool in_double, bool on_device) {
  try {
    const moxie::SafetensorsFile file(path);
    GoldenCase golden(file, in_double ? golden::tolerance<double> : golden::tolerance<float>);
    const std::string& name = golden.text("case");
    const Family& family = family_of(name);
    if (on_device && family.device_double == nullptr) {
      throw Skipped("the CUDA backend has no layer of the family '" + std::string(family.name) + "'");
    }
    std::printf("%s: %s in %s%s\n", path.c_str(), std::string(family.name).c_str(), in_double ? "double" : "float",
                on_device ? ", CUDA backend" : "");
    const auto run =
        on_device ? (in_double ? family.device_double : family.device_float) : (in_double ? family.in_double : family.in_float);
    run(golden);
    print_report(golden);
    return golden.failures();
  } catch (const Skipped&) {
    throw;
  } catch (const std::exception& error) {
    const std::string message = error.what();
    const std::string prefix = path + ": ";  // which the line begins with anyway
    return {message.substr(message.starts_with(prefix) ? prefix.size() : 0)};
  } catch (...) {
    return {"unknown error"};
  }
}

enum class Outcome { passed, failed, skipped };

Outcome report(const std::string& path, bool in_double, bool on_device) {
  constexpr std::size_t most = 3;
  std::vector<std::string> failures;
  try {
    failures = verify(path, in_double, on_device);
  } catch (const Skipped& reason) {
    std::printf("SKIP %s: %s\n", path.c_str(), reason.what());
    return Outcome::skipped;
  }
  std::string reason;
  for (std::size_t i = 0; i < std::min(most, failures.size()); ++i) {
    reason += (i > 0 ? "; " : "") + failures[i];
  }
  if (failures.size() > most) {
    reason += "; and " + std::to_string(failures.size() - most) + " more";
  }
  if (failures.empty()) {
    std::printf("PASS %s\n", path.c_str());
  } else {
    std::printf("FAIL %s: %s\n", path.c_str(), reason.c_str());
  }
  std::fflush(stdout);
  return failures.empty() ? Outcome::passed : Outcome::failed;
}

void print_usage(std::FILE* to) {
  std::string names;
  for (const Family& family : families) {
    names += (names.empty() ? "" : ", ") + std::string(family.name);
  }
  std::fprintf(
      to,
      "usage: golden_verify [--scalar double|float] [--backend cpu|BACKEND] FILE...\n"
      "\n"
      "Runs the layer that each golden file describes, and compares every output, loss, routing, intermediate and\n"
      "gradient tensor of the file. One line a group of tensors, PASS, FAIL or SKIP a file.\n"
      "\n"
      "  --scalar double|float   what the layer computes in (default: double)\n"
      "  --backend cpu|BACKEND   whose layers: the CPU's (default), or those of the CUDA backend, where they are built:\n"
      "                          thrust-host, its host build, or cuda, on a device\n"
      "  --help                  this text\n"
      "\n"
      "error      max |result - reference| / max |reference|, each over one tensor; the worst of the group is shown.\n"
      "           Where a whole reference tensor is zero, so must be the result. The gradient of a balance loss that\n"
      "           is constant (all experts chosen equally often) is zero but for rounding: there the error is\n"
      "           relative to the terms that cancel, and the one number loss/total, a signed sum, relative to the sum\n"
      "           of the absolute terms; the line says so. NaN is an infinite error.\n"
      "tolerance  %.0e in double, %.0e in float. Counts have to be equal, and so have the experts of each token,\n"
      "           in any order. A tensor that nothing is compared with fails the file, unless it is named as 'not\n"
      "           compared' with a reason.\n"
      "families   %s: the longest that metadata 'case' begins with\n"
      "exit       the number of files that failed, at most %d; %d for wrong arguments, %d if all were skipped, because the\n"
      "           backend has no layer for them\n",
      golden::tolerance<double>, golden::tolerance<float>, names.c_str(), most_failures, usage_error, nothing_verified);
}

int wrong_usage(const std::string& problem) {
  std::fprintf(stderr, "golden_verify: %s\n\n", problem.c_str());
  print_usage(stderr);
  return usage_error;
}

/// Whether argument i is this option, as `--option value` or `--option=value`; i is then that of the value, which is empty
/// where there is none.
bool option_of(const std::string& option, const std::vector<std::string>& arguments, std::size_t& i, std::string& value) {
  if (arguments[i].starts_with(option + "=")) {
    value = arguments[i].substr(option.size() + 1);
    return true;
  }
  if (arguments[i] != option) {
    return false;
  }
  value = i + 1 < arguments.size() ? arguments[++i] : "";
  return true;
}

/// Whether the backend of that name is built in; `device` becomes whether it is the CUDA backend.
bool find_backend(const std::string& name, bool& device) {
  device = name != "cpu";
#if defined(MOXIE_GOLDEN_DEVICE)
  const std::string built = moxie::test::device_name();
  return !device || (!built.empty() && name == (built == "thrust-host" ? built : "cuda"));
#else
  return !device;
#endif
}

int run(const std::vector<std::string>& arguments) {
  bool in_double = true;
  bool on_device = false;
  bool options = true;
  std::vector<std::string> files;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (!options || !argument.starts_with('-')) {
      files.push_back(argument);
    } else if (argument == "--") {
      options = false;
    } else if (argument == "--help" || argument == "-h") {
      print_usage(stdout);
      return 0;
    } else if (std::string backend; option_of("--backend", arguments, i, backend)) {
      if (!find_backend(backend, on_device)) {
        return wrong_usage("the backend '" + backend + "' is not in this program, or there is no device");
      }
    } else if (std::string scalar; option_of("--scalar", arguments, i, scalar)) {
      if (scalar != "double" && scalar != "float") {
        return wrong_usage("the scalar is '" + scalar + "', expected double or float");
      }
      in_double = scalar == "double";
    } else {
      return wrong_usage("unknown option '" + argument + "'");
    }
  }
  if (files.empty()) {
    return wrong_usage("no files");
  }
  std::ptrdiff_t failed = 0;
  std::size_t skipped = 0;
  for (const std::string& file : files) {
    const Outcome outcome = report(file, in_double, on_device);
    failed += outcome == Outcome::failed ? 1 : 0;
    skipped += outcome == Outcome::skipped ? 1 : 0;
  }
  if (skipped == files.size()) {
    return nothing_verified;
  }
  return static_cast<int>(std::min<std::ptrdiff_t>(failed, most_failures));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "golden_verify: %s\n", error.what());
    return usage_error;
  }
}

// SPDX-License-Identifier: MIT
#include <benchmark/benchmark.h>

#include <benchmarks.hpp>
#include <cstdlib>
#include <iostream>
#include <moxie/kernel/instruction_set.hpp>
#include <string>
#include <string_view>

// Google Benchmark's options, and `--threads=N`.
int main(int argc, char** argv) {
  moxie::Exec exec;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    constexpr std::string_view name = "--threads=";
    if (option.substr(0, name.size()) == name) {
      exec.threads = std::atoi(argv[i] + name.size());
      if (exec.threads < 1) {
        std::cerr << argv[i] << ": at least one thread expected\n";
        return 2;
      }
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 2;
  }
  benchmark::AddCustomContext("instructions", std::string(moxie::kernel::built_for().name));
  benchmark::AddCustomContext("threads", std::to_string(exec.thread_count()));
  for (const auto& add : moxie::bench::registrations()) {
    add(exec);
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

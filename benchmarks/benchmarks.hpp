// SPDX-License-Identifier: MIT
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <machine.hpp>
#include <string>
#include <vector>

namespace moxie::bench {

/// What adds the benchmarks of a file, once the options are known.
using Registration = std::function<void(const Exec&)>;

inline std::vector<Registration>& registrations() {
  static std::vector<Registration> all;
  return all;
}

struct Register {
  explicit Register(Registration add) { registrations().push_back(std::move(add)); }
};

/// The least work that a step, or a phase of it, can do.
struct Work {
  double flops = 0;
  double bytes = 0;
};

/// Runs `step` and reports GFLOP/s, the fraction of the multiply-add peak, and of the step's own bound: for each of its phases,
/// which wait for each other, the larger of flops / peak and bytes / read bandwidth. The limits are measured before and after,
/// so that they and the step meet the same machine.
template <class Element, class Step>
void measure(benchmark::State& state, const Exec& exec, const std::vector<Work>& phases, Step&& step) {
  step();  // takes the memory that a step needs,
  step();  // and touches it once it has been put together
  using Scalar = std::conditional_t<std::is_same_v<Element, BFloat16>, float, Element>;
  const double peak_before = fma_peak<Scalar, Element>(exec);
  const double bandwidth_before = read_bandwidth(exec);
  const double start = seconds();
  for (auto _ : state) {
    step();
  }
  const double time = (seconds() - start) / double(state.iterations());
  const double peak = (peak_before + fma_peak<Scalar, Element>(exec)) / 2;
  const double bandwidth = (bandwidth_before + read_bandwidth(exec)) / 2;
  double flops = 0;
  double bound = 0;
  for (const Work& phase : phases) {
    flops += phase.flops;
    bound += std::max(phase.flops / peak, phase.bytes / bandwidth);
  }
  state.counters["gflops"] = flops / time / 1e9;
  state.counters["peak_fraction"] = flops / time / peak;
  state.counters["bound_fraction"] = bound / time;
}

}  // namespace moxie::bench

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
/// which wait for each other, the larger of flops / peak and bytes / read bandwidth; and whether the threads' cores are far
/// apart.
///
/// A processor's clock changes from one millisecond to the next, so the peak is measured again every few milliseconds, between
/// steps, and the fraction is the median of those of the times between: each with the peaks before and after it. They take a
/// millisecond: multiply-adds in registers need less power than products, and let some processors' clock rise after two. The
/// bandwidth, whose measurement empties caches, is measured before and after all steps.
template <class Element, class Step>
void measure(benchmark::State& state, const Exec& exec, const std::vector<Work>& phases, Step&& step) {
  using Scalar = std::conditional_t<std::is_same_v<Element, BFloat16>, float, Element>;
  constexpr double between_peaks = 4e-3;  // seconds
  const auto measure_peak = [&] { return (fma_peak<Scalar, Element>(exec) + fma_peak<Scalar, Element>(exec)) / 2; };
  double flops = 0;
  for (const Work& phase : phases) {
    flops += phase.flops;
  }
  const double bandwidth_before = read_bandwidth(exec);
  const double handover_before = handover(exec);
  step();  // takes the memory that a step needs,
  step();  // and touches it once it has been put together
  std::vector<double> times, peaks, fractions;
  double peak = measure_peak();
  double start = seconds();
  double steps = 0;
  const auto end_part = [&] {
    const double time = (seconds() - start) / steps;
    const double next = measure_peak();
    times.push_back(time);
    peaks.push_back((peak + next) / 2);
    fractions.push_back(flops / time / peaks.back());
    peak = next;
    steps = 0;
    start = seconds();
  };
  for (auto _ : state) {
    step();
    ++steps;
    if (seconds() - start >= between_peaks) {
      state.PauseTiming();
      end_part();
      state.ResumeTiming();
    }
  }
  if (steps > 0) {
    end_part();
  }
  const double handover_after = handover(exec);
  const double bandwidth = (bandwidth_before + read_bandwidth(exec)) / 2;
  const auto median = [](std::vector<double>& of) {
    const auto middle = of.begin() + std::ptrdiff_t(of.size() / 2);
    std::nth_element(of.begin(), middle, of.end());
    return *middle;
  };
  const double time = median(times);
  const double usual_peak = median(peaks);
  double bound = 0;
  for (const Work& phase : phases) {
    bound += std::max(phase.flops / usual_peak, phase.bytes / bandwidth);
  }
  state.counters["gflops"] = flops / time / 1e9;
  state.counters["peak_fraction"] = median(fractions);
  state.counters["bound_fraction"] = bound / time;
  state.counters["handover_ns"] = std::max(handover_before, handover_after) * 1e9;
}

}  // namespace moxie::bench

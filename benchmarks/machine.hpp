// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <limits>
#include <moxie/core/buffer.hpp>
#include <moxie/core/exec.hpp>
#include <moxie/kernel/element.hpp>
#include <numeric>
#include <vector>

/// What this machine can do, measured: the limits that benchmarks compare with.
namespace moxie::bench {

inline double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The products' multiply-adds in registers, all threads at once, in the widest vectors of this build: fused ones of Scalars,
/// or, where Elements are BFloat16, dot products of pairs: operations a second, each thread by its own clock. Half a
/// millisecond.
template <class Scalar, class Element = Scalar>
double fma_peak(const Exec& exec) {
  using B = kernel::Batch<Scalar>;
  using Step = kernel::detail::Step<Scalar, Element, kernel::DefaultArch>;
  constexpr int sums = 12;  // more than latency x pipes, and they fit 16 registers
  constexpr long steps = 250'000;
  constexpr double operations = 2.0 * double(kernel::UnitOf<Element>::elements * Index{B::size}) * sums * double(steps);
  std::vector<double> rates(std::size_t(exec.thread_count()));
  exec.parallel_for(exec.thread_count(), [&](Index thread) {
    const double start = seconds();
    alignas(alignment) Element ones[kernel::UnitOf<Element>::elements * B::size];
    std::fill(std::begin(ones), std::end(ones), Element(Scalar(1)));
    asm volatile("" : : "r"(ones) : "memory");
    const auto x = Step::broadcast(kernel::detail::unit<Element>(ones, kernel::UnitOf<Element>::elements));
    const auto y = Step::load(reinterpret_cast<const kernel::Unit<Element>*>(ones));
    B sum[sums];
#pragma GCC unroll 16
    for (int i = 0; i < sums; ++i) {
      sum[i] = B(Scalar(i + thread));
    }
    for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < sums; ++i) {
        sum[i] = Step::add(x, y, sum[i]);
      }
    }
    alignas(alignment) Scalar out[B::size];
#pragma GCC unroll 16
    for (int i = 1; i < sums; ++i) {
      sum[0] += sum[i];
    }
    sum[0].store_aligned(out);
    asm volatile("" : : "r"(out) : "memory");
    rates[std::size_t(thread)] = operations / (seconds() - start);
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

/// Bytes a second that all threads read of a block that no cache holds, the best of three times. About 30 ms.
inline double read_bandwidth(const Exec& exec) {
  static const Buffer<double> block = [] {
    Buffer<double> b(Index{32} << 20);
    b.assign(b.size(), 1);
    return b;
  }();
  using B = kernel::Batch<double>;
  const Index part = block.size() / exec.thread_count() / 64 * 64;
  const auto read = [&](Index thread) {
    const double* p = block.data() + thread * part;
    B sum[4] = {B(0.0), B(0.0), B(0.0), B(0.0)};
    for (Index i = 0; i + 4 * Index{B::size} <= part; i += 4 * Index{B::size}) {
#pragma GCC unroll 4
      for (Index j = 0; j < 4; ++j) {
        sum[j] += B::load_aligned(p + i + j * Index{B::size});
      }
    }
    alignas(alignment) double out[B::size];
    (sum[0] + sum[1] + sum[2] + sum[3]).store_aligned(out);
    asm volatile("" : : "r"(out) : "memory");
  };
  double time = std::numeric_limits<double>::infinity();
  for (int repeat = 0; repeat < 3; ++repeat) {
    const double start = seconds();
    exec.parallel_for(exec.thread_count(), read);
    time = std::min(time, seconds() - start);
  }
  return double(part) * double(sizeof(double)) * exec.thread_count() / time;
}

/// Seconds that a cache line takes from one thread to another, the usual one of 400 ways there and back; 0 if there is one
/// thread. Some tens of nanoseconds where their cores share a cache, some hundreds where they don't: a virtual machine's
/// processors move from one to the other.
inline double handover(const Exec& exec) {
  if (exec.thread_count() < 2) {
    return 0;
  }
  constexpr int patience = 20'000'000;  // looks; a team may have fewer threads than it was asked for
  alignas(alignment) std::atomic<int> ball = 0;
  std::array<double, 400> times{};
  const auto wait_for = [&](int value) {
    for (int looks = 0; ball.load() != value; ++looks) {
      if (looks == patience) {
        return false;
      }
    }
    return true;
  };
  exec.parallel_for(2, [&](Index thread) {
    for (int i = 0; i < int(times.size()); ++i) {
      if (thread == 0) {
        const double start = seconds();
        ball = 2 * i + 1;
        if (!wait_for(2 * i + 2)) {
          return;
        }
        times[std::size_t(i)] = (seconds() - start) / 2;
      } else {
        if (!wait_for(2 * i + 1)) {
          return;
        }
        ball = 2 * i + 2;
      }
    }
  });
  const auto middle = times.begin() + times.size() / 2;
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

}  // namespace moxie::bench

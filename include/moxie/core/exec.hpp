// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <moxie/core/error.hpp>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace moxie {

/// Where work runs: the number of threads. The only place that knows OpenMP; compiled without it, everything runs on one
/// thread.
///
/// Results never depend on the number of threads: tasks are cut so that each output element is computed by one task, in an
/// order that the task alone decides.
struct Exec {
  /// 0 takes what the runtime offers (OMP_NUM_THREADS, or one thread a core).
  int threads = 0;

  int thread_count() const {
#if defined(_OPENMP)
    return threads > 0 ? threads : (std::max)(1, omp_get_max_threads());
#else
    return 1;
#endif
  }

  /// Calls `task(i)` for i = 0, ..., n-1, each once, on any thread; threads claim the next index when they are free, so that
  /// all lower ones have been claimed before: a task may wait for those.
  ///
  /// No exception crosses the parallel region: the one of the lowest index is thrown after all tasks have ended. Inside another
  /// parallel region the calling thread runs everything.
  template <class Task>
  void parallel_for(Index n, Task&& task) const {
#if defined(_OPENMP)
    const int count = int(std::min<Index>(thread_count(), n));
    if (count > 1 && omp_in_parallel() == 0) {
      std::exception_ptr error;
      Index error_index = n;
      std::atomic<Index> next{0};
#pragma omp parallel num_threads(count)
      for (Index i = next++; i < n; i = next++) {
        try {
          task(i);
        } catch (...) {
#pragma omp critical(moxie_parallel_for_error)
          if (i < error_index) {
            error_index = i;
            error = std::current_exception();
          }
        }
      }
      if (error) {
        std::rethrow_exception(error);
      }
      return;
    }
#endif
    for (Index i = 0; i < n; ++i) {
      task(i);
    }
  }

  /// Calls `range(begin, end)` for pieces of at most `grain` indices that cover [0, n).
  template <class Range>
  void parallel_ranges(Index n, Index grain, Range&& range) const {
    parallel_for((n + grain - 1) / grain, [&](Index i) { range(i * grain, (std::min)(n, (i + 1) * grain)); });
  }
};

}  // namespace moxie

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <moxie/core/error.hpp>
#include <moxie/core/float_mode.hpp>
#include <moxie/core/function_ref.hpp>
#include <moxie/core/index.hpp>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__STDCPP_THREADS__)
#include <thread>
#endif

namespace moxie::inline MOXIE_NAMESPACE {

/// A user's threads in place of OpenMP's: a thread pool, a task system, a team of a larger program.
///
/// An executor runs *workers*, not tasks. Each worker claims one task after the other, in order,
/// until none is left. A task may wait for lower ones.
class Executor {
 public:
  virtual ~Executor() = default;

  /// Calls `worker(i)` for i = 0, ..., workers-1, at most once each, on any threads, and returns
  /// when all calls have returned.
  ///
  /// * It may leave out calls, even all of them: the calling thread then runs the remaining tasks.
  ///   So an executor that is called inside a worker (nested use) and has no free thread simply
  ///   returns.
  /// * Workers may run one after the other. A worker that has begun must go on. A suspended worker
  ///   (a fiber, a coroutine) holds a task, and another worker may wait for it.
  /// * The calling thread may run one of them or only wait. If it only waits, `Exec::progress` is
  ///   not called meanwhile, unless the executor calls it.
  ///
  /// Workers do not throw. An exception of `run` itself goes to the caller of the algorithm;
  /// results are then undefined.
  virtual void run(int workers, FunctionRef<void(int)> worker) = 0;

  /// The number of workers if `Exec::threads` is 0.
  virtual int width() const { return 1; }

 protected:
  Executor() = default;
  Executor(const Executor&) = default;
  Executor& operator=(const Executor&) = default;
};

/// The threads of a call: their number, and their owner. Only this header knows OpenMP. Compiled
/// without OpenMP and without an executor, everything runs on the calling thread.
///
/// Results never depend on the number of threads: one task computes each output element, in an
/// order that only the task decides. All threads compute in the calling thread's mode
/// (`FloatMode`).
///
/// `Exec{1}` touches neither OpenMP nor the executor. It is safe in a forked child and in
/// destructors of static objects.
struct Exec {
  /// 0: the runtime's number (OMP_NUM_THREADS, or one thread a core), or the executor's width.
  int threads = 0;
  /// Null: OpenMP's threads.
  Executor* executor = nullptr;
  /// The calling thread calls it between its tasks, and while it waits for tasks of OpenMP's other
  /// threads. It serves communication without a thread of its own (MPI_Test). It must not throw.
  void (*progress)(void*) = nullptr;
  void* progress_data = nullptr;

  int thread_count() const {
    if (threads > 0) {
#if !defined(_OPENMP)
      return executor != nullptr ? threads : 1;
#else
      return threads;
#endif
    }
    if (executor != nullptr) {
      return (std::max)(1, executor->width());
    }
#if defined(_OPENMP)
    return (std::max)(1, omp_get_max_threads());
#else
    return 1;
#endif
  }

  /// Calls `task(i)` for i = 0, ..., n-1, each once, on any thread. A free thread claims the next
  /// index. So all lower indices were claimed before, and a task may wait for them.
  ///
  /// If tasks throw, the exception of the lowest index is thrown after all tasks have ended. Inside
  /// an OpenMP parallel region the calling thread runs everything.
  void parallel_for(Index n, FunctionRef<void(Index)> task) const;

  /// The same, and a task gets the number of its worker, from 0 to thread_count()-1. Tasks that run
  /// at the same time have different numbers.
  void parallel_for_workers(Index n, FunctionRef<void(Index, int)> task) const;

  /// Calls `range(begin, end)` for pieces of at most `grain` indices that cover [0, n).
  void parallel_ranges(Index n, Index grain, FunctionRef<void(Index, Index)> range) const;
};

namespace detail {

/// The tasks of one call, shared by its workers.
class TaskList {
 public:
  TaskList(const Exec& exec, Index n, FunctionRef<void(Index, int)> task) : exec_(exec), task_(task), n_(n), error_index_(n) {}

  /// Runs tasks until all are claimed.
  void work(int worker) {
    const FloatMode::Scope scope(mode_);
    const bool progresses = exec_.progress != nullptr && is_caller();
    for (Index i = next_++; i < n_; i = next_++) {
      try {
        task_(i, worker);
      } catch (...) {
        keep_error(i);
      }
      finished_.fetch_add(1, std::memory_order_release);
      if (progresses) {
        exec_.progress(exec_.progress_data);
      }
    }
  }
  /// On the calling thread, after its worker: progress while others finish their last tasks.
  void wait() {
    while (exec_.progress != nullptr && finished_.load(std::memory_order_acquire) < n_) {
      exec_.progress(exec_.progress_data);
    }
  }
  void rethrow_error() const {
    if (error_) {
      std::rethrow_exception(error_);
    }
  }

 private:
  [[gnu::cold, gnu::noinline]] void keep_error(Index i) {
    while (locked_.exchange(true, std::memory_order_acquire)) {
    }
    if (i < error_index_) {
      error_index_ = i;
      error_ = std::current_exception();
    }
    locked_.store(false, std::memory_order_release);
  }

#if defined(__STDCPP_THREADS__)
  bool is_caller() const { return std::this_thread::get_id() == caller_; }
  std::thread::id caller_ = std::this_thread::get_id();
#else
  bool is_caller() const { return true; }
#endif
  const Exec& exec_;
  FunctionRef<void(Index, int)> task_;
  FloatMode mode_ = FloatMode::current();
  Index n_;
  std::atomic<Index> next_{0};
  std::atomic<Index> finished_{0};
  std::atomic<bool> locked_{false};
  Index error_index_;
  std::exception_ptr error_;
};

// One function runs all tasks of a program through a pointer. A template would be compiled again
// for every caller.
[[gnu::noinline]] inline void run_in_order(const Exec& exec, Index n, FunctionRef<void(Index, int)> task) {
  for (Index i = 0; i < n; ++i) {
    task(i, 0);
    if (exec.progress != nullptr) {
      exec.progress(exec.progress_data);
    }
  }
}

[[gnu::noinline]] inline void run_tasks(const Exec& exec, Index n, FunctionRef<void(Index, int)> task) {
  const int workers = n > 1 ? int(std::min<Index>(exec.thread_count(), n)) : 1;
  if (workers == 1) {
    run_in_order(exec, n, task);
    return;
  }
  if (exec.executor != nullptr) {
    TaskList tasks(exec, n, task);
    exec.executor->run(workers, [&](int worker) { tasks.work(worker); });
    tasks.work(0);  // the remaining tasks; all workers have ended
    tasks.rethrow_error();
    return;
  }
#if defined(_OPENMP)
  if (omp_in_parallel() == 0) {
    TaskList tasks(exec, n, task);
#pragma omp parallel num_threads(workers)
    {
      tasks.work(omp_get_thread_num());
      if (omp_get_thread_num() == 0) {
        tasks.wait();
      }
    }
    tasks.rethrow_error();
    return;
  }
#endif
  run_in_order(exec, n, task);
}

}  // namespace detail

inline void Exec::parallel_for(Index n, FunctionRef<void(Index)> task) const {
  detail::run_tasks(*this, n, [task](Index i, int /*worker*/) { task(i); });
}

inline void Exec::parallel_for_workers(Index n, FunctionRef<void(Index, int)> task) const { detail::run_tasks(*this, n, task); }

inline void Exec::parallel_ranges(Index n, Index grain, FunctionRef<void(Index, Index)> range) const {
  detail::run_tasks(*this, (n + grain - 1) / grain,
                    [=](Index i, int /*worker*/) { range(i * grain, (std::min)(n, (i + 1) * grain)); });
}

}  // namespace moxie::inline MOXIE_NAMESPACE

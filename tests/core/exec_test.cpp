// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <moxie/core/exec.hpp>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

using moxie::Exec;
using moxie::Index;

TEST_CASE("exec: every index is visited once, by any number of threads") {
  for (const int threads : {0, 1, 2, 7, 50}) {
    for (const Index n : {0, 1, 2, 7, 100}) {
      std::vector<std::atomic<int>> visits(std::size_t(n) + 1);
      Exec{threads}.parallel_for(n, [&](Index i) { ++visits[std::size_t(i)]; });
      for (Index i = 0; i < n; ++i) {
        CHECK(visits[std::size_t(i)] == 1);
      }
      CHECK(visits[std::size_t(n)] == 0);
    }
  }
}

TEST_CASE("exec: ranges cover [0, n) without overlap, none longer than the grain") {
  for (const Index n : {0, 1, 15, 16, 17, 100}) {
    std::vector<std::atomic<int>> visits(std::size_t(n) + 1);
    std::atomic<bool> short_enough = true;
    Exec{3}.parallel_ranges(n, 16, [&](Index begin, Index end) {
      short_enough = short_enough && begin < end && end - begin <= 16;
      for (Index i = begin; i < end; ++i) {
        ++visits[std::size_t(i)];
      }
    });
    CHECK(short_enough);
    for (Index i = 0; i < n; ++i) {
      CHECK(visits[std::size_t(i)] == 1);
    }
  }
}

TEST_CASE("exec: the thread count is what was asked for, or what the runtime offers") {
#if defined(_OPENMP)
  CHECK(Exec{5}.thread_count() == 5);
  CHECK(Exec{}.thread_count() == omp_get_max_threads());
#else
  CHECK(Exec{5}.thread_count() == 1);
  CHECK(Exec{}.thread_count() == 1);
#endif
  CHECK(Exec{}.thread_count() >= 1);
}

TEST_CASE("exec: one thread runs in the caller, in order") {
  std::vector<Index> order;
  const std::thread::id caller = std::this_thread::get_id();
  bool same = true;
  Exec{1}.parallel_for(5, [&](Index i) {
    order.push_back(i);
    same = same && std::this_thread::get_id() == caller;
  });
  CHECK(order == std::vector<Index>{0, 1, 2, 3, 4});
  CHECK(same);
}

#if defined(_OPENMP)
TEST_CASE("exec: more threads than one do work at the same time") {
  // Two tasks that wait for each other.
  std::atomic<int> arrived = 0;
  Exec{2}.parallel_for(2, [&](Index) {
    ++arrived;
    while (arrived < 2) {
      std::this_thread::yield();
    }
  });
  CHECK(arrived == 2);
}
#endif

TEST_CASE("exec: the exception of the lowest index arrives, whatever the number of threads") {
  for (const int threads : {1, 2, 7}) {
    for (int run = 0; run < 10; ++run) {
      std::string message = "nothing was thrown";
      try {
        Exec{threads}.parallel_for(40, [](Index i) {
          if (i % 9 == 5) {
            throw std::runtime_error(std::to_string(i));
          }
        });
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      CHECK(message == "5");
    }
  }
}

#if defined(_OPENMP)
TEST_CASE("exec: the exception of the lowest index arrives also where another one was first") {
  std::atomic<bool> other_threw = false;
  std::string message;
  try {
    Exec{2}.parallel_for(2, [&](Index i) {
      if (i == 0) {
        while (!other_threw) {
          std::this_thread::yield();
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
      }
      other_threw = true;
      throw std::runtime_error(std::to_string(i));
    });
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message == "0");
}
#endif

TEST_CASE("exec: inside a parallel loop the calling thread runs everything") {
  std::mutex mutex;
  std::set<std::thread::id> callers;
  std::atomic<bool> same = true;
  std::atomic<int> visits = 0;
  Exec{3}.parallel_for(6, [&](Index) {
    const std::thread::id caller = std::this_thread::get_id();
    Exec{3}.parallel_for(4, [&](Index) {
      ++visits;
      same = same && std::this_thread::get_id() == caller;
    });
    const std::lock_guard lock(mutex);
    callers.insert(caller);
  });
  CHECK(visits == 24);
  CHECK(same);
}

TEST_CASE("exec: tasks are claimed in order, so a task may wait for lower ones") {
  for (const int threads : {1, 2, 5}) {
    std::vector<std::atomic<bool>> done(200);
    std::atomic<int> waited_in_vain = 0;
    Exec{threads}.parallel_for(200, [&](Index i) {
      const auto start = std::chrono::steady_clock::now();
      while (i > 0 && !done[std::size_t(i - 1)]) {
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(20)) {
          ++waited_in_vain;
          break;
        }
      }
      done[std::size_t(i)] = true;
    });
    CHECK(waited_in_vain == 0);
  }
}

// Executors as users may write them. Threads for workers 1, 2, ..., in the mode of whoever made the executor, as those of a
// pool that lives longer are; the caller is worker 0.
struct Threads : moxie::Executor {
  void run(int workers, moxie::FunctionRef<void(int)> worker) override {
    ++runs;
    std::vector<std::thread> threads;
    for (int i = 1; i < workers; ++i) {
      threads.emplace_back([worker, i, mode = mode_] {
        const moxie::FloatMode::Scope scope(mode);
        worker(i);
      });
    }
    worker(0);
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
  int width() const override { return 3; }
  std::atomic<int> runs = 0;

 private:
  moxie::FloatMode mode_ = moxie::FloatMode::current();
};
// The caller only waits.
struct Others : moxie::Executor {
  void run(int workers, moxie::FunctionRef<void(int)> worker) override {
    std::vector<std::thread> threads;
    for (int i = 0; i < workers; ++i) {
      threads.emplace_back([worker, i] { worker(i); });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
};
// No threads at all, and the last worker first.
struct OneAfterTheOther : moxie::Executor {
  void run(int workers, moxie::FunctionRef<void(int)> worker) override {
    for (int i = workers - 1; i >= 0; --i) {
      worker(i);
    }
  }
};
// Has no thread for anyone.
struct Busy : moxie::Executor {
  void run(int /*workers*/, moxie::FunctionRef<void(int)> /*worker*/) override {}
};
// A pool of one run at a time, as many are: what comes from inside a worker finds it busy.
struct Pool : Threads {
  void run(int workers, moxie::FunctionRef<void(int)> worker) override {
    if (!taken.exchange(true)) {
      Threads::run(workers, worker);
      taken = false;
    }
  }
  std::atomic<bool> taken = false;
};

TEST_CASE_TEMPLATE("exec: an executor runs every task once, a task may wait for lower ones, the lowest exception arrives", E,
                   Threads, Others, OneAfterTheOther, Busy, Pool) {
  E executor;
  for (const int threads : {1, 2, 5}) {
    const Exec exec{.threads = threads, .executor = &executor};
    CHECK(exec.thread_count() == threads);
    constexpr Index n = 60;
    std::vector<std::atomic<int>> visits(n);
    std::vector<std::atomic<bool>> done(n);
    exec.parallel_for(n, [&](Index i) {
      while (i > 0 && !done[std::size_t(i - 1)]) {
        std::this_thread::yield();
      }
      ++visits[std::size_t(i)];
      done[std::size_t(i)] = true;
    });
    CHECK(std::all_of(visits.begin(), visits.end(), [](const auto& count) { return count == 1; }));

    std::atomic<int> ended = 0;
    std::string message = "nothing was thrown";
    try {
      exec.parallel_for(n, [&](Index i) {
        if (i % 9 == 5) {
          throw std::runtime_error(std::to_string(i));
        }
        ++ended;
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message == "5");
    CHECK((threads == 1 || ended == n - 7));
  }
}

TEST_CASE("exec: an executor's width is the number of threads where none is asked for") {
  Threads threads;
  OneAfterTheOther serial;
  CHECK(Exec{.executor = &threads}.thread_count() == 3);
  CHECK(Exec{.executor = &serial}.thread_count() == 1);
}

TEST_CASE("exec: neither one task nor one thread wakes the executor") {
  Threads threads;
  int visits = 0;
  Exec{.threads = 4, .executor = &threads}.parallel_for(1, [&](Index) { ++visits; });
  Exec{.threads = 1, .executor = &threads}.parallel_for(9, [&](Index) { ++visits; });
  Exec{.threads = 4, .executor = &threads}.parallel_for(0, [&](Index) { ++visits; });
  CHECK(visits == 10);
  CHECK(threads.runs == 0);
}

TEST_CASE("exec: loops may be nested on one executor") {
  Pool pool;
  const Exec exec{.threads = 3, .executor = &pool};
  std::atomic<int> visits = 0;
  exec.parallel_for(6, [&](Index) { exec.parallel_for(4, [&](Index) { ++visits; }); });
  CHECK(visits == 24);
  Threads threads;  // which makes threads for each
  const Exec many{.threads = 2, .executor = &threads};
  visits = 0;
  many.parallel_for(6, [&](Index) { many.parallel_for(4, [&](Index) { ++visits; }); });
  CHECK(visits == 24);
}

TEST_CASE("exec: tasks that run at the same time know different workers") {
  Threads threads;
  for (const Exec& exec : {Exec{.threads = 3}, Exec{.threads = 3, .executor = &threads}, Exec{1}}) {
    std::vector<std::atomic<int>> busy(std::size_t(exec.thread_count()));
    std::atomic<bool> alone = true;
    exec.parallel_for_workers(300, [&](Index, int worker) {
      auto& mine = busy.at(std::size_t(worker));
      alone = alone && ++mine == 1;
      std::this_thread::yield();
      --mine;
    });
    CHECK(alone);
  }
}

TEST_CASE("exec: the calling thread, and no other, calls for progress between its tasks") {
  struct Seen {
    std::thread::id caller = std::this_thread::get_id();
    int calls = 0;
    bool others = false;
  };
  const auto progress = [](void* data) {
    Seen& seen = *static_cast<Seen*>(data);
    seen.others = seen.others || std::this_thread::get_id() != seen.caller;
    ++seen.calls;
  };
  Threads threads;
  Others others;
  OneAfterTheOther serial;
  const auto run = [&](int count, moxie::Executor* executor) {
    Seen seen;
    std::atomic<int> by_caller = 0;
    Exec{.threads = count, .executor = executor, .progress = progress, .progress_data = &seen}.parallel_for(40, [&](Index) {
      by_caller += std::this_thread::get_id() == seen.caller ? 1 : 0;
      std::this_thread::yield();
    });
    CHECK_FALSE(seen.others);
    CHECK(seen.calls >= by_caller);
    return seen.calls;
  };
  CHECK(run(1, nullptr) == 40);
  run(3, nullptr);
  run(3, &threads);
  CHECK(run(3, &others) == 0);
  CHECK(run(3, &serial) == 40);
}

#if defined(_OPENMP)
TEST_CASE("exec: progress is called while another thread works") {
  // The other task ends when there was progress after the caller's own task.
  std::atomic<int> calls = 0;
  std::atomic<bool> begun = false;
  const std::thread::id caller = std::this_thread::get_id();
  Exec{.threads = 2, .progress = [](void* data) { ++*static_cast<std::atomic<int>*>(data); }, .progress_data = &calls}
      .parallel_for(2, [&](Index) {
        if (std::this_thread::get_id() == caller) {
          while (!begun) {
            std::this_thread::yield();
          }
        } else {
          begun = true;
          while (calls < 5) {
            std::this_thread::yield();
          }
        }
      });
  CHECK(calls >= 5);
}
#endif

// 1/3 and the smallest number over 2, which depend on the mode of the thread. Every thread computes some of them.
std::vector<double> numbers_of(const Exec& exec) {
  std::vector<double> out(80);
  std::atomic<int> arrived = 0;
  exec.parallel_for(40, [&](Index i) {
    volatile double one = 1;
    volatile double three = 3;
    volatile double tiny = 0x1p-1022;
    out[std::size_t(2 * i)] = one / three;
    out[std::size_t(2 * i) + 1] = tiny / (one + one);
    ++arrived;
    while (arrived < exec.thread_count()) {
      std::this_thread::yield();
    }
  });
  return out;
}

TEST_CASE("exec: all threads round as the calling thread does, and are left as they were") {
  Threads threads;
  const std::vector<double> nearest = numbers_of({4});
  const int before = std::fegetround();
  for (const int mode : {FE_UPWARD, FE_TOWARDZERO}) {
    std::fesetround(mode);
    const std::vector<double> one = numbers_of({1});
    const std::vector<double> four = numbers_of({4});
    const std::vector<double> pool = numbers_of({.threads = 4, .executor = &threads});
    std::fesetround(before);
    CHECK((one != nearest) == (mode == FE_UPWARD));
    CHECK(one == four);
    CHECK(one == pool);
    CHECK(numbers_of({4}) == nearest);
  }
}

#if defined(__SSE2__)
TEST_CASE("exec: all threads flush subnormal numbers where the calling thread does") {
  Threads threads;
  const std::vector<double> kept = numbers_of({4});
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040U);  // FTZ and DAZ
  const std::vector<double> one = numbers_of({1});
  const std::vector<double> four = numbers_of({4});
  const std::vector<double> pool = numbers_of({.threads = 4, .executor = &threads});
  _mm_setcsr(before);
  CHECK(one[1] == 0);
  CHECK(kept[1] == 0x1p-1023);
  CHECK(one == four);
  CHECK(one == pool);
  CHECK(numbers_of({4}) == kept);
}
#endif

#if defined(__unix__)
TEST_CASE("exec: one thread works in a forked child after OpenMP ran, and in destructors of static objects") {
  std::atomic<int> visits = 0;
  Exec{4}.parallel_for(100, [&](Index) { ++visits; });
  REQUIRE(visits == 100);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);  // where it hangs
    Index sum = 0;
    Exec{1}.parallel_for(100, [&](Index i) { sum += i; });
    Exec{1}.parallel_ranges(100, 7, [&](Index begin, Index end) { sum += end - begin; });
    ::_exit(sum == 4950 + 100 ? 0 : 1);
  }
  REQUIRE(child > 0);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

struct AtExit {
  ~AtExit() {
    Index sum = 0;
    Exec{1}.parallel_for(100, [&](Index i) { sum += i; });
    if (sum != 4950) {
      ::_exit(3);
    }
  }
};
const AtExit at_exit;
#endif

}  // namespace

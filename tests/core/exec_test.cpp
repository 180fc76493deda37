// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <moxie/core/exec.hpp>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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

}  // namespace

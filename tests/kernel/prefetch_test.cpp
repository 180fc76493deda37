// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/prefetch.hpp>
#include <vector>

namespace {

using moxie::Index;
namespace kernel = moxie::kernel;

TEST_CASE("prefetch: const memory will be read, all else written, in at most 32 runs each") {
  kernel::detail::PrefetchList list;
  std::vector<float> memory(100'000);
  const std::vector<double> numbers(1000);
  const auto is = [](const kernel::detail::PrefetchRun& run, const void* from, std::ptrdiff_t pitch, Index lines) {
    return static_cast<const void*>(run.from) == from && run.pitch == pitch && run.lines == lines;
  };
  CHECK(list.reads().empty());
  CHECK(list.writes().empty());
  list.add(memory.data(), 33);                // three lines
  list.add(memory.data() + 500, 100, 7, 17);  // two lines of each row
  list.add(memory.data(), 100, 7, 0);
  REQUIRE(list.writes().size() == 3);
  CHECK(list.reads().empty());
  CHECK(is(list.writes()[0], memory.data(), 64, 3));
  CHECK(is(list.writes()[1], memory.data() + 500, 400, 7));
  CHECK(is(list.writes()[2], memory.data() + 516, 400, 7));
  CHECK(list.steps() == 4 + 8 + 8);
  list.add(numbers.data(), 9);
  list.add(numbers.data() + 1, 50, 4, 8);
  list.read({reinterpret_cast<const std::byte*>(memory.data()), 128, 5});
  list.read({});
  REQUIRE(list.reads().size() == 3);
  CHECK(list.writes().size() == 3);
  CHECK(is(list.reads()[0], numbers.data(), 64, 2));
  CHECK(is(list.reads()[1], numbers.data() + 1, 400, 4));
  CHECK(is(list.reads()[2], memory.data(), 128, 5));
  list.clear();
  CHECK(list.reads().empty());
  CHECK(list.writes().empty());
  list.add(memory.data(), 16, 5, 100'000);
  REQUIRE(list.writes().size() == 32);
  CHECK(is(list.writes()[31], memory.data() + 496, 64, 5));
}

TEST_CASE("prefetch: a tile reads first, idles, and prefetches in its last steps what it will write") {
  kernel::detail::PrefetchList list;
  std::vector<float> written(1000);
  const std::vector<float> read(1000);
  const float idle = 0;
  list.add(read.data(), 3 * 16);        // three lines: four steps
  list.add(written.data(), 100, 5, 1);  // five lines: six steps
  const auto expect = [&](Index steps, const std::vector<std::pair<const void*, Index>>& expected) {
    const kernel::detail::PrefetchRun* run = list.ordered(steps, &idle);
    for (const auto& [from, count] : expected) {
      CHECK(static_cast<const void*>(run->from) == from);
      CHECK(run->lines == count);
      ++run;
    }
    CHECK(static_cast<const void*>(run->from) == &idle);  // for the rest, however long
    CHECK(run->pitch == 0);
    CHECK(run->lines > 1'000'000'000);
  };
  expect(20, {{read.data(), 4}, {&idle, 10}, {written.data(), 6}});
  expect(21, {{read.data(), 4}, {&idle, 10}, {written.data(), 6}});  // an odd step prefetches nothing
  expect(10, {{read.data(), 4}, {written.data(), 6}});
  expect(8, {{read.data(), 2}, {written.data(), 6}});  // what is written matters more
  expect(4, {{written.data(), 6}});
  list.clear();
  expect(6, {{&idle, 6}});
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/task.hpp>
#include <numeric>
#include <support.hpp>

namespace {

using moxie::BFloat16;
using moxie::Index;
namespace kernel = moxie::kernel;

// The lines that each of some tiles prefetches, of panels of 5 steps each.
std::vector<Index> taken(Index panels, Index tiles, Index lines) {
  using Arch = kernel::DefaultArch;
  constexpr Index cols = kernel::detail::RegisterTile<float, Arch>::cols;
  const moxie::Matrix<float> b = moxie::Matrix<float>::Zero(5, panels * cols);
  const kernel::Product<float> product{.n = panels * cols, .k = 5, .b = kernel::plain<float>(b)};
  kernel::detail::PrefetchQueue later;
  kernel::detail::queue_panels<Arch>(later, product, 0, panels, 0, 5);
  std::vector<Index> all;
  for (Index left = tiles; left > 0; --left) {
    const kernel::detail::PrefetchRun run = later.take(left, lines);
    all.push_back(run.second == 0 ? run.lines : 2 * run.lines);
    if (run.lines > 0) {  // in B
      const auto* last = run.from + (run.lines - 1) * run.pitch + run.second;
      CHECK(run.from >= reinterpret_cast<const std::byte*>(b.data()));
      CHECK(run.second >= 0);
      CHECK(last < reinterpret_cast<const std::byte*>(b.data() + b.size()));
    }
  }
  return all;
}

TEST_CASE("task: the last tiles prefetch the next panels; few tiles take pairs of runs and leave out their ends") {
  CHECK(taken(1, 2, 5) == std::vector<Index>{5, 5});
  CHECK(taken(1, 4, 5) == std::vector<Index>{0, 0, 5, 5});
  CHECK(taken(1, 1, 9) == std::vector<Index>{10});  // of two runs
  CHECK(taken(1, 1, 3) == std::vector<Index>{6});
  CHECK(taken(2, 2, 5) == std::vector<Index>{10, 10});
  CHECK(taken(2, 3, 5) == std::vector<Index>{10, 5, 5});
  CHECK(taken(2, 3, 3) == std::vector<Index>{6, 3, 3});
  CHECK(taken(1, 2, 3) == std::vector<Index>{3, 3});     // two of each run are left out
  CHECK(taken(1, 3, 3) == std::vector<Index>{3, 2, 3});  // of the last one
  CHECK(taken(1, 4, 3) == std::vector<Index>{3, 2, 3, 2});
  CHECK(taken(2, 4, 4) == std::vector<Index>{4, 4, 4, 4});
  CHECK(taken(1, 3, 0) == std::vector<Index>{0, 0, 0});
  const std::vector<Index> many = taken(20, 100, 5);  // of 40 runs it knows 32
  CHECK(std::count(many.begin(), many.end(), 5) == 32);
  CHECK(many.back() == 5);
  CHECK(many[67] == 0);
  CHECK(many[68] == 5);
}

TEST_CASE("task: where packing prefetches the first run, a single tile prefetches the second") {
  using Arch = kernel::DefaultArch;
  constexpr Index width = kernel::detail::RegisterTile<float, Arch>::width;
  const moxie::Matrix<float> bt = moxie::Matrix<float>::Zero(2 * width, 48);
  const kernel::Product<float> product{.n = 2 * width, .k = 48, .b = kernel::transposed<float>(bt)};
  kernel::detail::PrefetchQueue later;
  kernel::detail::queue_panels<Arch>(later, product, 0, 1, 0, 48);
  const auto* const from = reinterpret_cast<const std::byte*>(bt.data());
  const kernel::detail::PrefetchRun first = later.take();
  CHECK(first.from == from);
  CHECK(first.lines == 48);
  CHECK(first.second == 0);
  const kernel::detail::PrefetchRun second = later.take(1, 40);
  CHECK(second.from == from + width * 48 * Index{sizeof(float)});
  CHECK(second.lines == 40);
  CHECK(second.second == 0);
  later.clear();
  CHECK(later.take().lines == 0);
}

// The lines of the second of three packed panels that some tiles prefetch, each in up to `steps` steps.
template <class S, class Element>
std::vector<std::size_t> lines_of_packed_panel(Index k, Index tiles, Index steps) {
  using Arch = kernel::DefaultArch;
  const kernel::Product<S, Element> shape{.n = 3 * kernel::detail::RegisterTile<S, Arch>::cols, .k = k};
  moxie::Buffer<kernel::Unit<Element>> packed(kernel::panels_size(shape));
  auto product = shape;
  product.panels = packed.data();
  kernel::detail::PrefetchQueue later;
  kernel::detail::queue_panels<Arch>(later, product, 1, 1, 0, product.steps());
  std::vector<std::size_t> lines;
  const auto* const panel = reinterpret_cast<const std::byte*>(packed.data() + packed.size() / 3);
  for (Index left = tiles; left > 0; --left) {
    const kernel::detail::PrefetchRun run = later.take(left, steps);
    for (Index i = 0; i < run.lines; ++i) {
      lines.push_back(std::size_t(run.from + i * run.pitch - panel) / 64);
      if (run.second != 0) {
        lines.push_back(std::size_t(run.from + i * run.pitch + run.second - panel) / 64);
      }
    }
  }
  std::sort(lines.begin(), lines.end());
  return lines;
}

template <class S, class Element>
void check_lines_of_packed_panel() {
  const Index k = 64;
  const auto steps = kernel::Product<S, Element>{.k = k}.steps();
  std::vector<std::size_t> all(std::size_t(steps * kernel::detail::RegisterTile<S, kernel::DefaultArch>::cols) * sizeof(S) /
                               64);
  std::iota(all.begin(), all.end(), std::size_t{0});
  CHECK(lines_of_packed_panel<S, Element>(k, 1, steps) == all);
  CHECK(lines_of_packed_panel<S, Element>(k, 2, steps) == all);
  all.resize(std::min(all.size(), std::size_t(steps / 4 * 2)));  // a quarter of the steps: the first lines, two a step
  CHECK(lines_of_packed_panel<S, Element>(k, 1, steps / 4) == all);
}
TEST_CASE("task: a tile or two prefetch every line of a packed panel once, and the first lines where they have few steps") {
  check_lines_of_packed_panel<float, float>();
  check_lines_of_packed_panel<double, double>();
  check_lines_of_packed_panel<float, BFloat16>();
}

}  // namespace

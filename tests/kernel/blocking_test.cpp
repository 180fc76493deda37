// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <moxie/core/buffer.hpp>
#include <moxie/kernel/blocking.hpp>

namespace {

using moxie::Index;
namespace kernel = moxie::kernel;
using kernel::detail::Blocking;
using kernel::detail::ProductShape;
using kernel::detail::TileShape;

TEST_CASE("blocking: the L2 cache is what the system says, within 128 KiB and 2 MiB") {
  const Index bytes = kernel::l2_cache();
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const Index said = sysconf(_SC_LEVEL2_CACHE_SIZE); said > 0) {
    CHECK(bytes == std::clamp(said, Index{128} << 10, Index{2} << 20));
    return;
  }
#endif
  CHECK(bytes == Index{512} << 10);
}

TEST_CASE("blocking: large matrices whose rows start with lines are streamed") {
  constexpr Index line = 64 / Index{sizeof(float)};
  const Index rows = kernel::l2_cache() / 16 / 64;  // as many lines as stay in the caches
  moxie::Buffer<float> memory((rows + 1) * (line + 1) + 1);
  const auto streamed = [&](Index offset, Index count, Index stride) {
    return kernel::is_streamed(moxie::RowView<float>(memory.data() + offset, count, line, stride));
  };
  CHECK(streamed(0, rows + 1, line));
  CHECK_FALSE(streamed(0, rows, line));
  CHECK_FALSE(streamed(1, rows + 1, line));
  CHECK_FALSE(streamed(0, rows + 1, line + 1));
}

TEST_CASE("blocking: the blocks cover the product, and those of a pass fit two fifths of the L2 cache") {
  for (const Index scalar : {4, 8}) {
    for (const Index mr : {6, 12}) {
      const TileShape tile{mr, 16, scalar};
      for (const Index m : {0, 1, 13, 700, 5000}) {
        for (const Index panels : {0, 1, 7, 300}) {
          for (const Index steps : {0, 1, 384, 1537, 9000}) {
            for (const bool transposed : {false, true}) {
              for (const Index halvings : {0, 1, 5, 30}) {
                const ProductShape p{m, panels, steps, transposed, false};
                const Blocking b = kernel::detail::block(p, tile, halvings);
                CHECK(b.passes * b.kc >= steps);
                CHECK((b.passes - 1) * b.kc < std::max(Index{1}, steps));
                CHECK(b.kc <= (transposed ? 256 : 1536));
                CHECK(b.row_blocks(p) * b.mc >= m);
                CHECK(b.panel_blocks(p) * b.nc >= panels);
                CHECK(b.mc % mr == 0);
                CHECK((b.nc == 1 || b.nc * b.kc * tile.cols * scalar <= kernel::l2_cache() * 2 / 5));
                CHECK(b.tasks(p) >= kernel::detail::block(p, tile, halvings / 2).tasks(p));
                // The bits depend on kc: it must not depend on anything but k and the transpose.
                CHECK(b.kc == kernel::detail::block({1, 1, steps, transposed, true}, {mr, 16, scalar}, 0).kc);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("blocking: a transposed A is shared by rows while they fill cache lines, then by panels; all else by panels first") {
  const TileShape tile{12, 32, 4};
  const Index packed = Blocking::packed_rows(tile);
  ProductShape p{4 * packed, 4, 8, true, false};
  const Blocking whole = kernel::detail::block(p, tile, 0);
  CHECK(whole.tasks(p) == 1);
  Index halvings = 0;
  Index panels = 0;
  do {
    const Blocking b = kernel::detail::block(p, tile, ++halvings);
    if (b.mc > packed) {
      CHECK(b.nc == whole.nc);
    }
    panels = b.nc;
    CHECK(b.mc >= packed);
  } while (panels == whole.nc && halvings < 20);
  CHECK(panels == whole.nc / 2);
  CHECK(kernel::detail::block(p, tile, halvings).mc == packed);

  p.a_transposed = false;
  CHECK(kernel::detail::block(p, tile, 1).nc == whole.nc / 2);
  CHECK(kernel::detail::block(p, tile, 1).mc == whole.mc);
}

}  // namespace

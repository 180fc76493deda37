// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <moxie/core/buffer.hpp>
#include <moxie/kernel/microkernel.hpp>
#include <support.hpp>
#include <vector>

namespace {

using moxie::Buffer;
using moxie::Index;
using moxie::Matrix;
namespace kernel = moxie::kernel;

TEST_CASE_TEMPLATE("micro-kernel: a tile of every height, packed or not, is one fused multiply-add a step from zero", S, float,
                   double) {
  using Arch = kernel::DefaultArch;
  using T = kernel::detail::RegisterTile<S, Arch>;
  for (const Index depth : {0, 1, 2, 7, 300}) {
    const Matrix<S> a = moxie::test::random<S>(T::rows, depth + 1, 301);
    const Matrix<S> b = moxie::test::random<S>(depth + 1, T::cols, 302);
    Buffer<S> packed(T::rows * depth + 1), panel(T::cols * depth + 1);  // not null where the depth is 0
    for (Index p = 0; p < depth; ++p) {
      std::copy_n(b.data() + p * T::cols, T::cols, panel.data() + p * T::cols);
      for (Index i = 0; i < T::rows; ++i) {
        packed[p * T::rows + i] = a(i, p);
      }
    }
    for (Index rows = 1; rows <= T::rows; ++rows) {
      std::vector<const S*> pointers;
      for (Index i = 0; i < T::rows; ++i) {
        pointers.push_back(a.data() + i * a.cols());
      }
      using Panel = kernel::detail::PackedPanel<S, S, Arch>;
      const auto multiply = kernel::detail::multiply_rows<false, false, S, S, Arch, Panel>;
      const auto multiply_packed = kernel::detail::multiply_rows<true, false, S, S, Arch, Panel>;
      const Index height = kernel::detail::tile_height<false, false, S, Arch>(rows);
      const Index packed_height = kernel::detail::tile_height<true, false, S, Arch>(rows);
      CHECK((height == rows || height == rows + 1));
      CHECK(height <= T::rows);
      CHECK(packed_height >= rows);
      CHECK(packed_height <= T::rows);
      const S* start = packed.data();
      for (const bool add : {false, true}) {
        Buffer<S> sums(T::size), from_packed(T::size);
        sums.assign(T::size, S(0.25));
        from_packed.assign(T::size, S(0.25));
        kernel::detail::PrefetchList list;
        const auto* const runs = list.ordered(depth, sums.data());
        multiply(rows, depth, pointers.data(), Panel{panel.data()}, {.rows = sums.data(), .stride = T::cols, .add = add}, runs);
        multiply_packed(rows, depth, &start, Panel{panel.data()},
                        {.rows = from_packed.data(), .stride = T::cols, .before = add ? from_packed.data() : nullptr}, runs);
        CHECK(std::memcmp(sums.data(), from_packed.data(), std::size_t(rows * T::cols) * sizeof(S)) == 0);
        for (Index i = 0; i < T::rows; ++i) {
          for (Index j = 0; j < T::cols; ++j) {
            double expected = add || i >= height ? 0.25 : 0;  // rows beyond the height are not written
            double size = 1;
            for (Index p = 0; p < depth && i < height; ++p) {
              expected += double(a(i, p)) * double(b(p, j));
              size += std::abs(double(a(i, p)) * double(b(p, j)));
            }
            CHECK(std::abs(double(sums[i * T::cols + j]) - expected) < moxie::test::Tolerance<S>::sum * size);
          }
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("micro-kernel: sums go to distant rows, and what lies between is left alone", S, float, double) {
  using Arch = kernel::DefaultArch;
  using T = kernel::detail::RegisterTile<S, Arch>;
  using Panel = kernel::detail::PackedPanel<S, S, Arch>;
  constexpr Index depth = 3;
  constexpr Index stride = T::cols + 5;
  const Matrix<S> a = moxie::test::random<S>(T::rows, depth, 305);
  Buffer<S> panel(T::cols * depth), sums(T::size), before(T::size), out(T::rows * stride + 1);
  for (Index i = 0; i < panel.size(); ++i) {
    panel[i] = S(i % 7) - 3;
  }
  for (Index i = 0; i < T::size; ++i) {
    before[i] = S(i % 5);
  }
  std::vector<const S*> rows;
  for (Index i = 0; i < T::rows; ++i) {
    rows.push_back(a.data() + i * depth);
  }
  const auto multiply = kernel::detail::multiply_rows<false, false, S, S, Arch, Panel>;
  kernel::detail::PrefetchList list;
  multiply(T::rows, depth, rows.data(), Panel{panel.data()}, {.rows = sums.data(), .stride = T::cols},
           list.ordered(depth, panel.data()));
  out.assign(out.size(), S(100));
  multiply(T::rows, depth, rows.data(), Panel{panel.data()},
           {.rows = out.data() + 1, .stride = stride, .add = true, .before = before.data()}, list.ordered(depth, panel.data()));
  for (Index i = 0; i < T::rows; ++i) {
    for (Index j = 0; j < stride; ++j) {
      const S expected = j < T::cols ? sums[i * T::cols + j] + before[i * T::cols + j] + S(100) : S(100);
      CHECK(out[1 + i * stride + j] == expected);
    }
  }
  CHECK(out[0] == S(100));
}

TEST_CASE_TEMPLATE("micro-kernel: prefetching changes no bit", S, float, double) {
  using Arch = kernel::DefaultArch;
  using T = kernel::detail::RegisterTile<S, Arch>;
  using Panel = kernel::detail::PackedPanel<S, S, Arch>;
  for (const Index depth : {1, 5, 40, 41}) {
    const Matrix<S> a = moxie::test::random<S>(T::rows, depth, 303);
    const Matrix<S> b = moxie::test::random<S>(depth, T::cols, 304);
    Buffer<S> panel(T::cols * depth), expected(T::size), sums(T::size);
    std::copy_n(b.data(), b.size(), panel.data());
    std::vector<const S*> rows;
    for (Index i = 0; i < T::rows; ++i) {
      rows.push_back(a.data() + i * depth);
    }
    const auto multiply = kernel::detail::multiply_rows<false, false, S, S, Arch, Panel>;
    kernel::detail::PrefetchList list;
    multiply(T::rows, depth, rows.data(), Panel{panel.data()}, {.rows = expected.data(), .stride = T::cols},
             list.ordered(depth, sums.data()));
    for (const Index written : {0, 1, 7, 100}) {
      for (const Index lines : {0, 1, 9, 1000}) {
        list.clear();
        list.add(expected.data(), written * Index{64 / sizeof(S)});
        list.add(a.data(), depth, T::rows, lines);
        list.read({reinterpret_cast<const std::byte*>(b.data()), 64, lines});
        list.read({reinterpret_cast<const std::byte*>(b.data()), 128, lines, 64});
        multiply(T::rows, depth, rows.data(), Panel{panel.data()}, {.rows = sums.data(), .stride = T::cols},
                 list.ordered(depth, sums.data()));
        CHECK(std::memcmp(sums.data(), expected.data(), std::size_t(T::size) * sizeof(S)) == 0);
      }
    }
  }
}

}  // namespace

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstring>
#include <moxie/core/buffer.hpp>
#include <moxie/core/exec.hpp>
#include <moxie/kernel/simd.hpp>
#include <type_traits>
#include <vector>

namespace moxie::kernel {

/// A factor of a product. Memory row r starts at `data + stride · (rows ? rows[r] : r)`, so rows can be gathered by an index
/// without a copy. As a factor it is those rows, or their transpose.
template <class Scalar>
struct Operand {
  const Scalar* data = nullptr;
  Index stride = 0;
  const Index* rows = nullptr;
  bool transposed = false;

  const Scalar* row(Index r) const { return data + stride * (rows != nullptr ? rows[r] : r); }
};

/// Where a product goes: the same addressing, and whether it replaces or is added to what is there.
template <class Scalar>
struct Destination {
  Scalar* data = nullptr;
  Index stride = 0;
  const Index* rows = nullptr;
  bool add = false;

  Scalar* row(Index r) const { return data + stride * (rows != nullptr ? rows[r] : r); }
};

/// C (m,n) = A (m,k) B (k,n), or C += A B.
template <class Scalar>
struct Product {
  Index m = 0;
  Index n = 0;
  Index k = 0;
  Operand<Scalar> a;
  Operand<Scalar> b;
  Destination<Scalar> c;
};

template <class Scalar>
Operand<Scalar> plain(RowView<const std::type_identity_t<Scalar>> m, const Index* rows = nullptr) {
  return {m.data(), m.stride(), rows, false};
}
template <class Scalar>
Operand<Scalar> transposed(RowView<const std::type_identity_t<Scalar>> m, const Index* rows = nullptr) {
  return {m.data(), m.stride(), rows, true};
}
template <class Scalar>
Destination<Scalar> replace(RowView<std::type_identity_t<Scalar>> m, const Index* rows = nullptr) {
  return {m.data(), m.stride(), rows, false};
}
template <class Scalar>
Destination<Scalar> add_to(RowView<std::type_identity_t<Scalar>> m, const Index* rows = nullptr) {
  return {m.data(), m.stride(), rows, true};
}

namespace detail {

/// The register block: Rows x (2 vectors) accumulators, chosen so that they and the operands fit the vector registers.
template <class Scalar, class Arch>
struct Tile {
  static constexpr Index vectors = 2;
  static constexpr Index width = Index{Batch<Scalar, Arch>::size};
  static constexpr Index rows = sizeof(Scalar) * std::size_t{width} >= 64 ? 12 : 6;  // 32 registers of 64 bytes, or 16
  static constexpr Index cols = vectors * width;
  /// Depth of one pass: a packed panel of B, (depth x cols), stays in the first-level cache.
  static constexpr Index depth = 256;
};

/// acc (rows x cols) = A B over `depth` steps; row i of A is read at a[i][p · step], B from a packed panel. One fused
/// multiply-add an element and step, in the order of p: the bits of an element depend on nothing but its row of A and its
/// column of B.
template <class Scalar, class Arch>
void multiply_tile(Index depth, const Scalar* const* a, Index step, const Scalar* panel, Scalar* out) {
  using T = Tile<Scalar, Arch>;
  using B = Batch<Scalar, Arch>;
  B acc[T::rows][2];
#pragma GCC unroll 16
  for (Index i = 0; i < T::rows; ++i) {
    acc[i][0] = B(Scalar(0));
    acc[i][1] = B(Scalar(0));
  }
  const Scalar* pointers[T::rows];
#pragma GCC unroll 16
  for (Index i = 0; i < T::rows; ++i) {
    pointers[i] = a[i];
  }
  for (Index p = 0; p < depth; ++p) {
    const B b0 = B::load_aligned(panel + p * T::cols);
    const B b1 = B::load_aligned(panel + p * T::cols + T::width);
#pragma GCC unroll 16
    for (Index i = 0; i < T::rows; ++i) {
      const B x(pointers[i][p * step]);
      acc[i][0] = fma(x, b0, acc[i][0]);
      acc[i][1] = fma(x, b1, acc[i][1]);
    }
  }
#pragma GCC unroll 16
  for (Index i = 0; i < T::rows; ++i) {
    acc[i][0].store_aligned(out + i * T::cols);
    acc[i][1].store_aligned(out + i * T::cols + T::width);
  }
}

/// n <= Width elements, then zeros up to Width.
template <Index Width, class Scalar>
void copy_padded(const Scalar* from, Index n, Scalar* to) {
  if (n == Width) {
    std::memcpy(to, from, Width * sizeof(Scalar));  // of a known size: a few vector instructions, no call
    return;
  }
  for (Index j = 0; j < Width; ++j) {
    to[j] = j < n ? from[j] : Scalar(0);
  }
}

/// Packs rows [k0, k0 + depth) and columns [n0, n0 + n) of B into panels [n / cols][depth][cols], padded with zeros.
template <class Scalar, class Arch>
void pack_panels(const Operand<Scalar>& b, Index k0, Index depth, Index n0, Index n, Scalar* out) {
  using T = Tile<Scalar, Arch>;
  for (Index j0 = 0; j0 < n; j0 += T::cols, out += depth * T::cols) {
    const Index cols = std::min(T::cols, n - j0);
    if (!b.transposed) {
      for (Index p = 0; p < depth; ++p) {
        copy_padded<T::cols>(b.row(k0 + p) + n0 + j0, cols, out + p * T::cols);
      }
    } else {
      const Scalar* from[T::cols];
      for (Index j = 0; j < T::cols; ++j) {
        from[j] = b.row(n0 + j0 + std::min(j, cols - 1)) + k0;  // padding repeats a row: its columns are never stored
      }
      for (Index p = 0; p < depth; ++p) {
        for (Index j = 0; j < T::cols; ++j) {
          out[p * T::cols + j] = from[j][p];
        }
      }
    }
  }
}

/// Copies rows [k0, k0 + depth), columns [m0, m0 + rows) of a transposed A to out [depth][Tile::rows], padded with zeros: there
/// the tile reads its row i at out + i, with step Tile::rows.
template <class Scalar, class Arch>
void pack_transposed_rows(const Operand<Scalar>& a, Index k0, Index depth, Index m0, Index rows, Scalar* out) {
  using T = Tile<Scalar, Arch>;
  for (Index p = 0; p < depth; ++p) {
    copy_padded<T::rows>(a.row(k0 + p) + m0, rows, out + p * T::rows);
  }
}

/// Writes the first m rows and n columns of a tile to C, or adds them.
template <class Scalar, class Arch>
void store_tile(const Scalar* tile, Scalar* const* rows, Index m, Index n, bool add) {
  using T = Tile<Scalar, Arch>;
  using B = Batch<Scalar, Arch>;
  for (Index i = 0; i < m; ++i) {
    const Scalar* from = tile + i * T::cols;
    Scalar* to = rows[i];
    if (n == T::cols) {
      for (Index j = 0; j < T::cols; j += T::width) {
        const B values = B::load_aligned(from + j);
        (add ? B::load_unaligned(to + j) + values : values).store_unaligned(to + j);
      }
    } else {
      for (Index j = 0; j < n; ++j) {
        to[j] = add ? to[j] + from[j] : from[j];
      }
    }
  }
}

/// Rows [m0, m1) and columns [n0, n1) of one product.
template <class Scalar, class Arch>
void multiply_block(const Product<Scalar>& product, Index m0, Index m1, Index n0, Index n1) {
  using T = Tile<Scalar, Arch>;
  thread_local Buffer<Scalar> packed_b;
  thread_local Buffer<Scalar> packed_a;
  const Index panels = (n1 - n0 + T::cols - 1) / T::cols;
  packed_b.resize(panels * T::cols * std::min(T::depth, product.k));
  packed_a.resize(T::rows * T::depth);
  alignas(alignment) Scalar tile[T::rows * T::cols];

  Index k0 = 0;
  do {  // once even for k = 0: an empty sum is zero
    const Index depth = std::min(T::depth, product.k - k0);
    const bool add = product.c.add || k0 > 0;
    pack_panels<Scalar, Arch>(product.b, k0, depth, n0, n1 - n0, packed_b.data());
    for (Index i0 = m0; i0 < m1; i0 += T::rows) {
      const Index rows = std::min(T::rows, m1 - i0);
      const Scalar* a[T::rows];
      Scalar* c[T::rows];
      Index step = 1;
      if (product.a.transposed) {
        pack_transposed_rows<Scalar, Arch>(product.a, k0, depth, i0, rows, packed_a.data());
        step = T::rows;
      }
      for (Index i = 0; i < T::rows; ++i) {
        const Index r = i0 + std::min(i, rows - 1);  // rows beyond the edge repeat the last one and are not stored
        a[i] = product.a.transposed ? packed_a.data() + i : product.a.row(r) + k0;
        c[i] = product.c.row(r) + n0;
      }
      for (Index q = 0; q < panels; ++q) {
        multiply_tile<Scalar, Arch>(depth, a, step, packed_b.data() + q * depth * T::cols, tile);
        store_tile<Scalar, Arch>(tile, c, rows, std::min(T::cols, n1 - n0 - q * T::cols), add);
        for (Index i = 0; i < rows; ++i) {
          c[i] += T::cols;
        }
      }
    }
    k0 += depth;
  } while (k0 < product.k);
}

}  // namespace detail

/// Computes `product(i)` for i = 0, ..., count-1 as one list of tasks shared by all threads.
///
/// `product` is called several times for an index, by several threads at once. Products may differ in size; an empty one costs
/// nothing. Accumulation in `Scalar`, one fused multiply-add a step (a multiply
/// and an add where the instruction set has none), over the depth in order, in passes of a fixed depth: the bits of an element
/// do not depend on the number of threads, on how the product is cut, nor on the other rows and columns. Two products of a call
/// must not write the same elements.
template <class Scalar, class Arch = DefaultArch, class F>
void grouped_gemm(Index count, F&& product, const Exec& exec) {
  using T = detail::Tile<Scalar, Arch>;
  const auto blocks = [](Index n, Index block) { return (n + block - 1) / block; };
  // Blocks as large as the packing needs to be cheap, halved until every thread has some of them.
  Index rows = 20 * T::rows;
  Index cols = 256;
  const Index wanted = exec.thread_count() > 1 ? 4 * exec.thread_count() : 1;
  thread_local std::vector<Index> starts;  // the first task of each product, and their number
  std::vector<Index>& first = starts;      // the caller's, also inside the parallel region
  const auto cut = [&] {
    first.assign(1, 0);
    for (Index i = 0; i < count; ++i) {
      const Product<Scalar> p = product(i);
      first.push_back(first.back() + blocks(p.m, rows) * blocks(p.n, cols));
    }
    return first.back();
  };
  while (cut() < wanted && (rows > 4 * T::rows || cols > 64)) {
    if (cols > 64) {
      cols /= 2;
    } else {
      rows /= 2;
      rows = blocks(rows, T::rows) * T::rows;
    }
  }
  exec.parallel_for(first.back(), [&](Index task) {
    const auto next = std::upper_bound(first.begin(), first.end(), task);
    const Index i = Index(next - first.begin()) - 1;
    const Product<Scalar> p = product(i);
    const Index local = task - first[static_cast<std::size_t>(i)];
    const Index n0 = local % blocks(p.n, cols) * cols;
    const Index m0 = local / blocks(p.n, cols) * rows;
    detail::multiply_block<Scalar, Arch>(p, m0, std::min(p.m, m0 + rows), n0, std::min(p.n, n0 + cols));
  });
}

/// One product: C = A B, or C += A B.
template <class Scalar, class Arch = DefaultArch>
void gemm(const Product<Scalar>& product, const Exec& exec) {
  grouped_gemm<Scalar, Arch>(
      1, [&](Index) { return product; }, exec);
}

}  // namespace moxie::kernel

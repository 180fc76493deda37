// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/bfloat16.hpp>
#include <moxie/cuda/exec.hpp>
#include <span>

#if !defined(__CUDACC__)
#include <moxie/kernel/gemm.hpp>
#endif

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

/// A matrix of each group: rows of one matrix, cut where the groups' rows begin, or blocks at equal distances.
template <class T>
struct Series {
  T* data = nullptr;
  Index stride = 0;
  Index distance = 0;  ///< elements from one group's block to the next one's; by rows where it is 0
  bool transposed = false;

  /// Where the group's matrix begins, if its rows begin with row `first`.
  MOXIE_HOST_DEVICE T* of(Index group, Index first) const { return data + (distance == 0 ? first * stride : group * distance); }
};
/// The rows of each group.
template <class T>
Series<T> rows_of(DeviceRows<T> m, bool transposed = false) {
  return {m.data, m.stride, 0, transposed};
}
/// A block of each group, the first of them `m`.
template <class T>
Series<T> block_of(DeviceRows<T> m, Index distance, bool transposed = false) {
  return {m.data, m.stride, distance == 0 ? Index{16} : distance, transposed};  // of a single group any distance will do
}

/// How rows divide into groups (of experts, or sequences): offsets of the first rows and the end, known to both sides.
struct Groups {
  std::span<const int> host;
  const int* device = nullptr;

  Index count() const { return Index(host.size()) - 1; }
  Index begin(Index group) const { return host[std::size_t(group)]; }
  Index rows(Index group) const { return Index(host[std::size_t(group) + 1]) - begin(group); }
  Index rows() const { return host.back(); }
};

/// For each group: C (m,n) = A (m,k) B (k,n), or C += A B; m or k may be `of_group`. Sums are of the type of C, but float for
/// BFloat16. Groups without rows: where m is theirs nothing is written. A product over nothing is 0.
template <class Element, class Out>
struct Product {
  static constexpr Index of_group = -1;

  Index m = 0;
  Index n = 0;
  Index k = 0;
  Series<const Element> a;
  Series<const Element> b;
  Series<Out> c;
  bool add = false;

  Index rows(const Groups& groups, Index g) const { return m == of_group ? groups.rows(g) : m; }
  Index depth(const Groups& groups, Index g) const { return k == of_group ? groups.rows(g) : k; }
};

namespace detail {

#if defined(__CUDACC__)

template <class T>
constexpr cudaDataType_t type_of = std::is_same_v<T, double>  ? CUDA_R_64F
                                   : std::is_same_v<T, float> ? CUDA_R_32F
                                                              : CUDA_R_16BF;

inline int to_int(Index n) {
  expect_value(n <= (std::numeric_limits<int>::max)(), "moxie::cuda", "a matrix is too large for cuBLAS");
  return int(n);
}

/// The addresses of all groups' matrices, as cuBLAS reads them.
template <class Element, class Out>
struct Addresses {
  Series<const Element> a, b;
  Series<Out> c;
  const int* starts;
  bool by_rows;  // groups without rows have no place
  const void** to_a;
  const void** to_b;
  void** to_c;

  MOXIE_HOST_DEVICE void operator()(Index g) const {
    const Index first = starts == nullptr ? 0 : starts[g];
    Index place = g;
    if (by_rows) {
      if (starts[g + 1] == starts[g]) {
        return;
      }
      for (Index before = 0; before < g; ++before) {
        place -= starts[before + 1] == starts[before] ? 1 : 0;
      }
    }
    to_a[place] = a.of(g, first);
    to_b[place] = b.of(g, first);
    to_c[place] = c.of(g, first);
  }
};

/// Whether every group's matrices begin where a call for all groups of 16-bit numbers may read them: at multiples of 16 bytes.
template <class Element, class Out>
bool aligned(const Product<Element, Out>& p) {
  const auto fits = [](const auto& series) {
    return reinterpret_cast<std::uintptr_t>(series.data) % 16 == 0 && series.stride % 8 == 0 && series.distance % 8 == 0;
  };
  return sizeof(Element) > 2 || (fits(p.a) && fits(p.b) && fits(p.c));
}

inline cublasOperation_t operation(bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }
template <class Element>
inline constexpr cublasComputeType_t compute_type = std::is_same_v<Element, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;

/// Sums of nothing are zeros.
template <class Element, class Out>
void clear_empty_products(DeviceExec& exec, const Groups& groups, const Product<Element, Out>& p) {
  for (Index g = 0; g < groups.count(); ++g) {
    if (p.depth(groups, g) == 0 && p.rows(groups, g) > 0) {
      expect_success(cudaMemset2DAsync(p.c.of(g, groups.begin(g)), std::size_t(p.c.stride) * sizeof(Out), 0,
                                       std::size_t(p.n) * sizeof(Out), std::size_t(p.rows(groups, g)), exec.stream()),
                     "cudaMemset2DAsync");
    }
  }
}

#if CUBLAS_VERSION >= 120500
/// One call for all groups that have something to do, where cuBLAS has one for these types and that pays. Whether it was made.
template <class Element, class Out>
bool multiply_at_once(DeviceExec& exec, const Groups& groups, const Product<Element, Out>& p) {
  using Sum = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  const Index count = groups.count();
  double work = 0;
  for (Index g = 0; g < count; ++g) {
    work += double(p.rows(groups, g)) * double(p.depth(groups, g)) * double(p.n);
  }
  if (!std::is_same_v<Element, Out> || count <= 1 || work > exec.group_up_to * double(count) || !aligned(p)) {
    return false;
  }
  const bool by_rows = p.m == p.of_group || p.k == p.of_group;
  std::vector<int> rows, depth;
  for (Index g = 0; g < count; ++g) {
    if (!by_rows || groups.rows(g) > 0) {
      rows.push_back(to_int(p.rows(groups, g)));
      depth.push_back(to_int(p.depth(groups, g)));
    }
  }
  const std::size_t n = rows.size();
  if (n == 0) {
    return true;
  }
  const std::vector<cublasOperation_t> of_a(n, operation(p.a.transposed));
  const std::vector<cublasOperation_t> of_b(n, operation(p.b.transposed));
  const std::vector<int> cols(n, to_int(p.n)), one(n, 1);
  const std::vector<int> lda(n, to_int(p.a.stride)), ldb(n, to_int(p.b.stride)), ldc(n, to_int(p.c.stride));
  const std::vector<Sum> alpha(n, Sum(1));
  const std::vector<Sum> beta(n, p.add ? Sum(1) : Sum(0));
  const DeviceExec::Frame frame(exec);
  const void** a = exec.scratch<const void*>(count);
  const void** b = exec.scratch<const void*>(count);
  void** c = exec.scratch<void*>(count);
  exec.for_each(count, Addresses<Element, Out>{p.a, p.b, p.c, groups.device, by_rows, a, b, c});
  exec.count_product();
  expect_success(
      cublasGemmGroupedBatchedEx(exec.handle(), of_b.data(), of_a.data(), cols.data(), rows.data(), depth.data(), alpha.data(),
                                 b, type_of<Element>, ldb.data(), a, type_of<Element>, lda.data(), beta.data(), c, type_of<Out>,
                                 ldc.data(), int(n), one.data(), compute_type<Element>),
      "cublasGemmGroupedBatchedEx");
  return true;
}
#endif

/// Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ.
template <class Element, class Out>
void multiply(DeviceExec& exec, const Groups& groups, const Product<Element, Out>& p) {
  using Sum = std::conditional_t<std::is_same_v<Element, double>, double, float>;
  if (!p.add) {
    clear_empty_products(exec, groups, p);
  }
#if CUBLAS_VERSION >= 120500
  if (multiply_at_once(exec, groups, p)) {
    return;
  }
#endif
  const Sum alpha = 1;
  const Sum beta = p.add ? 1 : 0;
  for (Index g = 0; g < groups.count(); ++g) {
    const Index rows = p.rows(groups, g);
    const Index depth = p.depth(groups, g);
    if (rows == 0 || depth == 0) {
      continue;
    }
    const Index first = groups.begin(g);
    exec.count_product();
    expect_success(cublasGemmEx(exec.handle(), operation(p.b.transposed), operation(p.a.transposed), to_int(p.n), to_int(rows),
                                to_int(depth), &alpha, p.b.of(g, first), type_of<Element>, to_int(p.b.stride), p.a.of(g, first),
                                type_of<Element>, to_int(p.a.stride), &beta, p.c.of(g, first), type_of<Out>, to_int(p.c.stride),
                                compute_type<Element>, CUBLAS_GEMM_DEFAULT),
                   "cublasGemmEx");
  }
}

#else

/// By the CPU's kernels. What becomes BFloat16 is rounded from sums in float.
template <class Element, class Out>
void multiply(DeviceExec& exec, const Groups& groups, const Product<Element, Out>& p) {
  using Sum = std::conditional_t<std::is_same_v<Out, BFloat16>, float, Out>;
  const auto factor = [](const Series<const Element>& series, Index g, Index first) {
    return kernel::Operand<Element>{{series.of(g, first), series.stride},
                                    series.transposed ? kernel::Transpose::yes : kernel::Transpose::no};
  };
  exec.count_product();
  const DeviceExec::Frame frame(exec);
  const auto product = [&](Index g) {
    const Index first = groups.begin(g);
    kernel::Product<Sum, Element> out{
        .m = p.rows(groups, g), .n = p.n, .k = p.depth(groups, g), .a = factor(p.a, g, first), .b = factor(p.b, g, first)};
    if constexpr (std::is_same_v<Out, Sum>) {
      out.c = {{p.c.of(g, first), p.c.stride}, p.add ? kernel::Write::add : kernel::Write::replace};
    }
    return out;
  };
  if constexpr (std::is_same_v<Out, Sum>) {
    kernel::grouped_gemm<Sum>(groups.count(), product, exec.host());
  } else {
    expect_value(p.m == p.of_group && p.c.distance == 0 && !p.add, "moxie::cuda::multiply", "BFloat16 is made of whole rows");
    Sum* sums = exec.scratch<Sum>(groups.rows() * p.n);
    kernel::grouped_gemm<Sum>(
        groups.count(),
        [&](Index g) {
          auto out = product(g);
          out.c = {{sums + groups.begin(g) * p.n, p.n}};
          return out;
        },
        exec.host());
    for (Index r = 0; r < groups.rows(); ++r) {
      for (Index j = 0; j < p.n; ++j) {
        p.c.data[r * p.c.stride + j] = Out(sums[r * p.n + j]);
      }
    }
  }
}

#endif

}  // namespace detail

/// A product for every group. No C may be part of another's. Throws CudaError.
template <class Element, class Out>
void multiply(DeviceExec& exec, const Groups& groups, const Product<Element, Out>& p) {
  if (groups.count() > 0 && p.m != 0 && p.n != 0) {
    detail::multiply(exec, groups, p);
  }
}
/// A single product.
template <class Element, class Out>
void multiply(DeviceExec& exec, const Product<Element, Out>& p) {
  const int starts[] = {0, 0};  // nothing of it is by rows
  multiply(exec, Groups{starts, nullptr}, p);
}

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

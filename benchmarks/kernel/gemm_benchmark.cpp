// SPDX-License-Identifier: MIT
#include <benchmarks.hpp>
#include <functional>
#include <moxie/core/random.hpp>
#include <moxie/kernel/gemm.hpp>
#include <string>

// One product y (M,N) = x (M,K) Wᵀ, as a projection of an expert: of the shapes of DiT-MoE-S, and, for one of them, the way
// from the naive loop to the kernel (docs/kernel.md).
namespace {

using moxie::Buffer;
using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
namespace kernel = moxie::kernel;

struct Shape {
  Index m, n, k;
  std::string name() const { return std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k); }
};

/// y, x and W of a shape.
struct Factors {
  explicit Factors(const Shape& s) : x(s.m, s.k), w(s.n, s.k), y(s.m, s.n) {
    moxie::Rng(1).fill_normal(moxie::RowView<float>(x));
    moxie::Rng(2).fill_normal(moxie::RowView<float>(w));
  }
  Matrix<float> x, w, y;
};

void add(const std::string& name, const Shape& s, const Exec& exec, std::function<std::function<void()>(Factors&)> make_step) {
  benchmark::RegisterBenchmark((name + "/" + s.name()).c_str(), [=](benchmark::State& state) {
    Factors f(s);
    const std::function<void()> step = make_step(f);
    step();
    const Matrix<float> expected = f.x.topRows(3) * f.w.transpose();
    if (!((f.y.topRows(3) - expected).norm() <= 1e-5F * expected.norm())) {
      state.SkipWithError("the product is wrong");
      return;
    }
    const double flops = 2.0 * double(s.m) * double(s.n) * double(s.k);
    const double bytes = 4.0 * (double(s.m) + double(s.n)) * double(s.k);
    moxie::bench::measure<float>(state, exec, {{flops, bytes}}, step);
  })->Unit(benchmark::kMillisecond);
}

// Each step of the way in one function. The product is small enough to stay in the cache that all of it is read from.

/// Three loops. One addition waits for the one before.
void naive(Factors& f) {
  for (Index i = 0; i < f.y.rows(); ++i) {
    for (Index j = 0; j < f.y.cols(); ++j) {
      float sum = 0;
      for (Index p = 0; p < f.x.cols(); ++p) {
        sum += f.x(i, p) * f.w(j, p);
      }
      f.y(i, j) = sum;
    }
  }
}

/// Vectors along k: as many partial sums as lanes, still one chain of additions, and two loads for each multiply-add.
void dots(Factors& f) {
  for (Index i = 0; i < f.y.rows(); ++i) {
    for (Index j = 0; j < f.y.cols(); ++j) {
      f.y(i, j) = kernel::dot(f.x.cols(), &f.x(i, 0), &f.w(j, 0));
    }
  }
}

/// Vectors along n, of W transposed beforehand: a row of y is read and written for each element of x.
std::function<void()> rows(Factors& f) {
  return [&f, wt = Matrix<float>(f.w.transpose())] {
    f.y.setZero();
    for (Index i = 0; i < f.y.rows(); ++i) {
      for (Index p = 0; p < f.x.cols(); ++p) {
        const float x = f.x(i, p);
        kernel::map(
            f.y.cols(), &f.y(i, 0), [&](auto y, auto w) { return kernel::fma(decltype(y)(x), w, y); }, &f.y(i, 0), &wt(p, 0));
      }
    }
  };
}

/// A tile of sums in registers, Rows x two vectors: of a row of W transposed two loads for 2 Rows multiply-adds, y written
/// once.
template <Index Rows>
std::function<void()> tiles(Factors& f) {
  using V = kernel::Batch<float>;
  constexpr Index width = Index{V::size};
  return [&f, wt = Matrix<float>(f.w.transpose())] {
    for (Index j = 0; j + 2 * width <= f.y.cols(); j += 2 * width) {
      for (Index i = 0; i + Rows <= f.y.rows(); i += Rows) {
        V sum[std::size_t(Rows)][2];
#pragma GCC unroll 16
        for (auto& row : sum) {
          row[0] = V(0.0F);
          row[1] = V(0.0F);
        }
        for (Index p = 0; p < f.x.cols(); ++p) {
          const V w0 = V::load_unaligned(&wt(p, j));
          const V w1 = V::load_unaligned(&wt(p, j + width));
#pragma GCC unroll 16
          for (Index r = 0; r < Rows; ++r) {
            const V x(f.x(i + r, p));
            sum[r][0] = kernel::fma(x, w0, sum[r][0]);
            sum[r][1] = kernel::fma(x, w1, sum[r][1]);
          }
        }
#pragma GCC unroll 16
        for (Index r = 0; r < Rows; ++r) {
          sum[r][0].store_unaligned(&f.y(i + r, j));
          sum[r][1].store_unaligned(&f.y(i + r, j + width));
        }
      }
    }
  };
}

/// The library's product.
std::function<void()> product(Factors& f, const Exec& exec, bool frozen) {
  Buffer<float> panels;
  kernel::Product<float> p{.m = f.y.rows(),
                           .n = f.y.cols(),
                           .k = f.x.cols(),
                           .a = kernel::plain<float>(f.x),
                           .b = kernel::transposed<float>(f.w),
                           .c = kernel::replace<float>(f.y)};
  if (frozen) {
    panels.resize(kernel::panels_size(p));
    kernel::prepack(p, panels.data());
  }
  return [=]() mutable {
    p.panels = frozen ? panels.data() : nullptr;
    kernel::grouped_gemm<float>(
        1, [&](Index) { return p; }, exec);
  };
}

const moxie::bench::Register registration([](const Exec& exec) {
  const Exec one{.threads = 1};
  const Shape shape{1020, 1536, 384};  // a multiple of the tiles below
  add("product/1_naive", shape, one, [](Factors& f) { return [&f] { naive(f); }; });
  add("product/2_dots", shape, one, [](Factors& f) { return [&f] { dots(f); }; });
  add("product/3_rows", shape, one, rows);
  add("product/4_tiles_of_1", shape, one, tiles<1>);
  add("product/4_tiles_of_4", shape, one, tiles<4>);
  add("product/4_tiles_of_12", shape, one, tiles<12>);
  add("product/4_tile_in_cache", {12, 2 * Index{kernel::Batch<float>::size}, 128}, one, tiles<12>);  // one, short, with its end
  add("product/5_kernel", shape, one, [=](Factors& f) { return product(f, one, false); });
  add("product/6_threads", shape, exec, [=](Factors& f) { return product(f, exec, false); });
  add("product/7_frozen", shape, exec, [=](Factors& f) { return product(f, exec, true); });
  for (const Shape& s :
       {Shape{1024, 1536, 384}, Shape{1024, 384, 1536}, Shape{256, 1536, 384}, Shape{64, 1536, 384}, Shape{16, 1536, 384}}) {
    add("gemm", s, exec, [=](Factors& f) { return product(f, exec, false); });
    add("gemm_frozen", s, exec, [=](Factors& f) { return product(f, exec, true); });
  }
});

}  // namespace

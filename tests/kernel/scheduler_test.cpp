// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/gemm.hpp>
#include <support.hpp>
#include <vector>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::test::Tolerance;
namespace kernel = moxie::kernel;

// x_i -> x_i A_i -> (x_i A_i) B_i: the second stage reads what the first writes.
TEST_CASE_TEMPLATE("scheduler: a product waits for the same one of earlier stages, for any number of threads", S, float,
                   double) {
  const Index count = 13, k = 40;
  std::vector<Matrix<S>> x, a, b;
  for (Index i = 0; i < count; ++i) {
    const auto seed = std::uint64_t(i);
    x.push_back(moxie::test::random<S>(i % 4 * 20, k, 130 + seed));
    a.push_back(moxie::test::random<S>(k, 2 * k, 150 + seed));
    b.push_back(moxie::test::random<S>(2 * k, 7, 170 + seed));
  }
  const auto at = [](auto& list, Index i) -> auto& { return list[std::size_t(i)]; };
  std::vector<Matrix<S>> first;
  for (const int threads : {1, 2, 3, 8}) {
    std::vector<Matrix<S>> middle, c;
    for (Index i = 0; i < count; ++i) {
      middle.push_back(moxie::test::untouched<S>(at(x, i).rows(), 2 * k));
      c.push_back(moxie::test::untouched<S>(at(x, i).rows(), 7));
    }
    kernel::TaskGraph<S> graph;
    graph.add(count, [&](Index i) -> kernel::Product<S> {
      return {
          at(x, i).rows(), 2 * k, k, kernel::plain<S>(at(x, i)), kernel::plain<S>(at(a, i)), kernel::replace<S>(at(middle, i))};
    });
    graph.add(count, [&](Index i) -> kernel::Product<S> {
      return {
          at(x, i).rows(), 7, 2 * k, kernel::plain<S>(at(middle, i)), kernel::plain<S>(at(b, i)), kernel::replace<S>(at(c, i))};
    });
    graph.run(Exec{.threads = threads});
    for (Index i = 0; i < count; ++i) {
      const Matrix<double> expected =
          moxie::test::as_double(at(x, i)) * moxie::test::as_double(at(a, i)) * moxie::test::as_double(at(b, i));
      CHECK(moxie::test::relative_error(at(c, i), expected) < Tolerance<S>::sum);
      CHECK((first.empty() || moxie::test::same_bits(at(c, i), at(first, i))));
    }
    first = c;
  }
}

TEST_CASE("scheduler: what an epilogue throws reaches the caller, and no thread waits for ever") {
  const Matrix<float> a = moxie::test::random<float>(8, 8, 190);
  Matrix<float> c(8, 8), d(8, 8);
  const auto product = [&](Matrix<float>& to) {
    return kernel::Product<float>{8, 8, 8, kernel::plain<float>(a), kernel::plain<float>(a), kernel::replace<float>(to)};
  };
  const kernel::Epilogue<float> refuse{
      .apply = [](const void*, const kernel::TileSums<float>&) { throw moxie::ValueError("refused"); }};
  for (const int threads : {1, 4}) {
    kernel::TaskGraph<float> graph;
    graph.add(
        3, [&](Index) { return product(c); }, refuse);
    graph.add(3, [&](Index) { return product(d); });
    CHECK_THROWS_AS(graph.run(Exec{.threads = threads}), moxie::ValueError);
  }
}

TEST_CASE("scheduler: a graph within a graph, and products of another type, have memory of their own") {
  const Matrix<float> a = moxie::test::random<float>(9, 9, 191);
  const Matrix<double> b = moxie::test::random<double>(9, 9, 192);
  const auto square = []<class S>(const Matrix<S>& m, Matrix<S>& to) {
    return kernel::Product<S>{9, 9, 9, kernel::plain<S>(m), kernel::plain<S>(m), kernel::replace<S>(to)};
  };
  Matrix<float> outer(9, 9);
  Matrix<double> inner(9, 9);
  kernel::TaskGraph<float> graph;
  graph.add(1, [&](Index) { return square(a, outer); });
  kernel::gemm<double>(square(b, inner), Exec{});
  graph.run(Exec{});
  CHECK(moxie::test::relative_error(outer, Matrix<double>(moxie::test::as_double(a) * moxie::test::as_double(a))) <
        Tolerance<float>::sum);
  CHECK(moxie::test::relative_error(inner, Matrix<double>(b * b)) < Tolerance<double>::sum);
}

}  // namespace

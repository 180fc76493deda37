// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <limits>
#include <moxie/kernel/gemm.hpp>
#include <moxie/kernel/math.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::kernel::One;
using moxie::kernel::ScalarArch;
namespace kernel = moxie::kernel;

TEST_CASE_TEMPLATE("scalar: a vector of one number computes as numbers do", S, float, double) {
  const S values[] = {S(-2), S(0), S(0.5), S(3)};
  for (const S a : values) {
    for (const S b : values) {
      const One<S> x(a), y(b);
      CHECK((x + y).value == a + b);
      CHECK((x - y).value == a - b);
      CHECK((x * y).value == a * b);
      CHECK((-x).value == -a);
      CHECK((x < y) == (a < b));
      CHECK((x <= y) == (a <= b));
      CHECK((x > y) == (a > b));
      CHECK((x >= y) == (a >= b));
      CHECK((x == y) == (a == b));
      CHECK(kernel::min(x, y).value == std::min(a, b));
      CHECK(kernel::max(x, y).value == std::max(a, b));
      CHECK(kernel::select(a < b, x, y).value == std::min(a, b));
      CHECK(kernel::fma(x, y, One<S>(S(1))).value == a * b + 1);
      S out = 0;
      (x / One<S>(S(2))).store_unaligned(&out);
      CHECK(One<S>::load_aligned(&out).value == a / 2);
    }
  }
  const One<S> nan(std::numeric_limits<S>::quiet_NaN());
  CHECK(kernel::max(One<S>(S(1)), nan).value == S(1));
  CHECK(kernel::limited(nan).value == S(-1000));
}

// The same kernels beside those of the machine's vectors, in one program.
TEST_CASE_TEMPLATE("scalar: products agree with those of vectors", S, float, double) {
  for (const Index m : {1, 7, 40}) {
    const Index n = 19, k = 65;
    const Matrix<S> a = moxie::test::random<S>(m, k, 401);
    const Matrix<S> b = moxie::test::random<S>(k, n, 402);
    Matrix<S> c(m, n), d(m, n);
    const auto product = [&](Matrix<S>& to) {
      return kernel::Product<S>{m, n, k, kernel::plain<S>(a), kernel::plain<S>(b), kernel::replace<S>(to)};
    };
    kernel::gemm<S, ScalarArch>(product(c), {});
    kernel::gemm<S>(product(d), {});
    CHECK(moxie::test::relative_error(c, moxie::test::as_double(d)) < moxie::test::Tolerance<S>::sum);
  }
}

}  // namespace

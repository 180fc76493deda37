// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/simd.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::test::Tolerance;
namespace kernel = moxie::kernel;

TEST_CASE_TEMPLATE("map: visits every element of rows of any length, and none beyond", S, float, double) {
  for (Index n = 0; n <= 40; ++n) {
    const Matrix<S> a = moxie::test::random<S>(1, n + 1, 201);
    const Matrix<S> b = moxie::test::random<S>(1, n + 1, 202);
    Matrix<S> out = moxie::test::untouched<S>(1, n + 1);
    kernel::map(
        n, out.data(), [](auto u, auto v) { return u * v + u; }, a.data(), b.data());
    for (Index i = 0; i < n; ++i) {
      CHECK(out(0, i) == doctest::Approx(double(a(0, i)) * double(b(0, i)) + double(a(0, i))).epsilon(1e-6));
    }
    CHECK(out(0, n) == S(-77));
  }
}

TEST_CASE_TEMPLATE("map: an element has the same bits wherever in the row it stands", S, float, double) {
  const Index n = 37;
  const Matrix<S> a = moxie::test::random<S>(1, n, 203);
  const auto f = [](auto v) { return kernel::exp(v) * kernel::tanh(v) + kernel::erf(v); };
  Matrix<S> whole(1, n);
  kernel::map(n, whole.data(), f, a.data());
  for (Index i = 0; i < n; ++i) {
    S alone = 0;
    kernel::map(1, &alone, f, a.data() + i);
    CHECK(alone == whole(0, i));
    Matrix<S> rest(1, n);
    kernel::map(n - i, rest.data(), f, a.data() + i);  // other alignments
    CHECK(rest(0, 0) == whole(0, i));
  }
}

TEST_CASE_TEMPLATE("map: may write several outputs, over its inputs too", S, float, double) {
  const Index n = 21;
  const Matrix<S> a = moxie::test::random<S>(1, n, 204);
  const Matrix<S> b = moxie::test::random<S>(1, n, 205);
  Matrix<S> u = a, v = b;
  kernel::map(
      n, std::array{u.data(), v.data()},
      [](auto x, auto y) {
        return std::array{x + y, x - y};
      },
      u.data(), v.data());
  CHECK(moxie::test::same_bits<S>(u, a + b));
  CHECK(moxie::test::same_bits<S>(v, a - b));
}

TEST_CASE_TEMPLATE("dot: is the sum of products for any length, with the same bits wherever the rows lie", S, float, double) {
  for (Index n = 0; n <= 70; ++n) {
    const Matrix<S> a = moxie::test::random<S>(1, n, 206);
    const Matrix<S> b = moxie::test::random<S>(1, n, 207);
    double sum = 0;
    double size = 1e-30;
    for (Index i = 0; i < n; ++i) {
      sum += double(a(0, i)) * double(b(0, i));
      size += std::abs(double(a(0, i)) * double(b(0, i)));
    }
    const S result = kernel::dot(n, a.data(), b.data());
    CHECK(std::abs(double(result) - sum) / size < Tolerance<S>::sum);
    for (Index shift = 1; shift < 4; ++shift) {
      std::vector<S> moved(std::size_t(n + shift));
      std::copy_n(a.data(), n, moved.data() + shift);
      CHECK(kernel::dot(n, static_cast<const S*>(moved.data() + shift), b.data()) == result);
    }
  }
}

TEST_CASE_TEMPLATE("exp, tanh, erf: agree with the standard library over their range", S, float, double) {
  double worst = 0;
  const auto check = [&](auto f, auto exact, double from, double to) {
    const Index n = 4001;
    Matrix<S> x(1, n), y(1, n);
    for (Index i = 0; i < n; ++i) {
      x(0, i) = S(from + (to - from) * double(i) / double(n - 1));
    }
    kernel::map(n, y.data(), f, x.data());
    for (Index i = 0; i < n; ++i) {
      const double expected = exact(double(x(0, i)));
      const double error = std::abs(double(y(0, i)) - expected) / std::max(std::abs(expected), 1e-30);
      worst = error <= worst ? worst : error;
    }
  };
  check([](auto v) { return kernel::exp(v); }, [](double v) { return std::exp(v); }, -60, 60);
  CHECK(worst < Tolerance<S>::function);
  worst = 0;
  check([](auto v) { return kernel::tanh(v); }, [](double v) { return std::tanh(v); }, -12, 12);
  CHECK(worst < Tolerance<S>::function);
  worst = 0;
  check([](auto v) { return kernel::erf(v); }, [](double v) { return std::erf(v); }, -6, 6);
  CHECK(worst < Tolerance<S>::function);
}

TEST_CASE_TEMPLATE("exp, tanh, erf: of the largest numbers are the limits, and of NaN are NaN", S, float, double) {
  const S largest = std::numeric_limits<S>::max();
  const S infinity = std::numeric_limits<S>::infinity();
  const S in[] = {-infinity, -largest, S(-1e10), S(1e10), largest, infinity, std::numeric_limits<S>::quiet_NaN()};
  const Index n = 7;
  const auto check = [&](auto f, S low, S high) {
    S out[n];
    kernel::map(n, out, f, in);
    for (Index i = 0; i < 3; ++i) {
      CHECK(out[i] == low);
      CHECK(out[i + 3] == high);
    }
    CHECK(std::isnan(out[6]));
  };
  check([](auto v) { return kernel::exp(v); }, S(0), infinity);
  check([](auto v) { return kernel::tanh(v); }, S(-1), S(1));
  check([](auto v) { return kernel::erf(v); }, S(-1), S(1));
}

TEST_CASE_TEMPLATE("sum, largest, find_above, all_finite: of every length", S, float, double) {
  for (Index n = 1; n <= 70; ++n) {
    const Matrix<S> values = moxie::test::random<S>(1, n + 1, 47);
    const S* a = values.data() + 1;  // not aligned
    double sum = 0;
    double size = 0;
    for (Index i = 0; i < n; ++i) {
      sum += double(a[i]);
      size += std::abs(double(a[i]));
    }
    CHECK(std::abs(double(kernel::sum(n, a)) - sum) <= Tolerance<S>::sum * size);
    CHECK(kernel::largest(n, a) == *std::max_element(a, a + n));
    for (const S limit : {S(-10), S(0), S(0.7), S(10)}) {
      for (const Index start : {Index{0}, n / 2, n}) {
        const auto* expected = std::find_if(a + start, a + n, [&](S v) { return v > limit; });
        CHECK(kernel::find_above(start, n, a, limit) == expected - a);
      }
    }
    CHECK(kernel::all_finite(n, a));
    for (const S bad : {std::numeric_limits<S>::infinity(), std::numeric_limits<S>::quiet_NaN()}) {
      for (const Index at : {Index{0}, n / 2, n - 1}) {
        Matrix<S> broken = values;
        broken(0, 1 + at) = bad;
        CHECK(!kernel::all_finite(n, broken.data() + 1));
      }
    }
  }
}

TEST_CASE_TEMPLATE("simd: the first numbers of a vector, and the sum of all", S, float, double) {
  using V = kernel::Batch<S>;
  constexpr moxie::Index width{V::size};
  std::array<S, V::size> numbers{};
  for (std::size_t i = 0; i < V::size; ++i) {
    numbers[i] = S(i + 1);
  }
  const V v = V::load_unaligned(numbers.data());
  for (moxie::Index n = 0; n <= width + 3; ++n) {
    std::array<S, V::size> first{};
    kernel::first_of(v, n).store_unaligned(first.data());
    for (moxie::Index i = 0; i < width; ++i) {
      CHECK(first[std::size_t(i)] == (i < n ? S(i + 1) : S(0)));
    }
  }
  CHECK(kernel::sum_of(v) == S(width * (width + 1) / 2));
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/linear_sum_assignment.hpp>
#include <numeric>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::linear_sum_assignment;
using moxie::LinearSumAssignment;
using moxie::Matrix;

// The first of least cost among all permutations in lexicographic order.
std::vector<Index> best_of_all(const Matrix<double>& cost) {
  std::vector<Index> p(std::size_t(cost.rows()));
  std::iota(p.begin(), p.end(), Index{0});
  std::vector<Index> best = p;
  double least = std::numeric_limits<double>::infinity();
  do {
    double sum = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      sum += cost(Index(i), p[i]);
    }
    if (sum < least) {
      least = sum;
      best = p;
    }
  } while (std::next_permutation(p.begin(), p.end()));
  return best;
}

Matrix<double> random_integers(Index n, Index least, Index count, std::uint64_t seed) {
  Matrix<double> m(n, n);
  for (Index i = 0; i < m.size(); ++i) {
    m.data()[i] = double(least + moxie::Rng(seed).below(count, std::uint64_t(i)));
  }
  return m;
}

// A permutation, its cost, and potentials that prove it optimal; `rounding` is what a pair may be off by.
void check_optimal(const Matrix<double>& cost, const LinearSumAssignment& found, double rounding) {
  const Index n = cost.rows();
  REQUIRE(Index(found.column.size()) == n);
  REQUIRE(Index(found.row_potential.size()) == n);
  REQUIRE(Index(found.column_potential.size()) == n);
  std::vector<Index> columns = found.column;
  std::sort(columns.begin(), columns.end());
  double sum = 0;
  double bound = 0;
  double worst = 0;
  for (Index i = 0; i < n; ++i) {
    REQUIRE(columns[std::size_t(i)] == i);
    const double u = found.row_potential[std::size_t(i)];
    sum += cost(i, found.column[std::size_t(i)]);
    bound += u + found.column_potential[std::size_t(i)];
    for (Index j = 0; j < n; ++j) {
      const double reduced = cost(i, j) - u - found.column_potential[std::size_t(j)];
      worst = std::max(worst, j == found.column[std::size_t(i)] ? std::abs(reduced) : -reduced);
    }
  }
  CHECK(found.cost == sum);
  CHECK(worst <= rounding);
  CHECK(std::abs(sum - bound) <= rounding * double(n));
}

TEST_CASE("linear sum assignment: is the lexicographically smallest of least cost, for integers with many ties") {
  for (Index n = 1; n <= 7; ++n) {
    for (const Index values : {Index{1}, Index{2}, Index{3}, Index{6}, Index{50}}) {
      const std::uint64_t matrices = n < 6 ? 200 : 20;
      for (std::uint64_t seed = 0; seed < matrices; ++seed) {
        CAPTURE(n);
        CAPTURE(values);
        CAPTURE(seed);
        const Matrix<double> cost = random_integers(n, -values / 2, values, 1000 * std::uint64_t(values) + seed);
        const LinearSumAssignment found = linear_sum_assignment(cost);
        REQUIRE(found.column == best_of_all(cost));
        check_optimal(cost, found, 0);
      }
    }
  }
}

TEST_CASE("linear sum assignment: is that of the brute force for real costs") {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const Matrix<double> cost = moxie::test::random<double>(6, 6, seed, 100);
    const LinearSumAssignment found = linear_sum_assignment(cost);
    CHECK(found.column == best_of_all(cost));
    check_optimal(cost, found, 1e-12);
  }
}

TEST_CASE("linear sum assignment: sorts the products of two sequences in opposite order") {
  // Σ a_i b_π(i) is least where a rises as b falls (the rearrangement inequality).
  const Index n = 40;
  Matrix<double> cost(n, n);
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < n; ++j) {
      cost(i, j) = double((i + 1) * (j + 1));
    }
  }
  const LinearSumAssignment found = linear_sum_assignment(cost);
  for (Index i = 0; i < n; ++i) {
    CHECK(found.column[std::size_t(i)] == n - 1 - i);
  }
  CHECK(found.cost == double(n * (n + 1) * (n + 2)) / 6);
}

TEST_CASE("linear sum assignment: finds a hidden permutation, and takes the identity where all costs are equal") {
  const Index n = 30;
  const Matrix<double> equal = Matrix<double>::Constant(n, n, 2.5);
  const LinearSumAssignment identity = linear_sum_assignment(equal);
  Matrix<double> hidden = equal;
  for (Index i = 0; i < n; ++i) {
    CHECK(identity.column[std::size_t(i)] == i);
    hidden(i, 7 * i % n) = -1;
  }
  CHECK(identity.cost == 2.5 * double(n));
  const LinearSumAssignment found = linear_sum_assignment(hidden);
  for (Index i = 0; i < n; ++i) {
    CHECK(found.column[std::size_t(i)] == 7 * i % n);
  }
  CHECK(found.cost == -double(n));
}

TEST_CASE("linear sum assignment: of larger matrices is optimal by its potentials") {
  for (const Index n : {Index{8}, Index{33}, Index{90}, Index{200}}) {
    CAPTURE(n);
    for (const Index values : {Index{2}, Index{10}, Index{1000}}) {
      const Matrix<double> cost = random_integers(n, 0, values, std::uint64_t(n + values));
      check_optimal(cost, linear_sum_assignment(cost), 0);
    }
    const Matrix<double> cost = moxie::test::random<double>(n, n, std::uint64_t(n));
    check_optimal(cost, linear_sum_assignment(cost), 1e-12);
  }
}

TEST_CASE("linear sum assignment: n = 0 is legal, and n = 1 has no choice") {
  const LinearSumAssignment none = linear_sum_assignment(Matrix<double>(0, 0));
  CHECK(none.column.empty());
  CHECK(none.cost == 0);
  const Matrix<double> one = Matrix<double>::Constant(1, 1, -3.5);
  const LinearSumAssignment found = linear_sum_assignment(one);
  CHECK(found.column == std::vector<Index>{0});
  CHECK(found.cost == -3.5);
  check_optimal(one, found, 0);
}

TEST_CASE("linear sum assignment: looks at a part of a matrix too") {
  const Matrix<double> whole = random_integers(9, 0, 5, 3);
  const Matrix<double> part = whole.block(2, 3, 6, 6);
  CHECK(linear_sum_assignment(whole.block(2, 3, 6, 6)).column == linear_sum_assignment(part).column);
}

TEST_CASE("linear sum assignment: refuses what is not square or not finite") {
  using moxie::test::message_of;
  CHECK(message_of<moxie::ShapeError>([] { linear_sum_assignment(Matrix<double>(2, 3)); }) ==
        "linear_sum_assignment: cost is (2,3), expected (2,2)");
  CHECK_THROWS_AS(linear_sum_assignment(Matrix<double>(0, 3)), moxie::ShapeError);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                           -std::numeric_limits<double>::infinity(), std::numeric_limits<double>::max()}) {
    Matrix<double> cost = Matrix<double>::Zero(3, 3);
    cost(1, 2) = bad;
    CHECK(message_of<moxie::ValueError>([&] { linear_sum_assignment(cost); }) ==
          "linear_sum_assignment: the cost of row 1 and column 2 is not finite, or too large for sums");
  }
  Matrix<double> large = Matrix<double>::Constant(3, 3, 1e300);
  large(0, 0) = -1e300;
  CHECK(linear_sum_assignment(large).column == std::vector<Index>{0, 1, 2});
}

}  // namespace

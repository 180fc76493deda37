// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moxie/core/matrix.hpp>
#include <vector>

namespace moxie {

/// An assignment of n rows to n columns of least cost, and the proof that there is none of less: u_i + v_j <= c_ij everywhere,
/// with equality on the assignment, so that Σ u + Σ v is its cost and a lower bound of all others.
struct MinimumAssignment {
  std::vector<Index> column;             ///< n: the column of each row; a permutation
  std::vector<double> row_potential;     ///< n: u
  std::vector<double> column_potential;  ///< n: v
  double cost = 0;                       ///< Σ_i c(i, column[i]), in order of i
};

/// Assigns every row of `cost` (n,n) a column of its own:
///
///     minimize over permutations π   Σ_i c(i, π_i)
///
/// The Hungarian method (Kuhn 1955) with potentials: rows come in one after the other, each by a shortest augmenting path
/// (Edmonds and Karp 1972; Jonker and Volgenant 1987). Costs may be negative; n = 0 is legal.
///
/// Ties: of all assignments of least cost, the lexicographically smallest, π_0 first. Integers whose sums stay below 2^53 are
/// computed exactly; with other costs rounding may make a tie or decide one, and the potentials hold to rounding.
///
/// Throws ShapeError unless `cost` is square, ValueError for a cost that is not finite or so large that 8n of it would not be.
/// Cost: O(n³), on one thread.
inline MinimumAssignment minimum_assignment(RowView<const double> cost) {
  constexpr std::string_view where = "minimum_assignment";
  const Index n = cost.rows();
  expect_shape(where, "cost", cost, n, n);
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < n; ++j) {
      if (!std::isfinite(8 * double(n) * cost(i, j))) {
        throw ValueError(std::string(where) + ": the cost of row " + std::to_string(i) + " and column " + std::to_string(j) +
                         " is not finite, or too large for sums");
      }
    }
  }

  // Column n stands for none: where the path of a new row begins.
  const auto size = std::size_t(n);
  constexpr Index nothing = -1;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  std::vector<double> u(size, 0.0);
  std::vector<double> v(size + 1, 0.0);
  std::vector<Index> row_of(size + 1, nothing);
  std::vector<Index> previous(size + 1, nothing);
  std::vector<double> distance(size + 1);
  std::vector<std::uint8_t> reached(size + 1);
  for (Index i = 0; i < n; ++i) {
    std::fill(distance.begin(), distance.end(), infinity);
    std::fill(reached.begin(), reached.end(), std::uint8_t{0});
    Index j = n;
    row_of[size] = i;
    while (row_of[std::size_t(j)] != nothing) {
      reached[std::size_t(j)] = 1;
      const Index row = row_of[std::size_t(j)];
      Index nearest = nothing;
      double step = infinity;
      for (Index k = 0; k < n; ++k) {
        const auto c = std::size_t(k);
        if (reached[c] != 0) {
          continue;
        }
        const double reduced = cost(row, k) - u[std::size_t(row)] - v[c];
        if (reduced < distance[c]) {
          distance[c] = reduced;
          previous[c] = j;
        }
        if (distance[c] < step) {
          step = distance[c];
          nearest = k;
        }
      }
      for (std::size_t c = 0; c <= size; ++c) {
        if (reached[c] != 0) {
          u[std::size_t(row_of[c])] += step;
          v[c] -= step;
        } else {
          distance[c] -= step;
        }
      }
      j = nearest;
    }
    while (j != n) {  // every row of the path moves one column on
      const Index from = previous[std::size_t(j)];
      row_of[std::size_t(j)] = row_of[std::size_t(from)];
      j = from;
    }
  }

  std::vector<Index> column(size);
  for (Index j = 0; j < n; ++j) {
    column[std::size_t(row_of[std::size_t(j)])] = j;
  }
  // Optimal assignments are those of tight pairs alone. Row by row: the lowest column that it can have while later rows, moving
  // along tight pairs, make room for it. `next[j]` is where the row of column j would go.
  const auto is_tight = [&](Index i, Index j) {
    return column[std::size_t(i)] == j || cost(i, j) - u[std::size_t(i)] - v[std::size_t(j)] <= 0;
  };
  std::vector<Index> next(size);
  std::vector<Index> queue;
  for (Index i = 0; i < n; ++i) {
    const Index left = column[std::size_t(i)];
    std::fill(next.begin(), next.end(), nothing);
    next[std::size_t(left)] = left;
    queue.assign(1, left);
    for (std::size_t head = 0; head < queue.size(); ++head) {
      const Index to = queue[head];
      for (Index k = i + 1; k < n; ++k) {
        const Index from = column[std::size_t(k)];
        if (next[std::size_t(from)] == nothing && is_tight(k, to)) {
          next[std::size_t(from)] = to;
          queue.push_back(from);
        }
      }
    }
    Index j = 0;
    while (next[std::size_t(j)] == nothing || !is_tight(i, j)) {
      ++j;
    }
    Index row = i;
    while (j != left) {
      const Index displaced = row_of[std::size_t(j)];
      column[std::size_t(row)] = j;
      row_of[std::size_t(j)] = row;
      row = displaced;
      j = next[std::size_t(j)];
    }
    column[std::size_t(row)] = left;
    row_of[std::size_t(left)] = row;
  }

  MinimumAssignment result{std::move(column), std::move(u), std::move(v), 0};
  result.column_potential.resize(size);
  for (Index i = 0; i < n; ++i) {
    result.cost += cost(i, result.column[std::size_t(i)]);
  }
  return result;
}

}  // namespace moxie

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moxie/core/error.hpp>
#include <moxie/core/matrix.hpp>
#include <string>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// A one-to-one matching of n rows with n columns of least cost, and the proof that no other costs
/// less: u_i + v_j <= c_ij everywhere, with equality on the matching. So Σ u + Σ v is its cost, and
/// a lower bound of all other costs.
struct LinearSumAssignment {
  std::vector<Index> column;             ///< n: the column of each row; a permutation
  std::vector<double> row_potential;     ///< n: u
  std::vector<double> column_potential;  ///< n: v
  double cost = 0;                       ///< Σ_i c(i, column[i]), in order of i
};

namespace detail {

/// The Hungarian method on one matrix of costs: `add_row` for each row in order, then `prefer_low_columns`.
class HungarianMethod {
 public:
  explicit HungarianMethod(RowView<const double> cost)
      : cost_(cost),
        n_(cost.rows()),
        u_(size(), 0.0),
        v_(size() + 1, 0.0),
        column_(size()),
        row_of_(size() + 1, none),
        previous_(size() + 1, none),
        distance_(size() + 1),
        reached_(size() + 1),
        next_(size()) {}

  /// Matches row i too, along a shortest augmenting path.
  void add_row(Index i) {
    std::fill(distance_.begin(), distance_.end(), infinity);
    std::fill(reached_.begin(), reached_.end(), std::uint8_t{0});
    // Column n means no column: the path of the new row begins there.
    Index j = n_;
    at(row_of_, n_) = i;
    while (at(row_of_, j) != none) {
      at(reached_, j) = 1;
      j = advance(j);
    }
    while (j != n_) {  // every row of the path moves one column on
      const Index from = at(previous_, j);
      at(row_of_, j) = at(row_of_, from);
      j = from;
    }
  }

  /// Takes the lexicographically smallest of all optimal matchings. Optimal matchings consist of
  /// tight pairs. Each row in order takes the lowest column that later rows can free by moves along
  /// tight pairs.
  void prefer_low_columns() {
    for (Index j = 0; j < n_; ++j) {
      at(column_, at(row_of_, j)) = j;
    }
    for (Index i = 0; i < n_; ++i) {
      find_moves(i);
      Index j = 0;
      while (at(next_, j) == none || !is_tight(i, j)) {
        ++j;
      }
      move_rows(i, j);
    }
  }

  LinearSumAssignment result() {
    LinearSumAssignment found{std::move(column_), std::move(u_), std::move(v_), 0};
    found.column_potential.resize(size());
    for (Index i = 0; i < n_; ++i) {
      found.cost += cost_(i, found.column[std::size_t(i)]);
    }
    return found;
  }

 private:
  static constexpr Index none = -1;
  static constexpr double infinity = std::numeric_limits<double>::infinity();

  template <class T>
  static T& at(std::vector<T>& v, Index i) {
    return v[std::size_t(i)];
  }
  std::size_t size() const { return std::size_t(n_); }

  /// One step of Dijkstra's method: from column j, which is reached, to the nearest column that is not.
  Index advance(Index j) {
    const Index row = at(row_of_, j);
    Index nearest = none;
    double step = infinity;
    for (Index k = 0; k < n_; ++k) {
      if (at(reached_, k) != 0) {
        continue;
      }
      const double reduced = cost_(row, k) - at(u_, row) - at(v_, k);
      if (reduced < at(distance_, k)) {
        at(distance_, k) = reduced;
        at(previous_, k) = j;
      }
      if (at(distance_, k) < step) {
        step = at(distance_, k);
        nearest = k;
      }
    }
    for (Index k = 0; k <= n_; ++k) {
      if (at(reached_, k) != 0) {
        at(u_, at(row_of_, k)) += step;
        at(v_, k) -= step;
      } else {
        at(distance_, k) -= step;
      }
    }
    return nearest;
  }

  bool is_tight(Index i, Index j) { return at(column_, i) == j || cost_(i, j) - at(u_, i) - at(v_, j) <= 0; }

  /// next[j]: the column to which the row of column j moves to free it for row i; none if it
  /// cannot.
  void find_moves(Index i) {
    const Index left = at(column_, i);
    std::fill(next_.begin(), next_.end(), none);
    at(next_, left) = left;
    queue_.assign(1, left);
    for (std::size_t head = 0; head < queue_.size(); ++head) {
      const Index to = queue_[head];
      for (Index k = i + 1; k < n_; ++k) {
        const Index from = at(column_, k);
        if (at(next_, from) == none && is_tight(k, to)) {
          at(next_, from) = to;
          queue_.push_back(from);
        }
      }
    }
  }

  /// Gives column j to row i, and their next columns to the rows that this displaces.
  void move_rows(Index i, Index j) {
    const Index left = at(column_, i);
    Index row = i;
    while (j != left) {
      const Index displaced = at(row_of_, j);
      at(column_, row) = j;
      at(row_of_, j) = row;
      row = displaced;
      j = at(next_, j);
    }
    at(column_, row) = left;
    at(row_of_, left) = row;
  }

  RowView<const double> cost_;
  Index n_;
  std::vector<double> u_;
  std::vector<double> v_;
  std::vector<Index> column_;    // of each row
  std::vector<Index> row_of_;    // of each column
  std::vector<Index> previous_;  // of each column, on the path to it
  std::vector<double> distance_;
  std::vector<std::uint8_t> reached_;
  std::vector<Index> next_;
  std::vector<Index> queue_;
};

}  // namespace detail

/// Solves the linear sum assignment problem. Every row of `cost` (n,n) gets a different column:
///
///     minimize over permutations π   Σ_i c(i, π_i)
///
/// by the Hungarian method (Kuhn 1955) with potentials. Rows join one after the other, each by a
/// shortest augmenting path (Edmonds and Karp 1972; Jonker and Volgenant 1987). Costs may be
/// negative; n = 0 is legal.
///
/// Ties: the result is the lexicographically smallest of all permutations of least cost, π_0 first.
/// Integers with sums below 2^53 are computed exactly. With other costs, rounding may make or
/// decide a tie, and the potentials hold up to rounding.
///
/// Throws ShapeError unless `cost` is square, and ValueError unless 8n times each cost is finite.
/// Cost: O(n³), on one thread.
inline LinearSumAssignment linear_sum_assignment(RowView<const double> cost) {
  constexpr std::string_view where = "linear_sum_assignment";
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
  detail::HungarianMethod method(cost);
  for (Index i = 0; i < n; ++i) {
    method.add_row(i);
  }
  method.prefer_low_columns();
  return method.result();
}

}  // namespace moxie::inline MOXIE_NAMESPACE

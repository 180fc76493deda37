// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/core/exec.hpp>
#include <moxie/kernel/simd.hpp>

namespace moxie {

/// In place, for each row: s_i = exp(z_i - max z) / Σ_j exp(z_j - max z). Sums in order of i, in `Scalar`.
template <class Scalar>
void softmax_rows(RowView<Scalar> z, const Exec& exec) {
  exec.parallel_ranges(z.rows(), 64, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      Scalar* row = z.row(t);
      const Scalar largest = *std::max_element(row, row + z.cols());
      kernel::map(
          z.cols(), row, [&](auto v) { return kernel::exp(v - decltype(v)(largest)); }, row);
      Scalar sum = 0;
      for (Index i = 0; i < z.cols(); ++i) {
        sum += row[i];
      }
      for (Index i = 0; i < z.cols(); ++i) {
        row[i] /= sum;
      }
    }
  });
}

/// The adjoint of the softmax, in place: ds -> dz, dz_i = s_i (ds_i - Σ_j ds_j s_j).
///
/// Because Σ s = 1, a constant may be taken from all ds_i first: the one of the largest score, so that a score near 1 does not
/// leave the difference of two nearly equal numbers.
template <class Scalar>
void softmax_rows_backward(RowView<const std::type_identity_t<Scalar>> s, RowView<Scalar> ds, const Exec& exec) {
  exec.parallel_ranges(s.rows(), 64, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const Scalar* score = s.row(t);
      Scalar* d = ds.row(t);
      const Scalar shift = d[std::max_element(score, score + s.cols()) - score];
      Scalar dot = 0;
      for (Index i = 0; i < s.cols(); ++i) {
        d[i] -= shift;
        dot += d[i] * score[i];
      }
      for (Index i = 0; i < s.cols(); ++i) {
        d[i] = score[i] * (d[i] - dot);
      }
    }
  });
}

/// In place: s = 1 / (1 + exp(-z)).
template <class Scalar>
void sigmoid_rows(RowView<Scalar> z, const Exec& exec) {
  exec.parallel_ranges(z.rows(), 64, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      kernel::map(
          z.cols(), z.row(t),
          [](auto v) {
            using V = decltype(v);
            return V(1) / (V(1) + kernel::exp(-v));
          },
          z.row(t));
    }
  });
}

/// The adjoint of the sigmoid, in place: ds -> dz, dz = ds s (1 - s).
template <class Scalar>
void sigmoid_rows_backward(RowView<const std::type_identity_t<Scalar>> s, RowView<Scalar> ds, const Exec& exec) {
  exec.parallel_ranges(s.rows(), 64, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      kernel::map(
          s.cols(), ds.row(t), [](auto d, auto v) { return d * v * (decltype(v)(1) - v); }, ds.row(t), s.row(t));
    }
  });
}

namespace detail {

/// Calls `f(t)` for every row, 64 a task.
template <class F>
void for_each_row(Index rows, const Exec& exec, F&& f) {
  exec.parallel_ranges(rows, 64, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      f(t);
    }
  });
}

/// Throws ValueError that names the first token (or whatever `what` says) with a NaN or infinite logit. `row_of(i)` is its
/// number.
template <class Scalar, class RowOf>
void expect_finite_logits(std::string_view where, RowView<const Scalar> z, RowOf&& row_of, std::string_view what = "token") {
  for (Index t = 0; t < z.rows(); ++t) {
    Scalar sum = 0;  // 0·x is 0 for finite x and NaN otherwise
    for (Index i = 0; i < z.cols(); ++i) {
      sum += Scalar(0) * z(t, i);
    }
    if (!(sum == Scalar(0))) {
      throw ValueError(std::string(where) + ": the logits of " + std::string(what) + " " + std::to_string(row_of(t)) +
                       " are not finite");
    }
  }
}

}  // namespace detail
}  // namespace moxie

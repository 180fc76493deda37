// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/core/exec.hpp>
#include <moxie/kernel/math.hpp>
#include <moxie/routing/formula.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

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

/// The softmax of n numbers. Sums in the order of `kernel::sum`, in `Scalar`. s may be z.
template <class Scalar>
void softmax(Index n, const Scalar* z, Scalar* s) {
  const Scalar largest = kernel::largest(n, z);
  kernel::map(
      n, s, [&](auto v) { return kernel::exp(v - decltype(v)(largest)); }, z);
  const Scalar share = 1 / kernel::sum(n, s);
  kernel::map(
      n, s, [&](auto v) { return v * decltype(v)(share); }, s);
}

/// The adjoint of the softmax of n numbers, or of one times `scale`, whose values s then are. dz may be ds. NaN where s has
/// one.
///
/// Because Σ s is the scale, a constant may be taken from all ds_i first: the one of the largest score, so that a score near 1
/// does not leave the difference of two nearly equal numbers.
template <class Scalar>
void softmax_backward(Index n, const Scalar* s, const Scalar* ds, Scalar* dz, std::type_identity_t<Scalar> scale = 1) {
  const Index best = std::find(s, s + n, kernel::largest(n, s)) - s;
  const Scalar shift = ds[best < n ? best : 0];  // nothing is equal to NaN
  kernel::map(
      n, dz, [&](auto v) { return v - decltype(v)(shift); }, ds);
  const Scalar dot = kernel::dot(n, dz, s) / scale;
  kernel::map(
      n, dz, [&](auto v, auto p) { return p * (v - decltype(v)(dot)); }, dz, s);
}

/// The checks of functions from the rows of `in` to those of `out`, which may be the same matrix.
template <class In, class Out>
void expect_rows(std::string_view where, std::string_view name, const RowView<In>& in, std::string_view out_name,
                 const RowView<Out>& out) {
  if (in.cols() < 1 && in.rows() > 0) {
    throw ShapeError(std::string(where) + ": " + std::string(name) + " is " + dimensions(in.rows(), in.cols()) +
                     ", expected at least one column");
  }
  expect_shape(where, out_name, out, in.rows(), in.cols());
  const bool same = in.data() == out.data() && in.stride() == out.stride();
  expect_value(same || !overlaps(in, out), where, "the matrices overlap, and are not the same");
}

}  // namespace detail

/// For each row: s_i = exp(z_i - max z) / Σ_j exp(z_j - max z). s may be z. A row with a NaN or +∞ becomes NaN.
///
/// Throws ShapeError for another shape of s or rows without columns, ValueError if s overlaps z otherwise. Backward:
/// `softmax_rows_backward`.
template <class Scalar>
void softmax_rows(RowView<const std::type_identity_t<Scalar>> z, RowView<Scalar> s, const Exec& exec) {
  detail::expect_rows("softmax_rows", "z", z, "s", s);
  detail::for_each_row(z.rows(), exec, [&](Index t) { detail::softmax(z.cols(), z.row(t), s.row(t)); });
}
/// In place.
template <class Scalar>
void softmax_rows(RowView<Scalar> z, const Exec& exec) {
  softmax_rows<Scalar>(z, z, exec);
}

/// The adjoint of the softmax of each row, in place: ds -> dz, dz_i = s_i (ds_i - Σ_j ds_j s_j). A row in which s has a NaN
/// becomes NaN. Throws ShapeError for another shape of ds or rows without columns, ValueError if ds overlaps s.
template <class Scalar>
void softmax_rows_backward(RowView<const std::type_identity_t<Scalar>> s, RowView<Scalar> ds, const Exec& exec) {
  detail::expect_rows("softmax_rows_backward", "s", s, "ds", ds);
  detail::for_each_row(s.rows(), exec,
                       [&](Index t) { detail::softmax_backward<Scalar>(s.cols(), s.row(t), ds.row(t), ds.row(t)); });
}

/// In place: s = 1 / (1 + exp(-z)).
template <class Scalar>
void sigmoid_rows(RowView<Scalar> z, const Exec& exec) {
  detail::for_each_row(z.rows(), exec, [&](Index t) {
    kernel::map(
        z.cols(), z.row(t), [](auto v) { return kernel::sigmoid(v); }, z.row(t));
  });
}

/// The adjoint of the sigmoid, in place: ds -> dz, dz = ds s (1 - s). Throws ShapeError for another shape of ds, ValueError if
/// ds overlaps s.
template <class Scalar>
void sigmoid_rows_backward(RowView<const std::type_identity_t<Scalar>> s, RowView<Scalar> ds, const Exec& exec) {
  detail::expect_rows("sigmoid_rows_backward", "s", s, "ds", ds);
  detail::for_each_row(s.rows(), exec, [&](Index t) {
    kernel::map(
        s.cols(), ds.row(t), [](auto d, auto v) { return d * v * (decltype(v)(1) - v); }, ds.row(t), s.row(t));
  });
}

/// Sigmoid scores over their sum, for each row: p_i = s_i / Σ_j s_j, of logits z and s = σ(z). Computed from the logits, so
/// that p sums to 1 where all s are 0. p may be s.
///
/// Throws ShapeError for shapes that differ or rows without columns, ValueError if p overlaps z or s otherwise. Backward:
/// `sigmoid_probabilities_backward`.
template <class Scalar>
void sigmoid_probabilities(RowView<const Scalar> z, RowView<const Scalar> s, RowView<Scalar> p, const Exec& exec) {
  constexpr std::string_view where = "sigmoid_probabilities";
  detail::expect_shape(where, "s", s, z.rows(), z.cols());
  detail::expect_rows(where, "s", s, "p", p);
  detail::expect_value(!detail::overlaps(z, p), where, "p overlaps z");
  detail::for_each_row(z.rows(), exec, [&](Index t) {
    const Scalar largest = kernel::largest(z.cols(), z.row(t));
    Scalar sum = 0;
    for (Index i = 0; i < z.cols(); ++i) {
      p(t, i) = formula::scaled_sigmoid(z(t, i), s(t, i), largest);
      sum += p(t, i);
    }
    for (Index i = 0; i < z.cols(); ++i) {
      p(t, i) /= sum;
    }
  });
}

/// The adjoint, in place: dp -> dz. p is a softmax of ln σ(z), whose derivative is 1 - s: dz_i = (1 - s_i) p_i (dp_i - Σ_j dp_j
/// p_j).
template <class Scalar>
void sigmoid_probabilities_backward(RowView<const Scalar> p, RowView<const Scalar> s, RowView<Scalar> dp, const Exec& exec) {
  constexpr std::string_view where = "sigmoid_probabilities_backward";
  detail::expect_shape(where, "s", s, p.rows(), p.cols());
  detail::expect_rows(where, "p", p, "dp", dp);
  detail::expect_value(!detail::overlaps(s, dp), where, "dp overlaps s");
  detail::for_each_row(p.rows(), exec, [&](Index t) {
    detail::softmax_backward<Scalar>(p.cols(), p.row(t), dp.row(t), dp.row(t));
    kernel::map(
        p.cols(), dp.row(t), [](auto d, auto v) { return d * (decltype(v)(1) - v); }, dp.row(t), s.row(t));
  });
}

namespace detail {

/// Throws ValueError that names the token (or whatever `what` says) if one of its logits is NaN or infinite.
template <class Scalar>
void expect_finite_logits(std::string_view where, Index n, const Scalar* z, Index row, std::string_view what = "token") {
  if (!kernel::all_finite(n, z)) {
    throw ValueError(std::string(where) + ": the logits of " + std::string(what) + " " + std::to_string(row) +
                     " are not finite");
  }
}

/// The same for each row i of z, which is token `row_of(i)`: names the first one.
template <class Scalar, class RowOf>
void expect_finite_logits(std::string_view where, RowView<const Scalar> z, RowOf&& row_of, const Exec& exec,
                          std::string_view what = "token") {
  for_each_row(z.rows(), exec, [&](Index t) {  // of all that throw, the first is heard
    expect_finite_logits(where, z.cols(), z.row(t), row_of(t), what);
  });
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

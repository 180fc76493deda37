// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/index.hpp>
#include <stdexcept>
#include <string>
#include <string_view>

namespace moxie::inline MOXIE_VERSION_NAMESPACE {

/// A matrix has the wrong dimensions. Public entries throw it before any output is written.
struct ShapeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// An option or an element has a value that the call cannot accept (top_k > experts, a NaN logit, overlapping buffers).
struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace moxie::inline MOXIE_VERSION_NAMESPACE

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

inline std::string dimensions(Index rows, Index cols) {
  std::string text = "(";  // appended to: g++ 12 warns of a sum that begins with a literal (its bug 105651)
  text += std::to_string(rows);
  text += ',';
  text += std::to_string(cols);
  text += ')';
  return text;
}

// The throwing parts are out of line: a check is compiled at every entry and almost never fails.
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape_error(std::string_view where, std::string_view name, Index rows,
                                                                     Index cols, Index expected_rows, Index expected_cols,
                                                                     std::string_view symbol) {
  const auto side = [&](Index n) { return n < 0 ? std::string(symbol) : std::to_string(n); };
  throw ShapeError(std::string(where) + ": " + std::string(name) + " is " + dimensions(rows, cols) + ", expected (" +
                   side(expected_rows) + "," + side(expected_cols) + ")");
}
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_value_error(std::string_view where, std::string_view message) {
  throw ValueError(std::string(where) + ": " + std::string(message));
}
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_too_small(std::string_view where, std::string_view name, Index value,
                                                                   Index least) {
  throw ValueError(std::string(where) + ": " + std::string(name) + " is " + std::to_string(value) + ", expected at least " +
                   std::to_string(least));
}

}  // namespace detail

/// Throws ShapeError "where: name is (7,512), expected (T,256)" unless the matrix `m` is (rows, cols). A negative expectation
/// accepts any size and is printed as `symbol`.
template <class View>
void expect_shape(std::string_view where, std::string_view name, const View& m, Index rows, Index cols,
                  std::string_view symbol = "T") {
  if ((rows >= 0 && m.rows() != rows) || (cols >= 0 && m.cols() != cols)) {
    detail::throw_shape_error(where, name, m.rows(), m.cols(), rows, cols, symbol);
  }
}

/// Throws ValueError "where: message" unless `condition` holds.
inline void expect_value(bool condition, std::string_view where, std::string_view message) {
  if (!condition) {
    detail::throw_value_error(where, message);
  }
}

/// Throws ValueError "where: name is 2, expected at least 3" if a dimension or a count is below `least`.
inline void expect_at_least(std::string_view where, std::string_view name, Index value, Index least) {
  if (value < least) {
    detail::throw_too_small(where, name, value, least);
  }
}

namespace detail {

using moxie::expect_at_least;
using moxie::expect_shape;
using moxie::expect_value;

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

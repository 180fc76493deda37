// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

namespace moxie {

/// Sizes and positions; Eigen's own.
using Index = std::ptrdiff_t;

/// A matrix has other dimensions than the call needs. Thrown at public entries, before any output is written.
struct ShapeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// An option or an element has a value that the call cannot accept (top_k > experts, a NaN logit, overlapping buffers).
struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

namespace detail {

inline std::string dimensions(Index rows, Index cols) {
  std::string text = "(";  // appended to, since g++ 12 warns of a sum that begins with a literal (its bug 105651)
  text += std::to_string(rows);
  text += ',';
  text += std::to_string(cols);
  text += ')';
  return text;
}

/// Throws "where: name is (7,512), expected (T,256)" unless `m` is (rows, cols); a negative expectation takes any size and is
/// printed as `symbol`.
template <class View>
void expect_shape(std::string_view where, std::string_view name, const View& m, Index rows, Index cols,
                  std::string_view symbol = "T") {
  if ((rows < 0 || m.rows() == rows) && (cols < 0 || m.cols() == cols)) {
    return;
  }
  const auto side = [&](Index n) { return n < 0 ? std::string(symbol) : std::to_string(n); };
  throw ShapeError(std::string(where) + ": " + std::string(name) + " is " + dimensions(m.rows(), m.cols()) + ", expected (" +
                   side(rows) + "," + side(cols) + ")");
}

/// Throws "where: message" unless `condition` holds.
inline void expect_value(bool condition, std::string_view where, std::string_view message) {
  if (!condition) {
    throw ValueError(std::string(where) + ": " + std::string(message));
  }
}

/// The same for a dimension or count that has to be at least `least`.
inline void expect_at_least(std::string_view where, std::string_view name, Index value, Index least) {
  if (value < least) {
    throw ValueError(std::string(where) + ": " + std::string(name) + " is " + std::to_string(value) + ", expected at least " +
                     std::to_string(least));
  }
}

}  // namespace detail
}  // namespace moxie

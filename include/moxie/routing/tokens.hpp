// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/matrix.hpp>

namespace moxie {

/// What a router may look at: the tokens, and how they divide into sequences. Converts from a plain matrix, so that a call that
/// needs no more says `layer.forward(x, y, tape, exec)`, and no signature grows with the next router.
template <class Scalar>
struct Tokens {
  RowView<const Scalar> x;  ///< (T,D), one row a token
  /// L: the T tokens are B = T / L sequences of L consecutive rows. 0 means one sequence of all tokens.
  Index sequence_length = 0;

  Tokens() = default;
  template <class M>
  requires std::is_convertible_v<const M&, RowView<const Scalar>> Tokens(const M& tokens, Index length = 0)
      : x(tokens), sequence_length(length) {}

  Index count() const { return x.rows(); }
  /// Tokens of one sequence.
  Index length() const { return sequence_length > 0 ? sequence_length : count(); }
  /// B; 0 if there are no tokens.
  Index sequences() const { return count() == 0 ? 0 : count() / length(); }
};

namespace detail {

/// The checks that every entry makes: x is (T, model_dim) and T is a multiple of the sequence length.
template <class Scalar>
void expect_tokens(std::string_view where, const Tokens<Scalar>& in, Index model_dim) {
  expect_shape(where, "x", in.x, -1, model_dim);
  if (in.sequence_length < 0 || in.count() % std::max<Index>(in.length(), 1) != 0) {
    throw ShapeError(std::string(where) + ": " + std::to_string(in.count()) + " tokens do not divide into sequences of " +
                     std::to_string(in.sequence_length));
  }
}

}  // namespace detail
}  // namespace moxie

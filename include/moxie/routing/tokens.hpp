// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <moxie/core/matrix.hpp>
#include <moxie/core/random.hpp>
#include <moxie/core/sequences.hpp>
#include <optional>
#include <span>

namespace moxie {

/// What a router may look at: the tokens, and what is known of them. Converts from a plain matrix, so that a call that needs no
/// more says `layer.forward(x, y, tape, exec)`, and no signature grows with the next router.
///
///     moxie::Tokens<float> in(x, sequence_length);
///     in.mask = mask;
///     layer.forward(in, y, tape, exec);
///
/// A view: all that it points to stays the caller's, and must be the same in `backward`.
template <class Scalar>
struct Tokens {
  RowView<const Scalar> x;  ///< (T,D), one row a token
  Sequences sequences;      ///< how the tokens divide into B sequences
  /// T bytes, 0 for padding, or empty for none. Masked tokens take no part: the layer leaves them out before it calls the
  /// router and the experts, their outputs and gradients are zero, and what their rows hold (NaN too) changes nothing.
  std::span<const std::uint8_t> mask = {};
  /// (B,C), one row a sequence: what timestep and cluster routers look at, finite also where a sequence has no tokens. Its
  /// gradient comes back in `TokensGradient`.
  RowView<const Scalar> condition = {};
  /// T token ids: what hash routers look at.
  std::span<const std::int64_t> ids = {};
  /// Whether noise and jitter are drawn, and the load loss is taken. Only forward reads it: backward follows the tape.
  bool training = false;
  /// The stream of this step's noise: another one for every step and layer. A router that has to draw and finds none throws
  /// ValueError. The i-th token that is not masked draws the same numbers whatever the masked ones are.
  std::optional<Rng> rng = {};
  /// (T,E) standard normal numbers to take for the noise on logits instead of drawing them; empty to draw.
  RowView<const Scalar> noise = {};
  /// Set by the layer where it left masked tokens out: the row of each token in the caller's x.
  std::span<const Index> rows = {};
  /// Another K for this call (fewer experts for inference, say); 0: the router's own.
  Index top_k = 0;

  Tokens() = default;
  template <class M>
  requires std::is_convertible_v<const M&, RowView<const Scalar>> Tokens(const M& tokens, Sequences division = {})
      : x(tokens), sequences(division.over(x.rows())) {}

  Index count() const { return x.rows(); }
  /// Where token t stands in the x that the layer was given; errors name this.
  Index row(Index t) const { return rows.empty() ? t : rows[std::size_t(t)]; }
};

/// Where the gradient of `Tokens` goes: x always, the condition where one is asked for. Converts from a plain matrix.
template <class Scalar>
struct TokensGradient {
  RowView<Scalar> x;               ///< (T,D)
  RowView<Scalar> condition = {};  ///< (B,C), or empty

  TokensGradient() = default;
  template <class M>
  requires std::is_convertible_v<M&&, RowView<Scalar>>
  TokensGradient(  // NOLINT(bugprone-forwarding-reference-overload): constrained
      M&& dx, RowView<Scalar> dcondition = {})
      : x(std::forward<M>(dx)), condition(dcondition) {}
};

namespace detail {

/// The checks that every entry makes: x is (T, model_dim), T divides into the sequences, and what else there is fits.
template <class Scalar>
void expect_tokens(std::string_view where, const Tokens<Scalar>& in, Index model_dim) {
  expect_shape(where, "x", in.x, -1, model_dim);
  expect_at_least(where, "the number of rows of x", in.count(), 0);
  if (in.sequences.tokens() != in.count()) {
    throw ShapeError(std::string(where) + ": the sequences divide " + std::to_string(in.sequences.tokens()) +
                     " tokens, expected " + std::to_string(in.count()) + "; make them with Tokens(x, sequences), or .over(T)");
  }
  in.sequences.expect_valid(where);
  const auto expect_length = [&](std::string_view name, std::size_t length) {
    if (length != 0 && Index(length) != in.count()) {
      throw ShapeError(std::string(where) + ": there are " + std::to_string(length) + " " + std::string(name) +
                       ", expected one for each of " + std::to_string(in.count()) + " tokens");
    }
  };
  expect_length("elements of the mask", in.mask.size());
  expect_length("ids", in.ids.size());
  if (in.condition.rows() != 0) {
    expect_shape(where, "condition", in.condition, in.sequences.count(), -1, "C");
  }
  if (in.noise.rows() != 0) {
    expect_shape(where, "noise", in.noise, in.count(), -1, "E");
  }
  expect_value(in.top_k >= 0, where, "top_k must not be negative");
}

}  // namespace detail
}  // namespace moxie

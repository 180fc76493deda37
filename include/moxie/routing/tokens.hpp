// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <moxie/core/buffer.hpp>
#include <moxie/core/random.hpp>
#include <moxie/core/sequences.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

template <class M>
inline constexpr bool is_eigen = std::is_base_of_v<Eigen::DenseBase<std::remove_cvref_t<M>>, std::remove_cvref_t<M>>;

/// A temporary that owns its numbers: a view of it would outlive them.
template <class M>
concept TemporaryMatrix =
    !std::is_lvalue_reference_v<M> && std::is_base_of_v<Eigen::PlainObjectBase<std::remove_cvref_t<M>>, std::remove_cvref_t<M>>;

/// An Eigen matrix or expression that no row-major view can be made of: it is column-major (as `Eigen::MatrixXf` is), of
/// another scalar, or has to be computed first.
template <class M, class T>
concept NotARowMajorMatrixOfThisScalar = is_eigen<M> && !std::is_convertible_v<M, RowView<T>>;

/// In the signatures of what is deleted, for the compiler to print.
struct OnlyRowMajorMatricesOfThisScalar {};
struct ATemporaryMatrixWouldDangle {};

}  // namespace detail

/// What a router may look at: the tokens, and what is known of them. Converts from a plain matrix, so that a call that needs no
/// more says `layer.forward(x, y, tape, exec)`, and no signature grows with the next router.
///
///     moxie::Tokens<float> in(x, sequence_length);
///     in.mask = mask;
///     layer.forward(in, y, tape, exec);
///
/// A view: all that it points to stays the caller's, and must be the same in `backward`. So a temporary matrix does not
/// convert, nor does one that is not row-major.
template <class Scalar>
struct Tokens {
  RowView<const Scalar> x;  ///< (T,D), one row a token
  Sequences sequences;      ///< how the tokens divide into B sequences
  /// T bytes, 0 for padding, or empty for none. Masked tokens take no part: the layer leaves them out before it calls the
  /// router and the experts, their outputs and gradients are zero, and what their rows hold (NaN too) changes nothing.
  std::span<const std::uint8_t> mask = {};
  /// (T,G): what the gate reads in place of x, where it has an input of its own. Its gradient comes back in
  /// `TokensGradient::gate_x`.
  RowView<const Scalar> gate_x = {};
  /// (B,C), one row a sequence: what timestep and cluster routers look at, finite also where a sequence has no tokens. Its
  /// gradient comes back in `TokensGradient`.
  RowView<const Scalar> condition = {};
  /// (T,E) standard normal numbers to take for the noise on logits instead of drawing them; empty to draw.
  RowView<const Scalar> noise = {};
  /// (T,K): the experts of every token, chosen elsewhere. Their weights are the router's: scores of this forward, with a
  /// gradient. -1 is no choice, which the sum of normalized weights leaves out. Ids before a capacity drops any:
  /// `tape.router().choices()` of another forward, for example.
  RowView<const Index> chosen = {};
  /// (T,K): the weights of `chosen`, for `GivenRouter`, which has no scores. Their gradient comes back in `TokensGradient`.
  RowView<const Scalar> weight = {};
  /// T token ids: what hash routers look at.
  std::span<const std::int64_t> ids = {};
  /// B labels, one a sequence (the class of an image).
  std::span<const std::int64_t> labels = {};
  /// The number of the first token in a larger batch of which this call has a part: the tokens that take part before it. Noise
  /// is drawn by (first + t), so that it does not depend on how a batch is divided.
  std::int64_t first = 0;
  /// Whether noise and jitter are drawn, and the load loss is taken. Only forward reads it: backward follows the tape.
  bool training = false;
  /// The stream of this step's noise: another one for every step and layer. A router that has to draw and finds none throws
  /// ValueError. The i-th token that is not masked draws the same numbers whatever the masked ones are.
  std::optional<Rng> rng = {};
  /// Another K for this call (fewer experts for inference, say); 0: the router's own.
  Index top_k = 0;
  /// Another capacity factor for this call (more for evaluation, say); 0: the router's own, infinity: no limit.
  double capacity_factor = 0;
  /// Set by the layer where it left masked tokens out: the row of each token in the caller's x.
  std::span<const Index> rows = {};

  Tokens() = default;
  template <class M>
  requires std::is_convertible_v<const M&, RowView<const Scalar>> Tokens(const M& tokens, Sequences division = {})
      : x(tokens), sequences(division.over(x.rows())) {}
  /// A temporary would be gone before it is read.
  template <detail::TemporaryMatrix M>
  Tokens(M&& temporary, Sequences = {}, detail::ATemporaryMatrixWouldDangle = {}) = delete;
  /// moxie reads rows: use a row-major matrix of the same scalar, `moxie::Matrix<Scalar>`, or copy into one.
  template <detail::NotARowMajorMatrixOfThisScalar<const Scalar> M>
  requires(!detail::TemporaryMatrix<M>) Tokens(M&& matrix, Sequences = {}, detail::OnlyRowMajorMatricesOfThisScalar = {})
  = delete;

  Index count() const { return x.rows(); }
  /// Where token t stands in the x that the layer was given; errors name this.
  Index row(Index t) const { return rows.empty() ? t : rows[std::size_t(t)]; }
  bool has_gate_x() const { return gate_x.cols() != 0; }
  bool has_chosen() const { return chosen.cols() != 0; }
  bool has_weight() const { return weight.cols() != 0; }
  /// What the gate reads: `gate_x` where there is one, else x.
  const RowView<const Scalar>& gate_input() const { return has_gate_x() ? gate_x : x; }
};

/// Where the gradient of `Tokens` goes: x always, the others if they are present. Converts from a
/// plain matrix. A layer overwrites all of them; a router adds, to what its layer has set.
template <class Scalar>
struct TokensGradient {
  RowView<Scalar> x;               ///< (T,D)
  RowView<Scalar> condition = {};  ///< (B,C), or empty
  RowView<Scalar> gate_x = {};     ///< (T,G), or empty: then the gate's gradient goes nowhere if it has an input of its own
  RowView<Scalar> weight = {};     ///< (T,K), or empty
  /// The factor of the balance losses: the gradient is that of ⟨y, dy⟩ + loss_factor · balance_loss. It is what dy was scaled
  /// with: the loss scale of mixed precision, or 1 / N for N micro-batches whose losses are averaged.
  double loss_factor = 1;

  TokensGradient() = default;
  template <class M>
  requires std::is_convertible_v<M&&, RowView<Scalar>>
  TokensGradient(  // NOLINT(bugprone-forwarding-reference-overload): constrained
      M&& dx, RowView<Scalar> dcondition = {})
      : x(std::forward<M>(dx)), condition(dcondition) {}
  /// A temporary would be gone before it is read.
  template <detail::TemporaryMatrix M>
  TokensGradient(M&& temporary, RowView<Scalar> = {}, detail::ATemporaryMatrixWouldDangle = {}) = delete;
  /// moxie writes rows: use a row-major matrix of the same scalar, `moxie::Matrix<Scalar>`.
  template <detail::NotARowMajorMatrixOfThisScalar<Scalar> M>
  requires(!detail::TemporaryMatrix<M>)
      TokensGradient(M&& matrix, RowView<Scalar> = {}, detail::OnlyRowMajorMatricesOfThisScalar = {})
  = delete;

  /// Where the gradient of the gate's input goes; empty where nobody wants it.
  const RowView<Scalar>& of_gate_input(const Tokens<Scalar>& in) const { return in.has_gate_x() ? gate_x : x; }
};

/// What a router reads of what a caller may decide in its place: fields of `Tokens`.
struct RouterReads {
  bool gate_x = false;
  bool chosen = false;
  bool weight = false;
  bool capacity_factor = false;
  bool top_k = false;
};

/// Calls `f(name, field)` for every field with one row or number a token, except the mask. A part
/// of the tokens takes these fields along. An absent field has no columns, or no elements. This is
/// the only list of them.
template <class TokensType, class F>
void for_each_token_field(TokensType&& in, F&& f) {
  f("x", in.x);
  f("gate_x", in.gate_x);
  f("noise", in.noise);
  f("chosen", in.chosen);
  f("weight", in.weight);
  f("ids", in.ids);
}

namespace detail {

inline void expect_length(std::string_view where, std::string_view name, std::size_t length, Index expected,
                          std::string_view what) {
  if (length != 0 && Index(length) != expected) {
    throw ShapeError(std::string(where) + ": there are " + std::to_string(length) + " " + std::string(name) +
                     ", expected one for each of " + std::to_string(expected) + " " + std::string(what));
  }
}

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
  expect_length(where, "elements of the mask", in.mask.size(), in.count(), "tokens");
  for_each_token_field(in, [&](std::string_view name, const auto& field) {
    if constexpr (requires { field.cols(); }) {
      if (field.cols() != 0 && field.rows() != in.count()) {
        expect_shape(where, name, field, in.count(), -1, name == "gate_x" ? "G" : name == "noise" ? "E" : "K");
      }
    } else {
      expect_length(where, name, field.size(), in.count(), "tokens");
    }
  });
  if (in.condition.rows() != 0) {
    expect_shape(where, "condition", in.condition, in.sequences.count(), -1, "C");
  }
  expect_length(where, "labels", in.labels.size(), in.sequences.count(), "sequences");
  if (in.has_weight()) {
    expect_shape(where, "weight", in.weight, in.count(), in.chosen.cols());
  }
  expect_value(in.first >= 0, where, "first must not be negative");
  expect_value(in.top_k >= 0, where, "top_k must not be negative");
  expect_value(in.capacity_factor >= 0, where, "capacity_factor must not be negative or NaN");
}

/// Throws ValueError for what is decided and the router does not read: it is refused, not ignored.
template <class Scalar>
void expect_read(std::string_view where, const Tokens<Scalar>& in, const RouterReads& reads) {
  const auto refuse = [&](bool set, std::string_view name) {
    if (set) {
      throw ValueError(std::string(where) + ": Tokens::" + std::string(name) + " is set, and this router does not read it");
    }
  };
  refuse(in.has_gate_x() && !reads.gate_x, "gate_x");
  refuse(in.has_chosen() && !reads.chosen, "chosen");
  refuse(in.has_weight() && !reads.weight, "weight");
  refuse(in.capacity_factor != 0 && !reads.capacity_factor, "capacity_factor");
  refuse(in.top_k != 0 && !reads.top_k, "top_k");
}

/// Throws ValueError for chosen experts outside [-1, experts), and one that a token has twice.
template <class Scalar>
void expect_chosen(std::string_view where, const Tokens<Scalar>& in, Index experts) {
  const auto refuse = [&](Index t, Index k, const char* what) {
    throw ValueError(std::string(where) + ": choice " + std::to_string(k) + " of token " + std::to_string(in.row(t)) +
                     " is expert " + std::to_string(in.chosen(t, k)) + ", " + what);
  };
  for (Index t = 0; t < in.count(); ++t) {
    const Index* chosen = in.chosen.row(t);
    for (Index k = 0; k < in.chosen.cols(); ++k) {
      if (chosen[k] < -1 || chosen[k] >= experts) {
        refuse(t, k, "which is none");
      }
      if (chosen[k] >= 0 && std::find(chosen, chosen + k, chosen[k]) != chosen + k) {
        refuse(t, k, "which it has chosen before");
      }
    }
  }
}

/// Copies of some rows of every field of tokens: what a layer makes of those that are not masked.
class TokenCopies {
 public:
  TokenCopies() = default;
  explicit TokenCopies(std::pmr::memory_resource* resource) : resource_(resource) {}

  /// Copies the rows `rows` of every field.
  template <class Scalar>
  void copy(const Tokens<Scalar>& in, std::span<const Index> rows) {
    std::size_t i = 0;
    for_each_token_field(in, [&](std::string_view, const auto& field) {
      if (fields_.size() == i) {
        fields_.emplace_back(Index{0}, resource_);
      }
      copy_field(field, rows, fields_[i++]);
    });
  }
  /// Makes the fields of `out`, which are those of the tokens that were copied from, views of the copies.
  template <class Scalar>
  void view(Tokens<Scalar>& out, Index count) const {
    std::size_t i = 0;
    for_each_token_field(out, [&](std::string_view, auto& field) {
      using Field = std::remove_cvref_t<decltype(field)>;
      const Buffer<std::byte>& copies = fields_[i++];
      if constexpr (requires { field.cols(); }) {
        field = Field(reinterpret_cast<decltype(field.data())>(copies.data()), field.cols() == 0 ? 0 : count, field.cols());
      } else if (!field.empty()) {
        field = Field(reinterpret_cast<decltype(field.data())>(copies.data()), std::size_t(count));
      }
    });
  }

 private:
  template <class T>
  static void copy_field(const RowView<const T>& field, std::span<const Index> rows, Buffer<std::byte>& to) {
    const Index row = field.cols() * Index{sizeof(T)};
    to.resize(Index(rows.size()) * row);
    for (std::size_t i = 0; row > 0 && i < rows.size(); ++i) {
      std::memcpy(to.data() + Index(i) * row, field.row(rows[i]), std::size_t(row));
    }
  }
  template <class T>
  static void copy_field(const std::span<const T>& field, std::span<const Index> rows, Buffer<std::byte>& to) {
    copy_field(RowView<const T>(field.data(), Index(field.size()), field.empty() ? 0 : 1), rows, to);
  }

  detail::OwnResource resource_;
  std::vector<Buffer<std::byte>> fields_;
};

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

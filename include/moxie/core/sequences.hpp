// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/error.hpp>
#include <span>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// The division of T tokens into B sequences of consecutive rows. A length gives equal sequences, B
/// + 1 offsets give ragged ones. Capacity, expert choice, Soft MoE and the losses of a sequence all
/// read this description.
///
///     layer.forward({x, 16}, y, tape);        T / 16 sequences of 16 tokens
///     layer.forward({x, starts}, y, tape);    sequence b is rows [starts[b], starts[b+1]), which may be empty
///
/// It is a view: the offsets must outlive it.
class Sequences {
 public:
  /// One sequence of all tokens.
  Sequences() = default;
  /// T / length sequences of `length` tokens; 0 means one of all tokens.
  Sequences(Index length) : length_(length) {}
  Sequences(std::span<const Index> starts) : starts_(starts), ragged_(true) {}
  Sequences(const std::vector<Index>& starts) : starts_(starts), ragged_(true) {}
  Sequences(std::vector<Index>&&) = delete;  // a view of a temporary would dangle

  /// The same division of `tokens` tokens.
  Sequences over(Index tokens) const {
    Sequences s = *this;
    s.tokens_ = tokens;
    return s;
  }

  /// T.
  Index tokens() const { return tokens_; }
  /// B; 0 for no tokens of equal sequences.
  Index count() const {
    if (ragged_) {
      return std::max<Index>(Index(starts_.size()) - 1, 0);
    }
    return tokens_ == 0 ? 0 : tokens_ / equal_length();
  }
  Index begin(Index b) const { return ragged_ ? starts_[std::size_t(b)] : b * equal_length(); }
  Index end(Index b) const { return begin(b + 1); }
  Index length(Index b) const { return end(b) - begin(b); }
  /// The number of sequences with tokens. A mean over sequences divides by it.
  Index nonempty() const {
    Index n = 0;
    for (Index b = 0; b < count(); ++b) {
      n += length(b) > 0 ? 1 : 0;
    }
    return n;
  }

  /// Calls `f(b, begin, end)` for every sequence.
  template <class F>
  void for_each(F&& f) const {
    for (Index b = 0; b < count(); ++b) {
      f(b, begin(b), end(b));
    }
  }

  /// Copies the B + 1 offsets. `Sequences(starts.span()).over(T)` is then the same division,
  /// without the caller's offsets.
  template <class Starts>
  void copy_starts(Starts& starts) const {
    starts.resize(count() + 1);
    starts[0] = 0;
    for_each([&](Index b, Index, Index end) { starts[b + 1] = end; });
  }

  /// Whether both divide the same number of tokens at the same places.
  friend bool operator==(const Sequences& a, const Sequences& b) {
    if (a.tokens_ != b.tokens_ || a.count() != b.count()) {
      return false;
    }
    for (Index i = 0; i < a.count(); ++i) {
      if (a.end(i) != b.end(i)) {
        return false;
      }
    }
    return true;
  }

  /// Throws ShapeError unless the tokens divide like this.
  void expect_valid(std::string_view where) const {
    if (ragged_) {
      if (starts_.empty() || starts_.front() != 0 || starts_.back() != tokens_ ||
          !std::is_sorted(starts_.begin(), starts_.end())) {
        throw ShapeError(std::string(where) + ": the offsets of the sequences are not 0 <= ... <= " + std::to_string(tokens_) +
                         ", beginning with 0 and ending with the number of tokens");
      }
    } else if (length_ < 0 || tokens_ % equal_length() != 0) {
      throw ShapeError(std::string(where) + ": " + std::to_string(tokens_) + " tokens do not divide into sequences of " +
                       std::to_string(length_));
    }
  }

 private:
  Index equal_length() const { return std::max<Index>(length_ > 0 ? length_ : tokens_, 1); }

  Index tokens_ = 0;
  Index length_ = 0;
  std::span<const Index> starts_;
  bool ragged_ = false;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

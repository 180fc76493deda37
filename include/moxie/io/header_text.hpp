// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <moxie/core/error.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// What a safetensors file may have; a file beyond them is refused. The first is the format's own
/// limit. The others keep the memory of a refused file small: the reader stops at the first excess.
struct SafetensorsLimits {
  static constexpr std::uint64_t header_bytes = 100'000'000;
  static constexpr std::size_t tensors = std::size_t{1} << 19U;
  static constexpr std::size_t metadata_entries = 100'000;
  static constexpr std::size_t text_bytes = std::size_t{1} << 22U;  ///< of one name or metadata value, as stored
  static constexpr std::size_t dimensions = 64;                     ///< of one tensor
  static constexpr std::size_t number_digits = 40;                  ///< of one number, signs and points included
};

namespace detail {

/// What a header has that is refused before the JSON parser sees the whole of it.
struct HeaderExcess : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The characters of a header, read in pieces of 64 KiB, with one white-space character for each run of
/// them outside strings. `advance` throws HeaderExcess at a zero byte, which the JSON parser would take
/// for the end, and where a string or a number exceeds the limits: the parser keeps a token, and the
/// white space before it, in memory until it is complete.
class HeaderText {
 public:
  /// Copies `count` bytes of the header, from byte `at` on, to `to`.
  using Read = std::function<void(Index at, char* to, Index count)>;

  HeaderText(Index size, Read read) : size_(size), read_(std::move(read)) { refill(); }

  bool at_end() const { return next_ == piece_.size(); }
  /// Precondition: it is not at the end.
  char current() const { return piece_[next_]; }
  void advance() {
    const bool space = is_space(current());
    expect_allowed(current());
    step();
    while (space && !in_string_ && !at_end() && is_space(current())) {
      step();
    }
  }
  /// The number of bytes passed.
  Index position() const { return taken_ - static_cast<Index>(piece_.size() - next_); }

 private:
  static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

  void step() {
    if (++next_ == piece_.size()) {
      refill();
    }
  }
  void refill() {
    constexpr Index piece = Index{1} << 16;
    piece_.resize(static_cast<std::size_t>((std::min)(piece, size_ - taken_)));
    next_ = 0;
    if (!piece_.empty()) {
      read_(taken_, piece_.data(), static_cast<Index>(piece_.size()));
      taken_ += static_cast<Index>(piece_.size());
    }
  }

  void expect_allowed(char c) {
    if (c == '\0') {
      throw HeaderExcess("the header is not JSON: it has a zero byte");
    }
    if (in_string_) {
      in_string_ = escaped_ || c != '"';
      escaped_ = !escaped_ && c == '\\';
      count(SafetensorsLimits::text_bytes, "string", "bytes");
    } else {
      in_string_ = c == '"';
      if ((c >= '0' && c <= '9') || c == '+' || c == '-' || c == '.' || c == 'e' || c == 'E') {
        count(SafetensorsLimits::number_digits, "number", "digits");
      } else {
        run_ = 0;
      }
    }
  }
  void count(std::size_t most, const char* kind, const char* unit) {
    if (++run_ > most) {
      throw HeaderExcess("the header has a " + std::string(kind) + " of more than " + std::to_string(most) + " " + unit);
    }
  }

  Index size_;
  Read read_;
  std::vector<char> piece_;
  std::size_t next_ = 0;  // in the piece
  Index taken_ = 0;       // bytes of the header that were read, the piece included
  bool in_string_ = false;
  bool escaped_ = false;
  std::size_t run_ = 0;  // characters of the string or number so far
};

/// Iterates over a HeaderText. One without text is the end.
class HeaderCharacters {
 public:
  // NOLINTBEGIN(readability-identifier-naming): the names of std::iterator_traits
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = char;
  // NOLINTEND(readability-identifier-naming)

  HeaderCharacters() = default;
  explicit HeaderCharacters(HeaderText& text) : text_(&text) {}

  char operator*() const { return text_->current(); }
  HeaderCharacters& operator++() {
    text_->advance();
    return *this;
  }
  HeaderCharacters operator++(int) {
    const HeaderCharacters before = *this;
    ++*this;
    return before;
  }
  friend bool operator==(const HeaderCharacters& a, const HeaderCharacters& b) { return a.ended() == b.ended(); }

 private:
  bool ended() const { return text_ == nullptr || text_->at_end(); }

  HeaderText* text_ = nullptr;
};

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

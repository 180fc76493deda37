// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

/// Numbers and names as text. No locale changes a number, and no name from a file controls a terminal.
namespace dit {

/// `value` with this many digits after the point: "12.50".
inline std::string fixed(double value, int digits) {
  std::array<char, 512> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed, digits).ptr;
  return {text.data(), end};
}

/// `value` with this many significant digits at most, as printf's %g: "0.0125", "1.5e+09".
inline std::string general(double value, int digits) {
  std::array<char, 512> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::general, digits).ptr;
  return {text.data(), end};
}

/// Text of any bytes as UTF-8: what is no letter becomes U+FFFD.
inline std::string utf8(const std::string& text) {
  using nlohmann::json;
  return json::parse(json(text).dump(-1, ' ', false, json::error_handler_t::replace)).get<std::string>();
}

/// The number of letters of UTF-8 text.
inline std::size_t letter_count(std::string_view text) {
  return std::size_t(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; }));
}

namespace detail {

/// Calls `f(letter)` for each letter of UTF-8 text.
template <class F>
void for_each_letter(std::string_view text, F&& f) {
  while (!text.empty()) {
    std::size_t bytes = 1;
    while (bytes < text.size() && (static_cast<unsigned char>(text[bytes]) & 0xC0U) == 0x80U) {
      ++bytes;
    }
    f(text.substr(0, bytes));
    text.remove_prefix(bytes);
  }
}

/// Whether a letter changes the state of a terminal (C0, DEL, C1), or the direction of the text after it.
inline bool is_control(std::string_view letter) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned>(static_cast<unsigned char>(letter[i])); };
  switch (letter.size()) {
    case 1:
      return byte(0) < 0x20 || byte(0) == 0x7F;
    case 2:
      return byte(0) == 0xC2 && byte(1) < 0xA0;
    case 3:
      return byte(0) == 0xE2 && ((byte(1) == 0x80 && byte(2) >= 0xA8 && byte(2) <= 0xAE) ||
                                 (byte(1) == 0x81 && byte(2) >= 0xA6 && byte(2) <= 0xA9));
    default:
      return false;
  }
}

}  // namespace detail

/// A name from a file, for a person: valid UTF-8 without control characters, and at most `most` letters of it.
inline std::string shown(const std::string& name, std::size_t most = 40) {
  std::string text;
  std::size_t letters = 0;
  detail::for_each_letter(utf8(name.substr(0, 4 * most + 4)), [&](std::string_view letter) {
    if (++letters <= most) {
      text += detail::is_control(letter) ? "\uFFFD" : letter;
    }
  });
  return text + (letters > most ? "…" : "");
}

/// A message for a terminal. It may have several lines, and parts of it may come from files.
inline std::string terminal_text(const std::string& message) {
  std::string text;
  detail::for_each_letter(utf8(message), [&](std::string_view letter) {
    text += letter != "\n" && detail::is_control(letter) ? "\uFFFD" : letter;
  });
  return text;
}

}  // namespace dit

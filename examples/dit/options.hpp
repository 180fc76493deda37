// SPDX-License-Identifier: MIT
#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <concepts>
#include <dit/text.hpp>
#include <iostream>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>

/// The number options of the example programs. CLI11 alone takes -1 for a large seed, 2^64 for a smaller one, 010 for 8 and
/// 1e400 for infinity.
namespace dit {

/// The number that the whole text is in decimal digits, or nothing: also where `T` cannot hold it.
template <class T>
std::optional<T> number_in(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    return std::nullopt;
  }
  if constexpr (std::is_floating_point_v<T>) {
    return std::isfinite(value) ? std::optional(value) : std::nullopt;
  }
  return value;
}

/// For `CLI::Option::transform`: a whole number from `least` to `most`.
template <std::integral T>
CLI::Validator whole(T least, T most = std::numeric_limits<T>::max()) {
  const std::string range = std::to_string(least) + " to " + std::to_string(most);
  return {[=](std::string& text) {
            const std::optional<T> value = number_in<T>(text);
            if (!value || *value < least || *value > most) {
              return shown(text) + " is not a whole number from " + range;
            }
            text = std::to_string(*value);
            return std::string();
          },
          range};
}

/// The same for a number with a point or an exponent.
inline CLI::Validator real(double least, double most) {
  const std::string range = general(least, 6) + " to " + general(most, 6);
  return {[=](std::string& text) {
            const std::optional<double> value = number_in<double>(text);
            return value && *value >= least && *value <= most ? std::string() : shown(text) + " is not a number from " + range;
          },
          range};
}
/// And for one above 0.
inline CLI::Validator positive(double most) {
  const std::string range = "above 0, at most " + general(most, 6);
  return {[=](std::string& text) {
            const std::optional<double> value = number_in<double>(text);
            return value && *value > 0 && *value <= most ? std::string() : shown(text) + " is not a number " + range;
          },
          range};
}

/// The exit status of a program whose output went to `out`: 1 where some of it did not arrive.
inline int finished(int status, std::ostream& out, const std::string& program) {
  out.flush();
  if (status == 0 && !out) {
    std::cerr << program << ": the standard output cannot be written\n";
    return 1;
  }
  return status;
}

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <moxie/core/error.hpp>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

namespace moxie::inline MOXIE_NAMESPACE {

/// Text from a file, made safe for an error message: at most 100 bytes of it, escaped as in JSON, so
/// that control characters do not reach a terminal. Bytes that are not UTF-8 are replaced.
inline std::string printable(std::string_view text) {
  constexpr std::size_t longest = 100;
  const bool cut = text.size() > longest;
  const nlohmann::json value(std::string(text.substr(0, longest)));
  const std::string json = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return json.substr(1, json.size() - 2) + (cut ? "..." : "");
}

/// "tensor 'name'", for error messages.
inline std::string tensor_named(std::string_view name) { return "tensor '" + printable(name) + "'"; }

/// "(2,3,4)", for error messages; the first 8 sizes of a longer shape.
inline std::string shape_text(std::span<const Index> shape) {
  constexpr std::size_t most = 8;
  const bool cut = shape.size() > most;
  std::string text = "(";
  for (const Index size : shape.first(cut ? most : shape.size())) {
    text += text.size() > 1 ? "," : "";
    text += std::to_string(size);
  }
  return text + (cut ? ",...)" : ")");
}

}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <moxie/io/safetensors_header.hpp>
#include <moxie/io/text.hpp>
#include <string>
#include <string_view>

namespace moxie::inline MOXIE_NAMESPACE {

/// A tensor's name without the parts that wrappers of PyTorch put into it: `module`
/// (DataParallel), `_orig_mod` (torch.compile), `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`.
/// The last part of a name always stays. For `SafetensorsFile::rename`:
///
///     without_wrappers("module.blocks.0._orig_mod.w") == "blocks.0.w"
inline std::string without_wrappers(std::string_view name) {
  constexpr std::array<std::string_view, 4> wrappers{"module", "_orig_mod", "_fsdp_wrapped_module",
                                                     "_checkpoint_wrapped_module"};
  std::string plain;
  for (std::size_t dot = name.find('.'); dot != std::string_view::npos; dot = name.find('.')) {
    bool wrapper = false;
    for (const std::string_view w : wrappers) {
      wrapper = wrapper || name.substr(0, dot) == w;
    }
    if (!wrapper) {
      plain += name.substr(0, dot + 1);
    }
    name.remove_prefix(dot + 1);
  }
  return plain.append(name);
}

namespace detail {

/// Whether `longer` is `shorter` behind a prefix that ends with a dot.
inline bool is_prefixed(std::string_view longer, std::string_view shorter) {
  return longer.size() > shorter.size() && longer.ends_with(shorter) && longer[longer.size() - shorter.size() - 1] == '.';
}

/// Guesses where a tensor that is missing may be found in a file. Returns the end of an error message,
/// empty where nothing is like it. The cost is one look at every name.
inline std::string hint_for_missing(std::string_view name, const StoredTensors& tensors,
                                    const std::map<std::string, std::string>& metadata) {
  // safetensors.torch.save_model notes there the name under which it kept a tensor that has two.
  if (const auto kept = metadata.find(std::string(name)); kept != metadata.end() && tensors.contains(kept->second)) {
    return ": the metadata name " + tensor_named(kept->second) + " in its place";
  }
  std::string hint;
  const std::string plain = without_wrappers(name);
  for (const auto& [other, tensor] : tensors) {
    if (without_wrappers(other) == plain) {
      return ": there is " + tensor_named(other) + ", which SafetensorsFile::rename(without_wrappers) would find";
    }
    if (hint.empty() && is_prefixed(other, name)) {
      const std::string prefix = other.substr(0, other.size() - name.size());
      hint = ": there is " + tensor_named(other) + ", with the prefix '" + printable(prefix) + "'";
    } else if (hint.empty() && is_prefixed(name, other)) {
      hint = ": there is " + tensor_named(other) + ", without the prefix '" +
             printable(name.substr(0, name.size() - other.size())) + "'";
    }
  }
  return hint;
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <map>
#include <moxie/io/tensor_names.hpp>
#include <string>

using moxie::without_wrappers;
using moxie::detail::hint_for_missing;

TEST_CASE("without_wrappers: the parts of PyTorch's wrappers go, wherever they are, and the last part stays") {
  CHECK(without_wrappers("blocks.0.w") == "blocks.0.w");
  CHECK(without_wrappers("module.blocks.0.w") == "blocks.0.w");
  CHECK(without_wrappers("_orig_mod.module.w") == "w");
  CHECK(without_wrappers("blocks.0._orig_mod.attn._fsdp_wrapped_module.w") == "blocks.0.attn.w");
  CHECK(without_wrappers("layer._checkpoint_wrapped_module.w") == "layer.w");
  CHECK(without_wrappers("a.module") == "a.module");
  CHECK(without_wrappers("modules.w") == "modules.w");
  CHECK(without_wrappers("module") == "module");
  CHECK(without_wrappers("module.") == "");
  CHECK(without_wrappers("") == "");
  CHECK(without_wrappers("a..w") == "a..w");
}

TEST_CASE("hint_for_missing: names the tensor that may be meant") {
  const std::map<std::string, std::string> none;
  const auto hint = [&](const std::string& missing, const std::string& there) {
    return hint_for_missing(missing, {{there, {}}}, none);
  };
  CHECK(hint("w", "module.w") == ": there is tensor 'module.w', which SafetensorsFile::rename(without_wrappers) would find");
  CHECK(hint("a.w", "a._orig_mod.w") ==
        ": there is tensor 'a._orig_mod.w', which SafetensorsFile::rename(without_wrappers) would find");
  CHECK(hint("module.w", "w") == ": there is tensor 'w', which SafetensorsFile::rename(without_wrappers) would find");
  CHECK(hint("w.b", "model.w.b") == ": there is tensor 'model.w.b', with the prefix 'model.'");
  CHECK(hint("ema.w", "w") == ": there is tensor 'w', without the prefix 'ema.'");
  CHECK(hint("w", "xw").empty());
  CHECK(hint("w", "w.x").empty());
  CHECK(hint("w", "").empty());
}

TEST_CASE("hint_for_missing: a tensor under two names is named as the file keeps it") {
  const std::map<std::string, std::string> metadata{{"head.w", "embed.w"}, {"format", "pt"}};
  CHECK(hint_for_missing("head.w", {{"embed.w", {}}}, metadata) == ": the metadata name tensor 'embed.w' in its place");
  CHECK(hint_for_missing("format", {{"embed.w", {}}}, metadata).empty());
}

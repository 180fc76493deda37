// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <io/files.hpp>
#include <moxie/io/safetensors_file.hpp>
#include <moxie/io/text.hpp>
#include <string>
#include <temporary_folder.hpp>
#include <vector>

using moxie::Index;
using moxie::printable;
using moxie::shape_text;
using moxie::test::contains;

TEST_CASE("printable: text is escaped, shortened and made UTF-8") {
  CHECK(printable("größe") == "größe");
  CHECK(printable("a\x1b[2J\n\"") == "a\\u001b[2J\\n\\\"");
  CHECK(printable(std::string(101, 'x')) == std::string(100, 'x') + "...");
  CHECK(printable(std::string(100, 'x')) == std::string(100, 'x'));
  CHECK(printable("\xff") == "\xef\xbf\xbd");
  CHECK(moxie::tensor_named("a'\n") == "tensor 'a'\\n'");
}

TEST_CASE("shape_text: at most 8 sizes are printed") {
  CHECK(shape_text(std::vector<Index>{}) == "()");
  CHECK(shape_text(std::vector<Index>{7}) == "(7)");
  CHECK(shape_text(std::vector<Index>{0, 2, 3}) == "(0,2,3)");
  CHECK(shape_text(std::vector<Index>(8, 1)) == "(1,1,1,1,1,1,1,1)");
  CHECK(shape_text(std::vector<Index>(9, 1)) == "(1,1,1,1,1,1,1,1,...)");
}

TEST_CASE("printable: an error message stays short and printable, whatever the file holds") {
  const moxie::test::TemporaryFolder directory;
  const auto path = directory / "file";
  moxie::test::write_bytes(path, moxie::test::with_header("{\"\\u001b[2J" + std::string(1'000'000, 'x') + "\":{\"dtype\":\"" +
                                                          std::string(1'000'000, 'y') + "\"}}"));
  const std::string message = moxie::test::message_of([&] { moxie::SafetensorsFile{path}; });
  CHECK(message.size() < path.string().size() + 400);
  CHECK(contains(message, "has no shape"));
  CHECK_FALSE(contains(message, "\x1b"));
}

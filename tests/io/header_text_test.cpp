// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstring>
#include <moxie/io/header_text.hpp>
#include <string>

using moxie::Index;
using moxie::SafetensorsLimits;
using moxie::detail::HeaderCharacters;
using moxie::detail::HeaderExcess;
using moxie::detail::HeaderText;

namespace {

struct Scan {
  std::string read;
  std::string problem;
};

Scan scan(const std::string& text) {
  HeaderText header(Index(text.size()),
                    [&](Index at, char* to, Index count) { std::memcpy(to, text.data() + at, std::size_t(count)); });
  Scan result;
  try {
    for (HeaderCharacters at(header); at != HeaderCharacters(); ++at) {
      result.read += *at;
    }
    CHECK(header.position() == Index(text.size()));
  } catch (const HeaderExcess& excess) {
    result.problem = excess.what();
  }
  return result;
}

bool passes(const std::string& text) {
  const Scan result = scan(text);
  return result.read == text && result.problem.empty();
}

}  // namespace

TEST_CASE("HeaderText: gives every character, over the borders of its pieces") {
  CHECK(passes(""));
  CHECK(passes("{}"));
  std::string text;
  for (int i = 0; i < 200'000; ++i) {
    text += char('a' + i % 26);
  }
  CHECK(passes(text));
  CHECK(passes(text.substr(0, 65536)));
  CHECK(passes(text.substr(0, 65537)));
}

TEST_CASE("HeaderText: ends at a zero byte, a number or a string that is too long") {
  CHECK(scan(std::string("{}\0{}", 5)).problem == "the header is not JSON: it has a zero byte");
  const std::string digits(SafetensorsLimits::number_digits, '7');
  CHECK(passes("[" + digits + "," + digits + "]"));
  CHECK(scan("[" + digits + "7]").problem == "the header has a number of more than 40 digits");
  CHECK(scan("[-" + digits + "]").problem == "the header has a number of more than 40 digits");
  CHECK(passes("\"" + digits + digits + "\""));  // in a string, they are no number

  const std::string longest(SafetensorsLimits::text_bytes - 1, 'x');
  CHECK(passes("{\"" + longest + "\":\"" + longest + "\"}"));
  const Scan refused = scan("{\"" + longest + "xx\":0}");
  CHECK(refused.problem == "the header has a string of more than 4194304 bytes");
  CHECK(refused.read.size() < longest.size() + 5);
}

TEST_CASE("HeaderText: a string ends at its own quote") {
  const std::string digits(SafetensorsLimits::number_digits + 1, '7');
  CHECK(passes("\"a\\\"" + digits + "\""));
  CHECK(passes("\"\\\\\\\"" + digits + "\""));
  CHECK_FALSE(passes("\"a\\\\\"" + digits));
  CHECK_FALSE(passes("\"a\"" + digits));
}

TEST_CASE("HeaderText: white space outside strings is read as one character") {
  CHECK(scan("{ \n\t\r }  ").read == "{ } ");
  CHECK(scan("{\" \n \\\" \"  :1   2}").read == "{\" \n \\\" \" :1 2}");
  CHECK(scan("{" + std::string(200'000, ' ') + "}").read == "{ }");
  CHECK(scan("1" + std::string(200'000, ' ')).read == "1 ");
}

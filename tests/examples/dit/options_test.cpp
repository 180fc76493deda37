// SPDX-License-Identifier: MIT
#include "dit/options.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace {

// What a program that has this option makes of a word: "--n: ..." where it is refused.
template <class T>
std::string taken(const CLI::Validator& range, const std::string& word) {
  CLI::App app;
  T value{};
  app.add_option("--n", value)->transform(range);
  try {
    app.parse(std::vector<std::string>{word, "--n"});  // the last word first
  } catch (const CLI::ParseError& error) {
    return error.what();
  }
  std::ostringstream text;
  text << value;
  return text.str();
}

}  // namespace

TEST_CASE("whole: decimal numbers in the range, to the last digit") {
  const CLI::Validator seed = dit::whole<std::uint64_t>(0);
  CHECK(taken<std::uint64_t>(seed, "0") == "0");
  CHECK(taken<std::uint64_t>(seed, "18446744073709551615") == "18446744073709551615");
  CHECK(taken<std::uint64_t>(seed, "010") == "10");
  CHECK(taken<std::int64_t>(dit::whole<std::int64_t>(-5, 5), "-5") == "-5");
}

TEST_CASE("whole: everything else is refused, with the option's name and the range") {
  for (const char* bad : {"-1", "18446744073709551616", "1e3", "2.5", "0x10", "+1", " 1", "1 ", "one", "nan", "--1", "1,2"}) {
    CAPTURE(bad);
    CHECK(taken<std::uint64_t>(dit::whole<std::uint64_t>(0), bad) ==
          "--n: " + std::string(bad) + " is not a whole number from 0 to 18446744073709551615");
  }
  for (const char* bad : {"0", "9", "9223372036854775808", "-9223372036854775809"}) {
    CAPTURE(bad);
    CHECK(taken<std::int64_t>(dit::whole<std::int64_t>(1, 8), bad) ==
          "--n: " + std::string(bad) + " is not a whole number from 1 to 8");
  }
}

TEST_CASE("real, positive: finite numbers in the range") {
  CHECK(taken<double>(dit::real(-1, 1), "-1") == "-1");
  CHECK(taken<double>(dit::real(0, 1e3), "2.5e2") == "250");
  CHECK(taken<double>(dit::positive(1), "1e-300") == "1e-300");
  for (const char* bad : {"nan", "inf", "-inf", "1e400", "1.5", "0,5", "0x1p-1", "x", "1e-400"}) {
    CAPTURE(bad);
    CHECK(taken<double>(dit::real(0, 1), bad) == "--n: " + std::string(bad) + " is not a number from 0 to 1");
  }
  CHECK(taken<double>(dit::positive(1), "0") == "--n: 0 is not a number above 0, at most 1");
}

TEST_CASE("options: control characters of a word do not reach the terminal") {
  CHECK(taken<double>(dit::real(0, 1), "\x1B[2J").find('\x1B') == std::string::npos);
}

TEST_CASE("finished: output that did not arrive is a failure") {
  std::ostringstream out;
  CHECK(dit::finished(0, out, "program") == 0);
  CHECK(dit::finished(130, out, "program") == 130);
  out.setstate(std::ios::badbit);
  CHECK(dit::finished(0, out, "program") == 1);
  CHECK(dit::finished(130, out, "program") == 130);
}

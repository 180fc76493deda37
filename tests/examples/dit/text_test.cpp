// SPDX-License-Identifier: MIT
#include "dit/text.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <examples/dit/comma_locale.hpp>
#include <limits>
#include <string>

TEST_CASE("fixed, general: what printf writes in the locale \"C\", in every locale") {
  const dit::test::CommaLocale comma;
  CHECK(dit::fixed(1234.5, 2) == "1234.50");
  CHECK(dit::fixed(-0.125, 1) == "-0.1");
  CHECK(dit::fixed(1e20, 0) == "100000000000000000000");
  CHECK(dit::fixed(1e300, 3).size() == 305);
  CHECK(dit::fixed(std::numeric_limits<double>::quiet_NaN(), 3) == "nan");
  CHECK(dit::fixed(std::numeric_limits<double>::infinity(), 3) == "inf");
  CHECK(dit::general(0.0101, 3) == "0.0101");
  CHECK(dit::general(1234567.0, 3) == "1.23e+06");
  CHECK(dit::general(5, 6) == "5");
}

TEST_CASE("shown: a short name stays as it is, a long one is cut at a letter") {
  CHECK(dit::shown("Ankle boot") == "Ankle boot");
  CHECK(dit::shown("Kätzchen", 8) == "Kätzchen");
  CHECK(dit::shown("Kätzchen", 7) == "Kätzche…");
  CHECK(dit::shown("") == "");
  std::string long_name;
  for (int i = 0; i < 20000; ++i) {
    long_name += "ä";
  }
  CHECK(dit::letter_count(dit::shown(long_name)) == 41);
  CHECK(dit::shown(std::string(20000, 'x')) == std::string(40, 'x') + "…");
}

TEST_CASE("shown: no control character and no broken letter is left") {
  CHECK(dit::shown("\x1B]0;title\x07") == "\uFFFD]0;title\uFFFD");
  CHECK(dit::shown("a\nb\tc\x7F") == "a\uFFFDb\uFFFDc\uFFFD");
  CHECK(dit::shown("\xC2\x9B"
                   "31m") ==
        "\uFFFD"
        "31m");                                               // CSI in one letter
  CHECK(dit::shown("a\u202Eb\u2066c") == "a\uFFFDb\uFFFDc");  // text from right to left
  CHECK(dit::shown("a\xFF\xC3") == "a\uFFFD\uFFFD");
  CHECK(dit::shown(std::string("a\0b", 3)) == "a\uFFFDb");
  CHECK(dit::shown("…—Ж漢🙂") == "…—Ж漢🙂");
}

TEST_CASE("terminal_text: lines stay, control characters do not") {
  CHECK(dit::terminal_text("gnuplot failed:\n  \x1B[2J") == "gnuplot failed:\n  \uFFFD[2J");
  CHECK(dit::terminal_text(std::string(1000, 'x')) == std::string(1000, 'x'));
}

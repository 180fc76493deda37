// SPDX-License-Identifier: MIT
#pragma once

#include <clocale>
#include <locale>
#include <string>

namespace dit::test {

/// For a while, the locale of the program writes 3412.5 as "3.412,5": that of C++ always, and that of C where the system has
/// one that does.
class CommaLocale {
  struct Punctuation : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };

 public:
  CommaLocale() : old_(std::locale::global(std::locale(std::locale::classic(), new Punctuation))) {
    std::setlocale(LC_NUMERIC, "de_DE.UTF-8");  // fails where it is not installed
  }
  CommaLocale(const CommaLocale&) = delete;
  CommaLocale& operator=(const CommaLocale&) = delete;
  ~CommaLocale() {
    std::setlocale(LC_NUMERIC, "C");
    std::locale::global(old_);
  }

 private:
  std::locale old_;
};

}  // namespace dit::test

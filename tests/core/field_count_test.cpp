// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/field_count.hpp>
#include <string>
#include <vector>

namespace {

struct None {};
struct Pair {
  double a = 1;
  bool b = false;
};
enum class Kind { one, two };
struct Nested {
  Pair pair = {};
  Kind kind = Kind::one;
  std::string name;
  std::vector<int> numbers = {};
  long count = 0;
};

TEST_CASE("field_count: counts the fields of aggregates, each nested aggregate as one") {
  static_assert(moxie::field_count<None> == 0);
  static_assert(moxie::field_count<Pair> == 2);
  static_assert(moxie::field_count<Nested> == 5);
  CHECK(moxie::field_count<Nested> == 5);
}

}  // namespace

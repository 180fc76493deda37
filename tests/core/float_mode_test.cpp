// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cfenv>
#include <moxie/core/float_mode.hpp>

namespace {

using moxie::FloatMode;

// Not computed by the compiler, which knows one rounding mode only.
double third() {
  volatile double one = 1;
  volatile double three = 3;
  return one / three;
}

TEST_CASE("float mode: a scope takes the mode, and its end gives the thread's own one back") {
  const int before = std::fegetround();
  const double nearest = third();
  std::fesetround(FE_UPWARD);
  const double above = third();
  const FloatMode upward = FloatMode::current();
  std::fesetround(before);
  REQUIRE(above > nearest);
  {
    const FloatMode::Scope scope(upward);
    CHECK(third() == above);
    const FloatMode::Scope again(upward);
    CHECK(third() == above);
  }
  CHECK(third() == nearest);
}

TEST_CASE("float mode: flags of what has happened are no part of it") {
  std::feclearexcept(FE_ALL_EXCEPT);
  const FloatMode clear = FloatMode::current();
  std::feraiseexcept(FE_DIVBYZERO);
  { const FloatMode::Scope scope(clear); }
  CHECK(std::fetestexcept(FE_DIVBYZERO) != 0);
  std::feclearexcept(FE_ALL_EXCEPT);
}

}  // namespace

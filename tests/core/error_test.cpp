// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/error.hpp>
#include <support.hpp>

namespace {

using moxie::ShapeError;
using moxie::ValueError;
using moxie::test::message_of;

static_assert(std::is_base_of_v<std::invalid_argument, ShapeError>);
static_assert(std::is_base_of_v<std::invalid_argument, ValueError>);
static_assert(!std::is_base_of_v<ShapeError, ValueError>);

TEST_CASE("errors: a shape error says what was given and what was expected") {
  const moxie::Matrix<float> x(7, 512);
  const auto expect = [&](moxie::Index rows, moxie::Index cols, std::string_view symbol = "T") {
    return message_of<ShapeError>([&] { moxie::expect_shape("TopKMoE::forward", "x", x, rows, cols, symbol); });
  };
  CHECK(expect(-1, 256) == "TopKMoE::forward: x is (7,512), expected (T,256)");
  CHECK(expect(8, 512) == "TopKMoE::forward: x is (7,512), expected (8,512)");
  CHECK(expect(8, -1, "D") == "TopKMoE::forward: x is (7,512), expected (8,D)");
  CHECK(expect(7, 512) == "nothing was thrown");
  CHECK(expect(-1, 512) == "nothing was thrown");
  CHECK(expect(-1, -1) == "nothing was thrown");
}

TEST_CASE("errors: a value error says where and what") {
  CHECK(message_of<ValueError>([] { moxie::expect_value(false, "f", "no"); }) == "f: no");
  CHECK(message_of<ValueError>([] { moxie::expect_value(true, "f", "no"); }) == "nothing was thrown");
  CHECK(message_of<ValueError>([] { moxie::expect_at_least("f", "n", 2, 3); }) == "f: n is 2, expected at least 3");
  CHECK(message_of<ValueError>([] { moxie::expect_at_least("f", "n", 3, 3); }) == "nothing was thrown");
}

}  // namespace

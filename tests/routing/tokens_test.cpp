// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/tokens.hpp>
#include <support.hpp>

namespace {

using moxie::Matrix;
using moxie::Tokens;

static_assert(std::is_convertible_v<Matrix<float>&, Tokens<float>>);
static_assert(std::is_convertible_v<const Matrix<float>&, Tokens<float>>);
static_assert(std::is_convertible_v<moxie::RowView<float>, Tokens<float>>);
static_assert(!std::is_convertible_v<Matrix<double>&, Tokens<float>>);

TEST_CASE("tokens: a plain matrix is one sequence") {
  const Matrix<float> x(6, 3);
  const Tokens<float> in = x;
  CHECK(in.x.data() == x.data());
  CHECK(in.count() == 6);
  CHECK(in.length() == 6);
  CHECK(in.sequences() == 1);
}

TEST_CASE("tokens: divide into sequences of a length") {
  const Matrix<float> x(6, 3);
  const Tokens<float> in{x, 2};
  CHECK(in.length() == 2);
  CHECK(in.sequences() == 3);
}

TEST_CASE("tokens: none make no sequence") {
  const Matrix<float> x(0, 3);
  CHECK(Tokens<float>{x}.sequences() == 0);
  CHECK(Tokens<float>{x, 4}.sequences() == 0);
  CHECK(Tokens<float>{}.count() == 0);
}

TEST_CASE("tokens: another width and lengths that do not divide are refused") {
  const Matrix<float> x(6, 3);
  const auto check = [&](moxie::Index length, moxie::Index dim) {
    return moxie::test::message_of<moxie::ShapeError>([&] {
      moxie::detail::expect_tokens("f", Tokens<float>{x, length}, dim);
    });
  };
  CHECK(check(0, 3) == "nothing was thrown");
  CHECK(check(6, 3) == "nothing was thrown");
  CHECK(check(3, 3) == "nothing was thrown");
  CHECK(check(0, 4) == "f: x is (6,3), expected (T,4)");
  CHECK(check(4, 3) == "f: 6 tokens do not divide into sequences of 4");
  CHECK(check(7, 3) == "f: 6 tokens do not divide into sequences of 7");
  CHECK(check(-2, 3) == "f: 6 tokens do not divide into sequences of -2");
}

}  // namespace

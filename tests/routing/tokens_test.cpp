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
  CHECK(in.sequences.count() == 1);
  CHECK(in.sequences.length(0) == 6);
}

TEST_CASE("tokens: divide into sequences of a length") {
  const Matrix<float> x(6, 3);
  const Tokens<float> in{x, 2};
  CHECK(in.sequences.count() == 3);
  CHECK(in.sequences.begin(2) == 4);
  CHECK(in.sequences.length(2) == 2);
}

TEST_CASE("tokens: none make no sequence") {
  const Matrix<float> x(0, 3);
  CHECK(Tokens<float>{x}.sequences.count() == 0);
  CHECK(Tokens<float>{x, 4}.sequences.count() == 0);
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

TEST_CASE("tokens: what is known of them has to fit their number") {
  const Matrix<float> x(6, 3);
  const auto check = [&](auto&& change) {
    Tokens<float> in{x, 3};
    change(in);
    return moxie::test::message_of<std::invalid_argument>([&] { moxie::detail::expect_tokens("f", in, 3); });
  };
  const std::vector<std::uint8_t> mask(5, 1);
  const std::vector<std::int64_t> ids(7);
  const Matrix<float> three(3, 4);
  CHECK(check([&](auto& in) { in.mask = mask; }) == "f: there are 5 elements of the mask, expected one for each of 6 tokens");
  CHECK(check([&](auto& in) { in.ids = ids; }) == "f: there are 7 ids, expected one for each of 6 tokens");
  CHECK(check([&](auto& in) { in.condition = three; }) == "f: condition is (3,4), expected (2,C)");
  CHECK(check([&](auto& in) { in.noise = three; }) == "f: noise is (3,4), expected (6,E)");
  CHECK(check([&](auto& in) { in.top_k = -1; }) == "f: top_k must not be negative");
  CHECK(check([&](auto& in) { in.x = three; }) == "f: x is (3,4), expected (T,3)");
  CHECK(check([](auto&) {}) == "nothing was thrown");
}

}  // namespace

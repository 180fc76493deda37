// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/sequences.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Sequences;

std::vector<Index> ends(const Sequences& s) {
  std::vector<Index> out;
  s.for_each([&](Index b, Index begin, Index end) {
    CHECK(begin == s.begin(b));
    CHECK(end - begin == s.length(b));
    CHECK(begin == (b == 0 ? 0 : out.back()));
    out.push_back(end);
  });
  return out;
}

TEST_CASE("sequences: one of all tokens, equal ones, ragged ones") {
  CHECK(ends(Sequences().over(5)) == std::vector<Index>{5});
  CHECK(ends(Sequences(2).over(6)) == std::vector<Index>{2, 4, 6});
  const std::vector<Index> starts{0, 3, 3, 4, 6};
  CHECK(ends(Sequences(starts).over(6)) == std::vector<Index>{3, 3, 4, 6});
  CHECK(Sequences(starts).over(6).nonempty() == 3);
  CHECK(Sequences(2).over(6).nonempty() == 3);
}

TEST_CASE("sequences: no tokens are no equal sequences, but may be empty ragged ones") {
  CHECK(Sequences().over(0).count() == 0);
  CHECK(Sequences(4).over(0).count() == 0);
  const std::vector<Index> starts{0, 0, 0};
  CHECK(Sequences(starts).over(0).count() == 2);
  CHECK(Sequences(starts).over(0).nonempty() == 0);
}

TEST_CASE("sequences: are equal where they divide at the same places") {
  const std::vector<Index> starts{0, 2, 4};
  const std::vector<Index> others{0, 1, 4};
  CHECK(Sequences(2).over(4) == Sequences(starts).over(4));
  CHECK(Sequences(others).over(4) != Sequences(starts).over(4));
  CHECK(Sequences(4).over(4) == Sequences().over(4));
  CHECK(Sequences(2).over(4) != Sequences(2).over(6));
}

TEST_CASE("sequences: lengths and offsets that do not divide the tokens are refused") {
  const auto message = [](const Sequences& s, Index tokens) {
    return moxie::test::message_of<moxie::ShapeError>([&] { s.over(tokens).expect_valid("f"); });
  };
  CHECK(message(Sequences(4), 6) == "f: 6 tokens do not divide into sequences of 4");
  CHECK(message(Sequences(-1), 6) == "f: 6 tokens do not divide into sequences of -1");
  for (const std::vector<Index>& starts : {std::vector<Index>{1, 6}, {0, 5}, {0, 4, 3, 6}, {0}, {6}}) {
    CHECK(moxie::test::contains(message(Sequences(starts), 6), "f: the offsets of the sequences are not 0 <= ... <= 6"));
  }
  CHECK(message(Sequences(3), 6) == "nothing was thrown");
  const std::vector<Index> none;  // no offsets are not "one sequence of all"
  CHECK(moxie::test::contains(message(Sequences(none), 6), "f: the offsets"));
}

// Offsets that are about to go are not viewed.
static_assert(!std::is_constructible_v<Sequences, std::vector<Index>>);
static_assert(std::is_constructible_v<Sequences, const std::vector<Index>&>);

TEST_CASE("sequences: over other tokens the same division") { CHECK(Sequences(2).over(4).over(8).count() == 4); }

}  // namespace

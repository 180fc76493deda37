// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/layout.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Layout;

Layout small_layout() {
  Layout layout;
  layout.add("w", {3, 5});
  layout.add("b", {5});
  layout.add("scale", {});
  layout.add("kernel", {2, 3, 4});
  return layout;
}

TEST_CASE("layout: a vector is one row, a scalar (1,1), and more axes fold into columns") {
  const Layout layout = small_layout();
  const auto& t = layout.tensors();
  REQUIRE(t.size() == 4);
  CHECK(t[0].rows == 3);
  CHECK(t[0].cols == 5);
  CHECK(t[1].rows == 1);
  CHECK(t[1].cols == 5);
  CHECK(t[2].rows == 1);
  CHECK(t[2].cols == 1);
  CHECK(t[3].rows == 2);
  CHECK(t[3].cols == 12);
  CHECK(layout.parameter_count() == 15 + 5 + 1 + 24);
}

TEST_CASE("layout: tensors start at multiples of 16 elements and do not overlap") {
  const Layout layout = small_layout();
  Index end = 0;
  for (const auto& t : layout.tensors()) {
    CHECK(t.offset % Layout::granularity == 0);
    CHECK(t.offset >= end);
    end = t.offset + t.rows * t.cols;
  }
  CHECK(layout.size() >= end);
  CHECK(layout.size() % Layout::granularity == 0);
}

TEST_CASE("layout: a tensor without elements is legal") {
  Layout layout;
  layout.add("empty", {0, 4});
  layout.add("after", {2});
  CHECK(layout.tensors()[0].rows * layout.tensors()[0].cols == 0);
  CHECK(layout.parameter_count() == 2);
}

TEST_CASE("layout: a name that is taken and a negative size are refused") {
  Layout layout = small_layout();
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ValueError>([&] { layout.add("b", {1}); }), "'b'"));
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ValueError>([&] { layout.add("c", {-1}); }), "c is -1"));
}

TEST_CASE("layout: sizes beyond any memory are refused, and nothing is added") {
  moxie::Layout layout;
  layout.add("a", {3, 4});
  CHECK_THROWS_AS(layout.add("b", {moxie::Index{1} << 40, moxie::Index{1} << 40}), moxie::ValueError);
  CHECK_THROWS_AS(layout.add("c", {moxie::Index{1} << 61}), moxie::ValueError);
  CHECK(layout.tensors().size() == 1);
  CHECK(layout.find("b") < 0);
}

TEST_CASE("layout: says what trains a tensor, in parts too") {
  moxie::Layout part;
  part.add("weight", {2});
  part.add("bias", {2}, moxie::Trained::elsewhere);
  moxie::Layout whole;
  whole.add_part("gate.", part);
  CHECK(whole.tensors()[0].trained == moxie::Trained::by_gradient);
  CHECK(whole.tensors()[1].trained == moxie::Trained::elsewhere);
}

}  // namespace

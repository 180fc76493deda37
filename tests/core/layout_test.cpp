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
  for (Index i = 0; i < layout.count(); ++i) {
    const auto& t = layout.tensors()[std::size_t(i)];
    CHECK(layout.offset(i) % Layout::granularity == 0);
    CHECK(layout.offset(i) >= end);
    end = layout.offset(i) + t.rows * t.cols;
  }
  CHECK(layout.size() >= end);
  CHECK(layout.size() % Layout::granularity == 0);
}

TEST_CASE("layout: positions are in order of adding; memory holds replicated tensors, then experts', then untrained ones") {
  using moxie::Role;
  using moxie::Trained;
  Layout layout;
  const Index gate = layout.add("gate", {3, 5}, {.role = Role::gate});
  const Index state = layout.add("state", {3}, {.role = Role::state, .trained = Trained::elsewhere});
  const Index expert0 = layout.add("experts.0", {40}, {.expert = 0});
  const Index centroid = layout.add("experts.0.centroid", {5}, {.trained = Trained::elsewhere, .expert = 0});
  const Index expert1 = layout.add("experts.1", {40}, {.expert = 1});
  const Index norm = layout.add("norm", {5}, {.role = Role::norm});
  CHECK(std::vector<Index>{gate, state, expert0, centroid, expert1, norm} == std::vector<Index>{0, 1, 2, 3, 4, 5});
  CHECK(layout.tensors()[std::size_t(state)].name == "state");
  CHECK(layout.offset(gate) == 0);
  CHECK(layout.offset(norm) == 16);
  CHECK(layout.replicated_size() == 32);
  CHECK(layout.offset(expert0) == 32);
  CHECK(layout.offset(expert1) == 32 + 48);
  CHECK(layout.trained_size() == 32 + 96);
  CHECK(layout.offset(state) == 128);
  CHECK(layout.offset(centroid) == 144);
  CHECK(layout.size() == 160);
}

TEST_CASE("layout: a moved-from one is empty, and goes on") {
  Layout a = small_layout();
  const Layout b = std::move(a);
  CHECK(b.count() == 4);
  CHECK(a.count() == 0);  // NOLINT(bugprone-use-after-move): that is the claim
  CHECK(a.size() == 0);
  CHECK(a.find("w") == -1);
  CHECK(a.add("w", {2}) == 0);
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

TEST_CASE("layout: says what a tensor is for, what trains it and whose it is, in parts too") {
  moxie::Layout part;
  part.add("weight", {2}, {.role = moxie::Role::gate});
  part.add("bias", {2}, {.role = moxie::Role::state, .trained = moxie::Trained::elsewhere});
  part.add("w", {2}, {.expert = 3});
  moxie::Layout whole;
  CHECK(whole.add_part("gate.", part) == 0);
  CHECK(whole.add_part("experts.7.", part, 7) == 3);
  CHECK(whole.tensors()[0].trained == moxie::Trained::by_gradient);
  CHECK(whole.tensors()[0].role == moxie::Role::gate);
  CHECK(whole.tensors()[0].expert == -1);
  CHECK(whole.tensors()[1].trained == moxie::Trained::elsewhere);
  CHECK(whole.tensors()[1].role == moxie::Role::state);
  CHECK(whole.tensors()[2].role == moxie::Role::weight);
  CHECK(whole.tensors()[2].expert == 3);
  CHECK(whole.tensors()[3].expert == 7);
  CHECK(whole.tensors()[5].expert == 7);
  CHECK(whole.add_part("none", moxie::Layout{}) == 6);
}

}  // namespace

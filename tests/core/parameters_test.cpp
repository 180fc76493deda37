// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstdint>
#include <moxie/core/parameters.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Layout;
using moxie::Parameters;
using moxie::RowView;

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

TEST_CASE("layout: a part is a block of its own with prefixed names") {
  Layout whole;
  whole.add("first", {7});
  const Layout part = small_layout();
  const Index offset = whole.add_part("part.", part);
  Parameters<double> p(whole);
  moxie::test::randomize(p, 1);
  const auto block = p.view().block(offset, part);
  CHECK(block["w"].data() == p["part.w"].data());
  CHECK(block["kernel"](1, 11) == p["part.kernel"](1, 11));
  CHECK(whole.find("part.scale") == 3);
  CHECK(whole.find("scale") == -1);
}

TEST_CASE_TEMPLATE("parameters: start as zeros, gaps included, also in memory that was used before", S, float, double) {
  const Layout layout = small_layout();
  for (int i = 0; i < 8; ++i) {
    Parameters<S> used(layout);
    CHECK((used.flat() == S(0)).all());
    used.flat() = S(7);  // the next block may well lie where this one was
    CHECK((used.zeros_like().flat() == S(0)).all());
  }
}

TEST_CASE("parameters: start at a cache line") {
  const Parameters<float> p(small_layout());
  CHECK(reinterpret_cast<std::uintptr_t>(p["w"].data()) % 64 == 0);
  CHECK(reinterpret_cast<std::uintptr_t>(p["b"].data()) % 64 == 0);
}

TEST_CASE("parameters: copies are deep and share the layout") {
  Parameters<double> a(small_layout());
  moxie::test::randomize(a, 2);
  Parameters<double> b = a;
  CHECK((a.flat() == b.flat()).all());
  CHECK(&a.layout() == &b.layout());
  b["w"](1, 2) += 1;
  CHECK(a["w"](1, 2) == b["w"](1, 2) - 1);
  a.set_zero();
  CHECK((a.flat() == 0).all());
  CHECK(b["w"](1, 2) != 0);
}

TEST_CASE("parameters: an unknown name is refused by name") {
  const Parameters<double> p(small_layout());
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ValueError>([&] { (void)p["nobody"]; }), "'nobody'"));
}

TEST_CASE("zip: visits every tensor of all blocks once, in order of the layout") {
  Parameters<double> a(small_layout());
  moxie::test::randomize(a, 3);
  Parameters<double> b = a.zeros_like();
  std::vector<std::string> names;
  const auto visit = [&](const moxie::TensorInfo& info, RowView<const double> u, RowView<double> v) {
    names.push_back(info.name);
    v.eigen() = 2 * u.eigen();
  };
  moxie::zip(visit, static_cast<const Parameters<double>&>(a), b);
  CHECK(names == std::vector<std::string>{"w", "b", "scale", "kernel"});
  CHECK((b.flat() == 2 * a.flat()).all());
}

TEST_CASE("zip: refuses blocks of different layouts") {
  Layout other;
  other.add("w", {3, 5});
  Parameters<double> a(small_layout());
  Parameters<double> b(other);
  CHECK_THROWS_AS(moxie::zip([](const auto&, auto, auto) {}, a, b), moxie::ShapeError);
}

TEST_CASE("zip: two layouts that describe the same block are the same") {
  Parameters<double> a(small_layout());
  Parameters<double> b(small_layout());
  int visited = 0;
  moxie::zip([&](const auto&, auto, auto) { ++visited; }, a, b);
  CHECK(visited == 4);
}

}  // namespace

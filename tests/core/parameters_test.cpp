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

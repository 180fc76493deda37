// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory_resource>
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

TEST_CASE("parameters: a part has the tensors of its layout, wherever they are in the block") {
  Layout part;
  part.add("w", {3, 5}, {.role = moxie::Role::gate});
  part.add("state", {7}, {.trained = moxie::Trained::elsewhere});
  part.add("kernel", {2, 3, 4});
  Layout whole;
  whole.add("first", {7});
  const Index at = whole.add_part("part.", part);
  whole.add("last", {9});
  Parameters<double> p(whole);
  moxie::test::randomize(p, 1);
  const auto view = p.view().part(at, part);
  CHECK(view["w"].data() == p["part.w"].data());
  CHECK(view["state"].data() == p["part.state"].data());
  CHECK(view["kernel"](1, 11) == p["part.kernel"](1, 11));
  CHECK(view[2].data() == p["part.kernel"].data());
  CHECK(view.complete());
  CHECK(whole.find("part.state") == 2);
  CHECK(whole.find("state") == -1);
}

TEST_CASE("parameters: what gradients train is one range; decay over it leaves a selection bias alone") {
  Layout layout;
  layout.add("gate.weight", {3, 5});
  layout.add("gate.e_score_correction_bias", {3}, {.role = moxie::Role::state, .trained = moxie::Trained::elsewhere});
  layout.add("experts.0.w", {5, 5}, {.expert = 0});
  Parameters<double> p(layout);
  p.flat() = 2;
  p.trained() *= 0.5;
  CHECK((p["gate.weight"].eigen().array() == 1).all());
  CHECK((p["experts.0.w"].eigen().array() == 1).all());
  CHECK((p["gate.e_score_correction_bias"].eigen().array() == 2).all());
  const Parameters<double>& constant = p;
  CHECK(constant.trained().size() == p.trained().size());
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

TEST_CASE("parameters: a moved-from block is one without tensors") {
  Parameters<double> a(small_layout());
  moxie::test::randomize(a, 4);
  const double* const w = a["w"].data();
  const Parameters<double> copy = a;
  Parameters<double> b = std::move(a);
  CHECK(b["w"].data() == w);
  CHECK((b.flat() == copy.flat()).all());
  // NOLINTBEGIN(bugprone-use-after-move): that is the claim
  CHECK(a.layout().count() == 0);
  CHECK(a.count() == 0);
  CHECK(a.flat().size() == 0);
  CHECK(a.zeros_like().count() == 0);
  CHECK_FALSE(a.view().empty());
  a.set_zero();
  const Parameters<double> again = a;
  CHECK(again.count() == 0);
  a = copy;
  // NOLINTEND(bugprone-use-after-move)
  CHECK((a.flat() == copy.flat()).all());
}

TEST_CASE("parameters: views stay valid when the block is moved") {
  Parameters<double> a(small_layout());
  moxie::test::randomize(a, 5);
  const moxie::ParameterView<const double> view = a;
  const Parameters<double> b = std::move(a);
  CHECK(view["kernel"].data() == b["kernel"].data());
  CHECK(view.overlaps(moxie::extent_of(b["w"])));
}

TEST_CASE("parameters: memory of a resource is zero, too") {
  struct Ones : std::pmr::memory_resource {
    void* do_allocate(std::size_t bytes, std::size_t aligned) override {
      void* const block = std::pmr::new_delete_resource()->allocate(bytes, aligned);
      std::memset(block, 0x3F, bytes);
      ++allocations;
      return block;
    }
    void do_deallocate(void* block, std::size_t bytes, std::size_t aligned) override {
      std::pmr::new_delete_resource()->deallocate(block, bytes, aligned);
    }
    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
    int allocations = 0;
  } resource;
  const Parameters<float> p(small_layout(), &resource);
  CHECK(resource.allocations == 1);
  CHECK((p.flat() == 0).all());
  const Parameters<float> copy = p;
  CHECK(resource.allocations == 1);
}

// Tensors of small_layout(), each in memory of its own.
struct Apart {
  std::vector<double> w = std::vector<double>(3 * 10), b = std::vector<double>(5), scale{3}, kernel = std::vector<double>(24);
  RowView<double> operator()(const moxie::TensorInfo& t) {
    if (t.name == "w") {
      return {w.data() + 5, 3, 5, 10};  // the right half of a matrix
    }
    double* const data = t.name == "b" ? b.data() : t.name == "scale" ? scale.data() : kernel.data();
    return {data, t.rows, t.cols};
  }
};

TEST_CASE("parameter table: tensors may be anywhere, their rows apart; parts and zip see them") {
  const Layout small = small_layout();
  Layout layout;
  layout.add("first", {2});
  const Index at = layout.add_part("", small);
  Apart apart;
  const moxie::ParameterTable<double> table(
      layout, [&](const moxie::TensorInfo& t) { return t.name == "first" ? RowView<double>() : apart(t); });
  const moxie::ParameterView<double> view = table;
  CHECK_FALSE(view.has(0));
  CHECK_FALSE(view.complete());
  CHECK(view[0].rows() == 0);
  CHECK(view[0].data() == nullptr);
  const auto part = view.part(at, small);
  CHECK(part.complete());
  CHECK(part["w"].stride() == 10);
  part["w"](2, 4) = 7;
  CHECK(apart.w[29] == 7);
  CHECK(&part["scale"](0, 0) == apart.scale.data());

  Parameters<double> p(small);
  moxie::copy_tensors(moxie::ParameterView<const double>(part), p.view());
  CHECK(p["w"](2, 4) == 7);
  CHECK(p["scale"](0, 0) == 3);
  int same = 0;
  moxie::zip([&](const auto&, auto a, auto b) { same += a.eigen() == b.eigen() ? 1 : 0; }, part, p);
  CHECK(same == 4);
  moxie::set_zero(part);
  CHECK(apart.scale[0] == 0);
  CHECK(apart.w[29] == 0);
  moxie::set_zero(view);  // the absent one is left out
}

TEST_CASE("parameter table: another shape, and gradients that share memory, are refused") {
  using moxie::test::contains;
  using moxie::test::message_of;
  const Layout layout = small_layout();
  std::vector<double> memory(100);
  const auto message = [&]<class T>(T, Index w_stride, Index b_at, Index b_size) {
    return message_of<std::invalid_argument>([&] {
      const moxie::ParameterTable<T> table(layout, [&](const moxie::TensorInfo& t) -> RowView<T> {
        T* const data = memory.data() + (t.name == "w" ? 0 : t.name == "b" ? b_at : t.name == "scale" ? 40 : 50);
        return {data, t.rows, t.name == "b" ? b_size : t.cols, t.name == "w" ? w_stride : t.cols};
      });
    });
  };
  CHECK(message(0.0, 5, 15, 5) == "nothing was thrown");
  CHECK(message(0.0, 7, 20, 4) == "ParameterTable: b is (1,4), expected (1,5)");
  CHECK(message(0.0, 5, 14, 5) == "ParameterTable: tensors overlap each other");
  CHECK(message(0.0, 4, 20, 5) == "ParameterTable: the rows of 'w' overlap");
  CHECK(message.operator()<const double>(0, 4, 2, 5) == "nothing was thrown");  // whoever only reads may share
}

TEST_CASE("overlaps: of parameters is exact, for tables, blocks and parts") {
  const Layout layout = small_layout();
  Apart apart;
  const moxie::ParameterTable<double> table(layout, [&](const moxie::TensorInfo& t) { return apart(t); });
  const auto at = [](const double* data, Index n) { return RowView<const double>(data, 1, n); };
  CHECK(overlaps(table.view(), at(apart.w.data() + 5, 1)));
  CHECK_FALSE(overlaps(table.view(), at(apart.w.data(), 5)));       // the left half
  CHECK_FALSE(overlaps(table.view(), at(apart.w.data() + 10, 5)));  // and again
  CHECK(overlaps(table.view(), at(apart.w.data() + 10, 6)));
  CHECK(overlaps(table.view(), at(apart.scale.data(), 1)));
  const Parameters<double> block(layout);
  CHECK_FALSE(overlaps(table.view(), block.view()));
  CHECK_FALSE(overlaps(block.view(), table.view()));
  CHECK(overlaps(block.view(), block.view()));
  CHECK(overlaps(block.view(), at(block["b"].data(), 1)));
  CHECK_FALSE(overlaps(block.view(), at(block["b"].data() + 5, 11)));  // the gap behind it
  CHECK_FALSE(overlaps(moxie::ParameterView<const double>(), at(apart.w.data(), 30)));

  Layout whole;
  const Index first = whole.add_part("a.", layout);
  const Index second = whole.add_part("b.", layout);
  const Parameters<double> both(whole);
  const auto a = both.view().part(first, layout);
  const auto b = both.view().part(second, layout);
  CHECK_FALSE(overlaps(a, b));
  CHECK(overlaps(a, a));
  CHECK(overlaps(a, both.view()));
  CHECK_FALSE(overlaps(a, at(both["b.w"].data(), 1)));
  CHECK(overlaps(b, at(both["b.w"].data(), 1)));
}

}  // namespace

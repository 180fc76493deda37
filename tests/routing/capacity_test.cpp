// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/capacity.hpp>
#include <support.hpp>

namespace {

using moxie::assign_places;
using moxie::Buffer;
using moxie::Capacity;
using moxie::Index;
using moxie::Priority;
using moxie::Sequences;

struct Places : moxie::Places {
  Places(const Sequences& sequences, Index experts, Index k, const Capacity& c, const std::vector<Index>& expert,
         const std::vector<double>& weight) {
    assign_places<double>(sequences, {experts, k, expert, weight}, c, *this);
  }
  static std::vector<Index> list(const Buffer<Index>& b) { return {b.begin(), b.end()}; }
};

TEST_CASE("places: all first choices come before any second one, and dropped pairs keep theirs") {
  // Three tokens: 0 chooses experts 0, 1; 1 chooses 1, 0; 2 chooses 0, 1. Room for ⌈6 · 0.5 / 2⌉ = 2.
  const Places p(Sequences().over(3), 2, 2, {.factor = 0.5}, {0, 1, 1, 0, 0, 1}, {0.6, 0.1, 0.9, 0.1, 0.8, 0.1});
  CHECK(Places::list(p.place) == std::vector<Index>{0, 1, 0, 2, 1, 2});
  CHECK(Places::list(p.assigned) == std::vector<Index>{0, 1, 1, -1, 0, -1});
}

TEST_CASE("places: by weight, tokens of larger weight come first, ties as they stand") {
  const Capacity c{.factor = 0.5, .priority = Priority::weight};
  const Places p(Sequences().over(4), 2, 1, c, {0, 0, 0, 0}, {0.5, 0.7, 0.7, 0.9});  // room for one
  CHECK(Places::list(p.place) == std::vector<Index>{3, 1, 2, 0});
  CHECK(Places::list(p.assigned) == std::vector<Index>{-1, -1, -1, 0});
  CHECK(Places::list(p.order) == std::vector<Index>{3, 1, 2, 0});
}

TEST_CASE("places: every sequence has room of its own, empty ones none") {
  const std::vector<Index> starts{0, 1, 1, 4};
  const Places p(Sequences(starts).over(4), 2, 1, {.factor = 1}, {1, 1, 1, 1}, {1, 1, 1, 1});
  CHECK(Places::list(p.place) == std::vector<Index>{0, 0, 1, 2});
  CHECK(Places::list(p.assigned) == std::vector<Index>{1, 1, 1, -1});  // ⌈1/2⌉ and ⌈3/2⌉
}

TEST_CASE("places: sizes, experts and weights that make no plan are refused") {
  using moxie::test::message_of;
  const Sequences two = Sequences().over(2);
  const Capacity by_weight{.factor = 1, .priority = Priority::weight};
  const auto message = [&](Index k, const std::vector<Index>& expert, const std::vector<double>& weight) {
    return message_of<std::invalid_argument>([&] { Places(two, 2, k, by_weight, expert, weight); });
  };
  CHECK(message(1, {0, 1}, {1, 1}) == "nothing was thrown");
  CHECK(message(1, {0}, {1}) == "assign_places: there are 1 experts and 1 weights, expected 2");
  CHECK(message(1, {0, 1}, {1}) == "assign_places: there are 2 experts and 1 weights, expected 2");
  CHECK(message(0, {}, {}) == "assign_places: top_k is 0, expected at least 1");
  CHECK(message(1, {0, 2}, {1, 1}) == "assign_places: an expert is not one of them");
  CHECK(message(1, {0, -2}, {1, 1}) == "assign_places: an expert is not one of them");
  CHECK(message(1, {0, 1}, {1, std::nan("")}) == "assign_places: a weight is NaN");
}

}  // namespace

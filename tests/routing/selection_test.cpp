// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/selection.hpp>
#include <support.hpp>

namespace {

using moxie::Index;

template <class S>
std::vector<Index> select(const std::vector<S>& score, Index k) {
  std::vector<Index> chosen(std::size_t(k), -1);
  moxie::select_top_k(score.data(), Index(score.size()), k, chosen.data());
  return chosen;
}

TEST_CASE_TEMPLATE("top-k: takes the largest first", S, float, double) {
  const std::vector<S> score{S(0.1), S(0.7), S(-2), S(0.3), S(5)};
  CHECK(select(score, 1) == std::vector<Index>{4});
  CHECK(select(score, 3) == std::vector<Index>{4, 1, 3});
  CHECK(select(score, 5) == std::vector<Index>{4, 1, 3, 0, 2});
}

TEST_CASE_TEMPLATE("top-k: of equal scores the lower index goes first, and stays when there is room for one", S, float,
                   double) {
  CHECK(select<S>({1, 1, 1, 1}, 2) == std::vector<Index>{0, 1});
  CHECK(select<S>({0, 2, 1, 2, 2}, 2) == std::vector<Index>{1, 3});
  CHECK(select<S>({0, 2, 1, 2, 2}, 4) == std::vector<Index>{1, 3, 4, 2});
  CHECK(select<S>({3, 1, 3, 1, 3, 1}, 5) == std::vector<Index>{0, 2, 4, 1, 3});
  CHECK(select<S>({S(-0.0), S(0.0)}, 1) == std::vector<Index>{0});
  const S infinity = std::numeric_limits<S>::infinity();
  CHECK(select<S>({-infinity, 0, infinity, infinity}, 3) == std::vector<Index>{2, 3, 1});
}

TEST_CASE("top-k: agrees with a stable sort for every n and K, with and without ties") {
  for (const Index n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 33, 90}) {  // the last two are more than vectors hold
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      std::vector<double> score(static_cast<std::size_t>(n));
      for (Index i = 0; i < n; ++i) {
        const moxie::Rng rng(seed);
        score[std::size_t(i)] = seed % 2 == 0 ? rng.normal(std::uint64_t(i)) : double(rng.below(4, std::uint64_t(i)));
      }
      const Eigen::VectorXd as_vector = Eigen::Map<const Eigen::VectorXd>(score.data(), n);
      for (Index k = 1; k <= n; ++k) {
        const auto expected = moxie::test::reference::top_k(as_vector, k);
        CHECK(select(score, k) == expected);
        std::vector<Index> order(score.size());
        moxie::select_largest(score.data(), n, k, order.data());
        CHECK(std::equal(expected.begin(), expected.end(), order.begin()));
      }
    }
  }
}

TEST_CASE("top-k: a K that the scores do not have is refused") {
  using moxie::test::message_of;
  const std::vector<double> score{1, 2, 3, 4};
  std::vector<double> scratch = score;
  std::vector<Index> chosen(4, -1);
  std::vector<double> group_score(2);
  std::vector<Index> group(2);
  for (const Index k : {-1, 0, 5}) {
    CHECK(message_of<moxie::ValueError>([&] { moxie::select_top_k(score.data(), 4, k, chosen.data()); }) ==
          "select_top_k: k must be between 1 and the number of scores");
    CHECK(message_of<moxie::ValueError>([&] {
            moxie::select_top_k_in_groups(scratch.data(), 4, k, {.count = 2, .chosen = 2}, {group_score.data(), group.data()},
                                          chosen.data());
          }) == "select_top_k_in_groups: k must be between 1 and the number of scores in the chosen groups");
  }
  CHECK(message_of<moxie::ValueError>([&] { moxie::select_largest(score.data(), 4, 5, chosen.data()); }) != "");
  CHECK(message_of<moxie::ValueError>([&] {
          moxie::select_top_k_in_groups(scratch.data(), 4, 3, {.count = 2, .chosen = 1}, {group_score.data(), group.data()},
                                        chosen.data());
        }) == "select_top_k_in_groups: k must be between 1 and the number of scores in the chosen groups");
  CHECK(message_of<moxie::ValueError>([&] {
          moxie::select_top_k_in_groups(scratch.data(), 4, 1, {.count = 3, .chosen = 1}, {group_score.data(), group.data()},
                                        chosen.data());
        }) == "select_top_k_in_groups: groups.count must divide the number of scores");
  CHECK(scratch == score);
  CHECK(chosen == std::vector<Index>(4, -1));
}

}  // namespace

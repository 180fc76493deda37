// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <limits>
#include <moxie/kernel/simd.hpp>
#include <moxie/routing/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// The K largest of n scores in decreasing order, ties to the lower index: `chosen[0..K)`. Insertion into K kept candidates,
/// O(nK) at worst and near O(n) for random scores, of which a vector at a time is compared with the least that is kept. Scores
/// must not be NaN: with one, any K of them are chosen. Throws ValueError unless 1 <= K <= n.
template <class Scalar>
void select_top_k(const Scalar* score, Index n, Index k, Index* chosen) {
  detail::expect_value(k >= 1 && k <= n, "select_top_k", "k must be between 1 and the number of scores");
  Index kept = 0;
  for (Index i = 0; i < n; ++i) {
    if (kept == k) {
      i = kernel::find_above(i, n, score, score[chosen[k - 1]]);
      if (i == n) {
        return;
      }
    }
    Index place = kept < k ? kept++ : k - 1;
    for (; place > 0 && score[i] > score[chosen[place - 1]]; --place) {
      chosen[place] = chosen[place - 1];
    }
    chosen[place] = i;
  }
}

/// The K largest of n scores in decreasing order, ties to the lower index, for a K that is not
/// small. `order` holds n indices, and then begins with the K best. O(n log K). Scores must not be
/// NaN. `score(i)` is a function of i. Throws ValueError unless 0 <= K <= n.
template <class Score>
void partial_sort_top_k(const Score& score, Index n, Index k, Index* order) {
  detail::expect_value(k >= 0 && k <= n, "partial_sort_top_k", "k must be between 0 and the number of scores");
  for (Index i = 0; i < n; ++i) {
    order[i] = i;
  }
  std::partial_sort(order, order + k, order + n,
                    [&](Index a, Index b) { return score(a) > score(b) || (score(a) == score(b) && a < b); });
}

/// The K largest of n scores, K <= n, by whichever of the two is faster. `order` holds n indices,
/// and then begins with the K best.
template <class Scalar>
void select_largest(const Scalar* score, Index n, Index k, Index* order) {
  if (k > 0 && k <= 32) {
    select_top_k(score, n, k, order);
  } else {
    partial_sort_top_k([&](Index i) { return score[i]; }, n, k, order);
  }
}

/// Room for the score of each group, and for the groups that are chosen.
template <class Scalar>
struct GroupScratch {
  Scalar* score;
  Index* group;
};

/// The K largest of those n scores that are in the best groups, ties to the lower index, of groups too. `score` is overwritten
/// where a group is left out. `scratch` has room for G numbers. Scores must be finite. Throws ValueError for
/// groups that do not divide the scores, and unless 1 <= K <= the number of scores in the groups that may be chosen.
template <class Scalar>
void select_top_k_in_groups(Scalar* score, Index n, Index k, const ExpertGroups& groups, GroupScratch<Scalar> scratch,
                            Index* chosen) {
  constexpr std::string_view where = "select_top_k_in_groups";
  detail::expect_value(groups.count >= 1 && n % groups.count == 0, where, "groups.count must divide the number of scores");
  detail::expect_value(groups.chosen >= 1 && groups.chosen <= groups.count, where,
                       "groups.chosen must be between 1 and groups.count");
  detail::expect_value(k >= 1 && k <= n / groups.count * groups.chosen, where,
                       "k must be between 1 and the number of scores in the chosen groups");
  const Index size = n / groups.count;
  for (Index g = 0; g < groups.count; ++g) {
    const Scalar* s = score + g * size;
    Scalar first = s[0];
    Scalar second = -std::numeric_limits<Scalar>::infinity();
    for (Index i = 1; i < size; ++i) {
      second = (std::max)(second, (std::min)(first, s[i]));
      first = (std::max)(first, s[i]);
    }
    scratch.score[g] = groups.score == GroupScore::largest || size == 1 ? first : first + second;
  }
  Index* const group = scratch.group;
  select_top_k(scratch.score, groups.count, groups.chosen, group);
  std::sort(group, group + groups.chosen);
  for (Index g = 0, next = 0; g < groups.count; ++g) {
    if (next < groups.chosen && group[next] == g) {
      ++next;
    } else {
      std::fill_n(score + g * size, size, -std::numeric_limits<Scalar>::infinity());
    }
  }
  select_top_k(score, n, k, chosen);
}

}  // namespace moxie::inline MOXIE_NAMESPACE

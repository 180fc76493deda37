// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/matrix.hpp>

namespace moxie {

/// The K largest of n scores in decreasing order, ties to the lower index: `chosen[0..K)`. Insertion into K kept candidates,
/// O(nK) at worst and near O(n) for random scores. Scores must not be NaN; K <= n.
template <class Scalar>
void select_top_k(const Scalar* score, Index n, Index k, Index* chosen) {
  Index kept = 0;
  for (Index i = 0; i < n; ++i) {
    if (kept == k && !(score[i] > score[chosen[k - 1]])) {
      continue;
    }
    Index place = kept < k ? kept++ : k - 1;
    for (; place > 0 && score[i] > score[chosen[place - 1]]; --place) {
      chosen[place] = chosen[place - 1];
    }
    chosen[place] = i;
  }
}

}  // namespace moxie

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/core/matrix.hpp>

namespace dit {

using moxie::Index;
using moxie::RowView;

/// The time 1 / (1 + exp(-normal)) of a normal number: most often in the middle of the path.
inline double logit_normal(double normal) { return 1 / (1 + std::exp(-normal)); }

/// The number that a standard normal one is below with probability u in (0,1): the inverse of its distribution function, to the
/// last digits, by bisection.
inline double normal_quantile(double u) {
  double low = -9;
  double high = 9;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < u ? low : high) = middle;
  }
  return (low + high) / 2;
}

/// Rectified flow (Liu et al. 2022; logit-normal times of Esser et al. 2024): straight paths from images x at t = 0 to noise z
/// at t = 1, and a network that predicts their velocity.
///
///     x_t = (1 - t) x + t z,   loss = mean (v(x_t, t, label) - (z - x))²
///
/// The network is given t itself.
struct RectifiedFlow {
  bool logit_normal_times = true;  ///< else uniform on (0,1)

  /// The time that belongs to u, which is uniform on (0,1).
  double time(double u) const {
    u = std::clamp(u, 1e-9, 1 - 1e-9);
    return logit_normal_times ? logit_normal(normal_quantile(u)) : u;
  }
  template <class S>
  static S noised(S x, S t, S z) {
    return (S(1) - t) * x + t * z;
  }
  /// An image's loss, the mean over its pixels. If `doutput` has columns it becomes `dloss` times the loss's gradient. Outputs
  /// beyond the velocity (a learned variance) have no part in it.
  template <class S>
  static double loss(RowView<const S> x, RowView<const S> noise, RowView<const S> output, Index image, double dloss,
                     RowView<S> doutput) {
    const Index n = x.cols();
    double sum = 0;
    for (Index j = 0; j < output.cols(); ++j) {
      const double difference = j < n ? double(output(image, j)) - (double(noise(image, j)) - double(x(image, j))) : 0;
      sum += difference * difference;
      if (doutput.size() != 0) {
        doutput(image, j) = S(dloss * 2 * difference / double(n));
      }
    }
    return sum / double(n);
  }
};

}  // namespace dit

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <moxie/core/exec.hpp>
#include <moxie/core/random.hpp>
#include <nn/image_set.hpp>
#include <string>

namespace nn {

namespace detail {

/// Signed distance in pixels, negative inside, from a point (x, y) to a shape of about radius s around the origin.
inline double shape_distance(std::int64_t shape, double x, double y, double s) {
  const double ax = std::abs(x);
  const double ay = std::abs(y);
  const auto outline = [&](double distance) { return std::abs(distance) - 0.2 * s; };
  const auto plus = [&](double u, double v) { return std::max(std::min(u, v) - 0.25 * s, std::max(u, v) - s); };
  const auto bars = [&](double along, double across) { return std::max(outline(across - 0.55 * s), along - 0.9 * s); };
  switch (shape) {
    case 0:
      return std::hypot(x, y) - s;
    case 1:
      return outline(std::hypot(x, y) - 0.8 * s);
    case 2:
      return std::max(ax, ay) - 0.85 * s;
    case 3:
      return outline(std::max(ax, ay) - 0.75 * s);
    case 4:
      return std::max(y, std::sqrt(0.75) * ax - 0.5 * y) - 0.55 * s;
    case 5:
      return (ax + ay) * std::sqrt(0.5) - 0.75 * s;
    case 6:
      return plus(ax, ay);
    case 7:
      return plus(std::abs(x + y) * std::sqrt(0.5), std::abs(x - y) * std::sqrt(0.5));
    case 8:
      return bars(ax, ay);
    default:
      return bars(ay, ax);
  }
}

}  // namespace detail

/// `count` gray images, 28x28, of ten kinds of shape in turn, with random place, size, brightness and a little rotation. Image
/// i is a function of `rng` and i only, whatever the count and the number of threads.
inline ImageSet generated_shapes(Index count, const moxie::Rng& rng, moxie::Exec exec = {}) {
  moxie::detail::expect_at_least("generated_shapes", "count", count, 1);
  ImageSet set;
  set.channels = 1;
  set.height = 28;
  set.width = 28;
  set.class_names = {"Disc",    "Ring", "Square", "Frame",           "Triangle",
                     "Diamond", "Plus", "Cross",  "Horizontal bars", "Vertical bars"};
  set.images.resize(count, set.height * set.width);
  set.labels.resize(static_cast<std::size_t>(count));
  exec.parallel_for(count, [&](Index i) {
    const std::int64_t shape = i % Index(set.class_names.size());
    set.labels[static_cast<std::size_t>(i)] = shape;

    const moxie::Rng draw = rng.split(static_cast<std::uint64_t>(i));
    const auto between = [&](std::uint64_t index, double low, double high) { return low + (high - low) * draw.uniform(index); };
    const double center_x = between(0, 11.5, 15.5);
    const double center_y = between(1, 11.5, 15.5);
    const double size = between(2, 6.5, 9.5);
    const double angle = between(3, -0.2, 0.2);
    const double brightness = between(4, 0.6, 1.0);

    float* pixel = set.images.row(i).data();
    for (Index row = 0; row < set.height; ++row) {
      for (Index col = 0; col < set.width; ++col) {
        const double x = double(col) - center_x;
        const double y = double(row) - center_y;
        const double distance = detail::shape_distance(shape, std::cos(angle) * x + std::sin(angle) * y,
                                                       std::cos(angle) * y - std::sin(angle) * x, size);
        const double coverage = std::clamp(0.5 - distance, 0.0, 1.0);  // of the pixel, by the shape: smooth edges
        *pixel++ = static_cast<float>(2.0 * brightness * coverage - 1.0);
      }
    }
  });
  set.origin = std::to_string(count) + " generated shapes " + sizes_text(set);
  return set;
}

}  // namespace nn

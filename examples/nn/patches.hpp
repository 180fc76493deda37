// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/error.hpp>
#include <moxie/core/matrix.hpp>

namespace nn {

using moxie::Index;
using moxie::RowView;

namespace detail {

/// Calls f(image, pixel, token, feature) for every pixel of square gray images.
template <class F>
void for_each_pixel(Index images, Index side, Index patch, F&& f) {
  const Index grid = side / patch;
  for (Index i = 0; i < images * side * side; ++i) {
    const Index b = i / (side * side), y = i / side % side, x = i % side;
    f(b, y * side + x, (b * grid + y / patch) * grid + x / patch, y % patch * patch + x % patch);
  }
}

/// Throws ShapeError unless tokens are (B·(side/patch)²,patch²), ValueError unless patches of this size make up an image.
template <class T, class U>
void expect_patches(const char* where, RowView<T> images, Index side, Index patch, RowView<U> tokens) {
  moxie::detail::expect_value(patch >= 1 && side >= patch && side % patch == 0, where, "an image is not made of whole patches");
  moxie::detail::expect_shape(where, "images", images, -1, side * side, "B");
  moxie::detail::expect_shape(where, "tokens", tokens, images.rows() * (side / patch) * (side / patch), patch * patch);
}

}  // namespace detail

/// The patches of square gray images as tokens: (B,side²) -> (B·L,patch²) with L = (side / patch)².
///
/// Token t of an image is the patch in row t / (side / patch) and column t % (side / patch) of its grid. The pixels of a patch
/// are its features, row after row. Throws ShapeError, and ValueError unless patches of this size make up an image. The
/// backward is `unpatchify`.
template <class S>
void patchify(RowView<const S> images, Index side, Index patch, RowView<S> tokens) {
  detail::expect_patches("patchify", images, side, patch, tokens);
  detail::for_each_pixel(images.rows(), side, patch,
                         [&](Index b, Index pixel, Index token, Index feature) { tokens(token, feature) = images(b, pixel); });
}

/// The inverse: (B·L,patch²) -> (B,side²). Its backward is `patchify`.
template <class S>
void unpatchify(RowView<const S> tokens, Index side, Index patch, RowView<S> images) {
  detail::expect_patches("unpatchify", images, side, patch, tokens);
  detail::for_each_pixel(images.rows(), side, patch,
                         [&](Index b, Index pixel, Index token, Index feature) { images(b, pixel) = tokens(token, feature); });
}

}  // namespace nn

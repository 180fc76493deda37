// SPDX-License-Identifier: MIT
#pragma once

#include <nn/linear.hpp>

namespace compare {

using moxie::Buffer;
using moxie::Exec;
using moxie::Index;
using moxie::Layout;
using moxie::Matrix;
using moxie::ParameterView;
using moxie::Rng;
using moxie::RowView;

/// A convolution of square images with zero padding, as a product of their windows: rows are pixels, columns channels.
///
///     y(o) = W [x(window of o)] + b,   windows of kernel² pixels, centred on every stride-th pixel
template <class S>
class Convolution {
 public:
  Convolution(Layout& layout, const std::string& name, Index side, Index in, Index out, Index kernel, Index stride)
      : side_(side), in_(in), kernel_(kernel), stride_(stride), linear_(layout, name, kernel * kernel * in, out) {}

  /// Pixels along a side of the result.
  Index side() const { return (side_ + stride_ - 1) / stride_; }
  void initialize(ParameterView<S> p, const Rng& rng) const { linear_.initialize(p, rng); }

  /// y (B·side², out) of x (B·side'², in); the windows stay in `windows` for the backward.
  void forward(ParameterView<const S> p, RowView<const S> x, RowView<S> y, Buffer<S>& windows, const Exec& exec) const {
    const RowView<S> rows = windows.matrix(y.rows(), kernel_ * kernel_ * in_);
    for_each_window(x.rows(), exec, [&](Index row, Index place, Index pixel) {
      S* const to = rows.row(row) + place * in_;
      if (pixel < 0) {
        std::fill_n(to, in_, S(0));
      } else {
        std::copy_n(x.row(pixel), in_, to);
      }
    });
    linear_.forward(p, rows, y, exec);
  }

  /// Adds to the gradients of the parameters; dx, where it is wanted, is overwritten.
  void backward(ParameterView<const S> p, const Buffer<S>& windows, RowView<const S> dy, RowView<S> dx, Buffer<S>& scratch,
                ParameterView<S> dp, const Exec& exec) const {
    const RowView<const S> rows = windows.view(dy.rows(), kernel_ * kernel_ * in_);
    if (dx.size() == 0) {
      linear_.backward(rows, dy, dp, exec);
      return;
    }
    const RowView<S> drows = scratch.matrix(rows.rows(), rows.cols());
    linear_.backward(p, rows, dy, drows, dp, exec);
    dx.eigen().setZero();
    for_each_window(dx.rows(), exec, [&](Index row, Index place, Index pixel) {
      const S* const from = drows.row(row) + place * in_;
      for (Index c = 0; c < in_ && pixel >= 0; ++c) {
        dx(pixel, c) += from[c];
      }
    });
  }

 private:
  /// f(row of y, place in the window, row of x or -1), image by image.
  template <class F>
  void for_each_window(Index rows, const Exec& exec, F&& f) const {
    const Index area = side_ * side_;
    exec.parallel_for(rows / area, [&](Index image) {
      for (Index i = 0; i < side() * side(); ++i) {
        for (Index place = 0; place < kernel_ * kernel_; ++place) {
          const Index y = i / side() * stride_ + place / kernel_ - kernel_ / 2;
          const Index x = i % side() * stride_ + place % kernel_ - kernel_ / 2;
          const bool inside = 0 <= y && y < side_ && 0 <= x && x < side_;
          f(image * side() * side() + i, place, inside ? image * area + y * side_ + x : -1);
        }
      }
    });
  }

  Index side_;
  Index in_;
  Index kernel_;
  Index stride_;
  nn::Linear<S> linear_;
};

}  // namespace compare

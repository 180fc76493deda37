// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <compare/convolution.hpp>
#include <moxie/testing/gradient_check.hpp>

using compare::Buffer;
using compare::Convolution;
using compare::Exec;
using compare::Index;
using compare::Matrix;
using compare::Rng;
using compare::RowView;
using moxie::random_normal;
using moxie::testing::check_gradient;

TEST_CASE("Convolution: is the sum over its windows, and its gradients agree with finite differences") {
  constexpr Index images = 2, in = 3, out = 4;
  for (const Index side : {1, 4, 5}) {
    for (const Index kernel : {1, 3, 5}) {
      for (const Index stride : {1, 2}) {
        CAPTURE(side);
        CAPTURE(kernel);
        CAPTURE(stride);
        moxie::Layout layout;
        const Convolution<double> convolution(layout, "c", side, in, out, kernel, stride);
        const Index to = convolution.side();
        CHECK(to == (side + stride - 1) / stride);
        moxie::Parameters<double> p(layout);
        p["c.weight"].eigen() = random_normal<double>(out, kernel * kernel * in, Rng(1));
        p["c.bias"].eigen() = random_normal<double>(1, out, Rng(2));
        Matrix<double> x = random_normal<double>(images * side * side, in, Rng(3));
        const Matrix<double> dy = random_normal<double>(images * to * to, out, Rng(4));
        Matrix<double> y(images * to * to, out);
        Buffer<double> windows, scratch;
        const auto loss = [&] {
          convolution.forward(p, x, y, windows, Exec{2});
          return (y.array() * dy.array()).sum();
        };
        loss();

        double worst = 0;
        for (Index image = 0; image < images; ++image) {
          for (Index i = 0; i < to * to; ++i) {
            for (Index o = 0; o < out; ++o) {
              double expected = p["c.bias"](0, o);
              for (Index ky = 0; ky < kernel; ++ky) {
                for (Index kx = 0; kx < kernel; ++kx) {
                  const Index row = i / to * stride + ky - kernel / 2;
                  const Index col = i % to * stride + kx - kernel / 2;
                  for (Index c = 0; c < in && row >= 0 && row < side && col >= 0 && col < side; ++c) {
                    expected += p["c.weight"](o, (ky * kernel + kx) * in + c) * x((image * side + row) * side + col, c);
                  }
                }
              }
              worst = std::max(worst, std::abs(expected - y(image * to * to + i, o)));
            }
          }
        }
        CHECK(worst < 1e-12);

        moxie::Parameters<double> dp = p.zeros_like();
        Matrix<double> dx(x.rows(), in);
        convolution.backward(p, windows, dy, dx, scratch, dp, Exec{2});
        CHECK(check_gradient(loss, x, dx).passes(1e-6));
        CHECK(check_gradient(loss, p["c.weight"], dp["c.weight"]).passes(1e-6));
        CHECK(check_gradient(loss, p["c.bias"], dp["c.bias"]).passes(1e-6));
        const Matrix<double> once = dp["c.weight"].eigen();
        convolution.backward(p, windows, dy, {}, scratch, dp, Exec{1});
        CHECK((dp["c.weight"].eigen() - 2 * once).cwiseAbs().maxCoeff() < 1e-10);
      }
    }
  }
}

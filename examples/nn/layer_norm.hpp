// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/moxie.hpp>
#include <string>

namespace nn {

using moxie::Buffer;
using moxie::Exec;
using moxie::Index;
using moxie::Layout;
using moxie::ParameterView;
using moxie::RowView;

/// Layer norm (Ba, Kiros and Hinton 2016) over groups of d neighbouring numbers of a row, with a weight w (d) and a bias b (d)
/// that all groups share:
///
///     n = (x - mean) / √(var + 1e-6),   y = n w + b        var divides by d
///
/// With d = D a group is a whole row: the usual layer norm. With d = D / heads it normalizes each head ("QK-norm"). The layer
/// norm of a DiT block, whose shift and scale come from the condition, is `ModulatedNorm`.
template <class S>
class LayerNorm {
 public:
  struct Tape {
    Buffer<S> n;        // (T,D)
    Buffer<S> inverse;  // 1 / √(var + ε), (T, groups)
  };

  /// Declares `name`.weight and `name`.bias.
  LayerNorm(Layout& layout, const std::string& name, Index d)
      : weight_(layout.add(name + ".weight", {d}, {.role = moxie::Role::norm})),
        bias_(layout.add(name + ".bias", {d}, {.role = moxie::Role::bias})) {}

  /// The weight becomes 1. The bias is left as it is.
  void initialize(ParameterView<S> p) const { p[weight_].eigen().setOnes(); }

  /// y (T,D) from x (T,D), D a multiple of d. y may be x.
  void forward(ParameterView<const S> p, RowView<const S> x, RowView<S> y, Tape& tape, const Exec& exec = {}) const {
    const auto w = p[weight_].eigen().row(0).array();
    const auto b = p[bias_].eigen().row(0).array();
    const Index d = w.size();
    const Index groups = groups_of(x, d);
    const RowView<S> n = tape.n.matrix(x.rows(), x.cols());
    const RowView<S> inverse = tape.inverse.matrix(x.rows(), groups);
    exec.parallel_for(x.rows(), [&](Index t) {
      for (Index g = 0; g < groups; ++g) {
        const auto in = x.eigen().row(t).segment(g * d, d).array();
        auto row = n.eigen().row(t).segment(g * d, d).array();
        row = in - in.mean();
        inverse(t, g) = S(1) / std::sqrt(row.square().mean() + S(1e-6));
        row *= inverse(t, g);
        y.eigen().row(t).segment(g * d, d).array() = row * w + b;
      }
    });
  }

  /// With dn = dy w: dx = inverse · (dn - mean(dn) - n mean(dn n)). dx may be dy.
  /// dw += Σ dy n, db += Σ dy over tokens and groups, in order.
  void backward(ParameterView<const S> p, RowView<const S> dy, RowView<S> dx, ParameterView<S> dp, const Tape& tape,
                const Exec& exec = {}) const {
    const auto w = p[weight_].eigen().row(0).array();
    const Index d = w.size();
    const Index groups = groups_of(dy, d);
    const RowView<const S> n = tape.n.view(dy.rows(), dy.cols());
    const RowView<const S> inverse = tape.inverse.view(dy.rows(), groups);
    auto dw = dp[weight_].eigen().row(0).array();
    auto db = dp[bias_].eigen().row(0).array();
    for (Index t = 0; t < dy.rows(); ++t) {
      for (Index g = 0; g < groups; ++g) {
        const auto dout = dy.eigen().row(t).segment(g * d, d).array();
        dw += dout * n.eigen().row(t).segment(g * d, d).array();
        db += dout;
      }
    }
    exec.parallel_for(dy.rows(), [&](Index t) {
      for (Index g = 0; g < groups; ++g) {
        auto din = dx.eigen().row(t).segment(g * d, d).array();
        const auto row = n.eigen().row(t).segment(g * d, d).array();
        din = dy.eigen().row(t).segment(g * d, d).array() * w;
        const S mean = din.mean();
        const S along = (din * row).mean();
        din = inverse(t, g) * (din - mean - row * along);
      }
    });
  }

 private:
  static Index groups_of(RowView<const S> x, Index d) {
    moxie::detail::expect_value(x.cols() % d == 0, "LayerNorm", "the width of a row is not a multiple of d");
    return x.cols() / d;
  }

  Index weight_;
  Index bias_;
};

}  // namespace nn

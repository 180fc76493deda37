// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/moxie.hpp>

namespace nn {

using moxie::Buffer;
using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;

/// Layer norm without learned parameters, modulated by a shift and a scale for each sequence b:
///
///     n = (x - mean) / √(var + 1e-6),   h = n (1 + scale_b) + shift_b        var divides by D
///
/// "adaLN" of DiT (Peebles and Xie 2023): the condition chooses shift and scale.
template <class S>
struct ModulatedNorm {
  Index length;  ///< L

  struct Tape {
    Buffer<S> n;        // (T,D)
    Buffer<S> inverse;  // 1 / √(var + ε), T
  };

  void forward(RowView<const S> x, RowView<const S> shift, RowView<const S> scale, RowView<S> h, Tape& tape,
               const Exec& exec = {}) const {
    const Index dim = x.cols();
    const RowView<S> n = tape.n.matrix(x.rows(), dim);
    tape.inverse.resize(x.rows());
    const Matrix<S> ones = Matrix<S>::Ones(1, dim);
    exec.parallel_for(shift.rows(), [&](Index b) {
      const auto gain = scale.middle_rows(b, 1).eigen().array() + S(1);
      for (Index t = b * length; t < (b + 1) * length; ++t) {
        const S mean = moxie::kernel::dot(dim, x.row(t), ones.data()) / S(dim);
        auto row = n.middle_rows(t, 1).eigen();
        row = x.middle_rows(t, 1).eigen().array() - mean;
        tape.inverse[t] = S(1) / std::sqrt(moxie::kernel::dot(dim, n.row(t), n.row(t)) / S(dim) + S(1e-6));
        row *= tape.inverse[t];
        h.middle_rows(t, 1).eigen() = row.array() * gain + shift.middle_rows(b, 1).eigen().array();
      }
    });
  }

  /// dshift_b = Σ dh, dscale_b = Σ dh n; with dn = dh (1 + scale): dx += inverse · (dn - mean(dn) - n mean(dn n)).
  void backward(RowView<const S> scale, RowView<const S> dh, RowView<S> dshift, RowView<S> dscale, RowView<S> dx,
                const Tape& tape, const Exec& exec = {}) const {
    const Index dim = dh.cols();
    const RowView<const S> n = tape.n.view(dh.rows(), dim);
    const Matrix<S> gains = scale.eigen().array() + S(1);
    exec.parallel_for(scale.rows(), [&](Index b) {
      auto shift = dshift.middle_rows(b, 1).eigen();
      auto factor = dscale.middle_rows(b, 1).eigen();
      shift.setZero();
      factor.setZero();
      const S* gain = gains.data() + b * dim;
      const auto gain_row = gains.row(b).array();
      Matrix<S> weighted(1, dim);
      for (Index t = b * length; t < (b + 1) * length; ++t) {
        const auto d = dh.middle_rows(t, 1).eigen().array();
        const auto row = n.middle_rows(t, 1).eigen().array();
        shift.array() += d;
        factor.array() += d * row;
        weighted.array() = d * gain_row;
        const S mean = moxie::kernel::dot(dim, dh.row(t), gain) / S(dim);
        const S along = moxie::kernel::dot(dim, weighted.data(), n.row(t)) / S(dim);
        dx.middle_rows(t, 1).eigen().array() += tape.inverse[t] * (weighted.array() - mean - row * along);
      }
    });
  }
};

/// out = x + gate_b · f, the gated residual of adaLN-Zero.
template <class S>
void add_gated(RowView<const S> x, RowView<const S> gate, RowView<const S> f, RowView<S> out, const Exec& exec = {}) {
  const Index length = x.rows() / gate.rows();
  exec.parallel_for(gate.rows(), [&](Index b) {
    const auto g = gate.middle_rows(b, 1).eigen().array();
    for (Index t = b * length; t < (b + 1) * length; ++t) {
      out.middle_rows(t, 1).eigen() = x.middle_rows(t, 1).eigen().array() + g * f.middle_rows(t, 1).eigen().array();
    }
  });
}
/// df = gate_b · dout, dgate_b = Σ dout f; dx is dout.
template <class S>
void add_gated_backward(RowView<const S> gate, RowView<const S> f, RowView<const S> dout, RowView<S> df, RowView<S> dgate,
                        const Exec& exec = {}) {
  const Index length = f.rows() / gate.rows();
  exec.parallel_for(gate.rows(), [&](Index b) {
    const auto g = gate.middle_rows(b, 1).eigen().array();
    auto dg = dgate.middle_rows(b, 1).eigen().array();
    dg.setZero();
    for (Index t = b * length; t < (b + 1) * length; ++t) {
      const auto d = dout.middle_rows(t, 1).eigen().array();
      dg += d * f.middle_rows(t, 1).eigen().array();
      df.middle_rows(t, 1).eigen() = g * d;
    }
  });
}

}  // namespace nn

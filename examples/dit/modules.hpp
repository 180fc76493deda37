// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <moxie/moxie.hpp>
#include <numbers>
#include <string>

/// The parts of a transformer that are not mixtures of experts: linear layers, modulated layer norm, embeddings, and in
/// attention.hpp attention; each with its adjoint beside it. B sequences of L tokens of width D, rows (B·L, D). A part declares
/// its tensors in the model's layout; `backward` overwrites input gradients (or adds where it says so) and adds to parameter
/// gradients.
namespace dit {

using moxie::Buffer;
using moxie::Exec;
using moxie::Index;
using moxie::Layout;
using moxie::Matrix;
using moxie::ParameterView;
using moxie::Rng;
using moxie::RowView;
using moxie::Workspace;

/// y = x Wᵀ + b.
template <class S>
class Linear {
 public:
  Linear(Layout& layout, const std::string& name, Index in, Index out) : Linear(layout, name, {out, in}, out) {}
  /// A weight of another shape, whose rows are the outputs (a convolution over disjoint patches).
  Linear(Layout& layout, const std::string& name, std::vector<Index> shape, Index out)
      : weight_(layout.add(name + ".weight", std::move(shape))), bias_(layout.add(name + ".bias", {out})) {}

  /// Glorot uniform, bias zero.
  void initialize(ParameterView<S> p, const Rng& rng) const {
    const RowView<S> w = p[weight_];
    const double bound = std::sqrt(6.0 / double(w.rows() + w.cols()));
    rng.split(std::uint64_t(weight_)).fill_uniform(w, -bound, bound);
  }
  void initialize_normal(ParameterView<S> p, const Rng& rng, double deviation) const {
    rng.split(std::uint64_t(weight_)).fill_normal(p[weight_], deviation);
  }

  void forward(ParameterView<const S> p, RowView<const S> x, RowView<S> y, const Exec& exec) const {
    const RowView<const S> w = p[weight_];
    moxie::kernel::Product<S> product{x.rows(),
                                      w.rows(),
                                      w.cols(),
                                      moxie::kernel::plain<S>(x),
                                      moxie::kernel::transposed<S>(w),
                                      moxie::kernel::stream_to<S>(y)};  // (n,in)(in,out) -> (n,out)
    product.bias = p[bias_].data();
    moxie::kernel::gemm<S>(product, exec);
  }

  /// dW += dyᵀ x, db += Σ dy.
  void backward(RowView<const S> x, RowView<const S> dy, ParameterView<S> dp, const Exec& exec) const {
    const RowView<S> dw = dp[weight_];
    moxie::kernel::gemm<S>({dw.rows(), dw.cols(), x.rows(), moxie::kernel::transposed<S>(dy), moxie::kernel::plain<S>(x),
                            moxie::kernel::add_to<S>(dw)},
                           exec);  // (out,n)(n,in) -> (out,in)
    const RowView<S> db = dp[bias_];
    exec.parallel_ranges(dy.cols(), 64, [&](Index begin, Index end) {
      for (Index r = 0; r < dy.rows(); ++r) {
        db.eigen().middleCols(begin, end - begin) += dy.eigen().row(r).segment(begin, end - begin);
      }
    });
  }
  /// The same, and dx = dy W, or dx += dy W.
  void backward(ParameterView<const S> p, RowView<const S> x, RowView<const S> dy, RowView<S> dx, ParameterView<S> dp,
                const Exec& exec, bool add = false) const {
    backward(x, dy, dp, exec);
    const RowView<const S> w = p[weight_];
    moxie::kernel::gemm<S>({x.rows(), w.cols(), w.rows(), moxie::kernel::plain<S>(dy), moxie::kernel::plain<S>(w),
                            add ? moxie::kernel::add_to<S>(dx) : moxie::kernel::stream_to<S>(dx)},
                           exec);  // (n,out)(out,in) -> (n,in)
  }

 private:
  Index weight_;
  Index bias_;
};

/// out = act(in), element by element.
template <class Activation, class S>
void activate(RowView<const S> in, RowView<S> out) {
  moxie::kernel::map(
      in.size(), out.data(), [](auto a) { return Activation::value(a); }, in.data());
}
/// d = d · act'(in).
template <class Activation, class S>
void activate_backward(RowView<const S> in, RowView<S> d) {
  moxie::kernel::map(
      in.size(), d.data(), [](auto g, auto a) { return g * Activation::derivative(a); }, static_cast<const S*>(d.data()),
      in.data());
}

/// Layer norm without learned parameters, modulated by a shift and a scale per sequence:
///
///     n = (x - mean) / √(var + 1e-6),   h = n (1 + scale_b) + shift_b
template <class S>
struct ModulatedNorm {
  Index length;  ///< L

  struct Tape {
    Buffer<S> n;        // (T,D)
    Buffer<S> inverse;  // 1 / √(var + ε), T
  };

  void forward(RowView<const S> x, RowView<const S> shift, RowView<const S> scale, RowView<S> h, Tape& tape,
               const Exec& exec) const {
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
                const Tape& tape, const Exec& exec) const {
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
void add_gated(RowView<const S> x, RowView<const S> gate, RowView<const S> f, RowView<S> out, const Exec& exec) {
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
                        const Exec& exec) {
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

/// out -= a ⊙ b.
template <class S>
void subtract_product(RowView<const S> a, RowView<const S> b, RowView<S> out, const Exec& exec) {
  exec.parallel_ranges(out.rows(), 16, [&](Index begin, Index end) {
    const auto part = [&](auto m) { return m.middle_rows(begin, end - begin).eigen().array(); };
    part(out) -= part(a) * part(b);
  });
}

/// The fixed position embedding of a g x g grid, (g², D): sines and cosines of the column index, then of the row index,
/// frequencies 10000^(-i / (D/4)).
template <class S>
Matrix<S> position_embedding(Index grid, Index dim) {
  const Index quarter = dim / 4;
  Matrix<S> table(grid * grid, dim);
  for (Index t = 0; t < grid * grid; ++t) {
    const std::array<Index, 2> place{t % grid, t / grid};
    for (Index axis = 0; axis < 2; ++axis) {
      for (Index i = 0; i < quarter; ++i) {
        const double angle = double(place[std::size_t(axis)]) * std::pow(10000.0, -double(i) / double(quarter));
        table(t, axis * 2 * quarter + i) = S(std::sin(angle));
        table(t, axis * 2 * quarter + quarter + i) = S(std::cos(angle));
      }
    }
  }
  return table;
}

/// Cosines, then sines, of t · 10000^(-i/128), i < 128: (B,256).
template <class S>
void timestep_frequencies(const std::vector<S>& t, RowView<S> out) {
  const Index half = out.cols() / 2;
  for (Index b = 0; b < out.rows(); ++b) {
    for (Index i = 0; i < half; ++i) {
      const double angle = double(t[std::size_t(b)]) * std::exp(-std::log(10000.0) * double(i) / double(half));
      out(b, i) = S(std::cos(angle));
      out(b, half + i) = S(std::sin(angle));
    }
  }
}

}  // namespace dit

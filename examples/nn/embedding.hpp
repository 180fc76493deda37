// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <nn/activation.hpp>
#include <nn/linear.hpp>
#include <string>
#include <vector>

namespace nn {

using moxie::Buffer;
using moxie::Context;
using moxie::Matrix;
using moxie::Workspace;

/// The fixed position embedding of a grid of g x g patches, (g²,D). With i < D/4 and the frequency ω_i = 10000^(-i / (D/4)):
///
///     row t = sin(column ω), cos(column ω), sin(row ω), cos(row ω)        token t is at row t / g, column t % g
///
/// As in DiT (Peebles and Xie 2023). D is a multiple of 4.
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

/// Cosines, then sines, of t_b · 10000^(-i / (F/2)) for i < F/2: out (B,F), F even.
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

/// The embedding of B times: frequencies, then a perceptron.
///
///     e = silu(frequencies(t) W1ᵀ + b1) W2ᵀ + b2        (B,256) -> (B,D) -> (B,D)
template <class S>
class TimestepEmbedding {
 public:
  static constexpr Index frequencies = 256;

  struct Tape {
    Buffer<S> frequencies;  // (B,256)
    Buffer<S> hidden;       // (B,D), before the activation
    Buffer<S> active;       // (B,D), after it
  };

  /// Declares `name`.0 and `name`.2, the two linear layers.
  TimestepEmbedding(Layout& layout, const std::string& name, Index dim)
      : first_(layout, name + ".0", frequencies, dim), second_(layout, name + ".2", dim, dim) {}

  void initialize(ParameterView<S> p, const Rng& rng) const {
    first_.initialize_normal(p, rng, 0.02);
    second_.initialize_normal(p, rng, 0.02);
  }

  /// It overwrites out (B,D).
  void forward(ParameterView<const S> p, const std::vector<S>& t, RowView<S> out, Tape& tape, const Exec& exec = {}) const {
    const auto batch = Index(t.size());
    const RowView<S> frequency = tape.frequencies.matrix(batch, frequencies);
    const RowView<S> hidden = tape.hidden.matrix(batch, out.cols());
    const RowView<S> active = tape.active.matrix(batch, out.cols());
    timestep_frequencies(t, frequency);
    first_.forward(p, frequency, hidden, exec);
    activate<moxie::Silu, S>(hidden, active);
    second_.forward(p, active, out, exec);
  }

  /// Times get no gradient.
  void backward(ParameterView<const S> p, RowView<const S> dout, ParameterView<S> dp, const Tape& tape,
                const Context& context) const {
    const Index batch = dout.rows();
    const Index dim = dout.cols();
    const Workspace::Frame frame(context.workspace);
    const RowView<S> dhidden = context.workspace.matrix<S>(batch, dim);
    second_.backward(p, tape.active.view(batch, dim), dout, dhidden, dp, context.exec);
    activate_backward<moxie::Silu, S>(tape.hidden.view(batch, dim), dhidden);
    first_.backward(tape.frequencies.view(batch, frequencies), dhidden, dp, context.exec);
  }

 private:
  Linear<S> first_;
  Linear<S> second_;
};

/// A learned row of D numbers for each label: out_b += table[label_b].
template <class S>
class LabelEmbedding {
 public:
  /// Declares `name`.weight, (labels,D).
  LabelEmbedding(Layout& layout, const std::string& name, Index labels, Index dim)
      : table_(layout.add(name + ".weight", {labels, dim}, {.role = moxie::Role::embedding})) {}

  void initialize(ParameterView<S> p, const Rng& rng) const { rng.split(std::uint64_t(table_)).fill_normal(p[table_], 0.02); }

  /// Throws ValueError if a label is negative or has no row.
  void add(ParameterView<const S> p, const std::vector<Index>& labels, RowView<S> out) const {
    const RowView<const S> table = p[table_];
    for (const Index label : labels) {
      moxie::detail::expect_value(label >= 0 && label < table.rows(), "LabelEmbedding::add", "a label has no row");
    }
    for (Index b = 0; b < out.rows(); ++b) {
      out.middle_rows(b, 1).eigen() += table.middle_rows(labels[std::size_t(b)], 1).eigen();
    }
  }

  /// dtable[label_b] += dout_b, in the order of b.
  void backward(const std::vector<Index>& labels, RowView<const S> dout, ParameterView<S> dp) const {
    const RowView<S> dtable = dp[table_];
    for (Index b = 0; b < dout.rows(); ++b) {
      dtable.middle_rows(labels[std::size_t(b)], 1).eigen() += dout.middle_rows(b, 1).eigen();
    }
  }

 private:
  Index table_;
};

}  // namespace nn

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <nn/layer_norm.hpp>
#include <nn/linear.hpp>
#include <optional>
#include <string>

namespace nn {

using moxie::Context;
using moxie::Workspace;

/// Multi-head attention inside each sequence, from projected q, k, v to the heads' outputs:
///
///     P = softmax(q kᵀ / √d),   out = P v        for every sequence and head, d = D / heads
///
/// `qkv` is (T,3D): q, k and v side by side, each D = heads · d. P is not kept: backward computes it again. Sequences are
/// computed in parts, so that the P of a part, (sequences · heads, L, L), has at most `scratch` numbers.
template <class S>
struct Attention {
  Index heads;
  Index length;

  using Transpose = moxie::kernel::Transpose;
  static constexpr Index scratch = Index{1} << 22;

  void forward(RowView<const S> qkv, RowView<S> out, const Context& context) const {
    const Index d = out.cols() / heads;
    for_each_part(qkv.rows() / length, context.workspace, [&](Index first, Index pairs, RowView<S> prob) {
      probabilities(qkv, first, pairs, d, prob, context.exec);
      moxie::kernel::grouped_gemm<S>(
          pairs,
          [&](Index i) -> moxie::kernel::Product<S> {  // (L,L)(L,d) -> (L,d)
            return {length,
                    d,
                    length,
                    moxie::kernel::plain<S>(of(prob, i)),
                    operand(qkv, first + i, 2, d, Transpose::no),
                    {{head(out, first + i, 0, d), out.stride()}}};
          },
          context.exec);
    });
  }

  /// dv = Pᵀ dout, dP = dout vᵀ, dZ = softmax'(dP), dq = dZ k / √d, dk = dZᵀ q / √d; dqkv (T,3D) overwritten.
  void backward(RowView<const S> qkv, RowView<const S> dout, RowView<S> dqkv, const Context& context) const {
    using moxie::kernel::Operand;
    using moxie::kernel::Product;
    const Index d = dout.cols() / heads;
    for_each_part(qkv.rows() / length, context.workspace, [&](Index first, Index pairs, RowView<S> prob) {
      const Workspace::Frame frame(context.workspace);
      const RowView<S> dz = context.workspace.matrix<S>(prob.rows(), length);
      probabilities(qkv, first, pairs, d, prob, context.exec);
      moxie::kernel::grouped_gemm<S>(
          2 * pairs,
          [&](Index j) -> Product<S> {
            const Index i = j / 2;
            const Operand<S> outer{{head(dout, first + i, 0, d), dout.stride()}};
            if (j % 2 == 0) {  // dv: (L,L)(L,d) -> (L,d)
              return {length, d,
                      length, moxie::kernel::transposed<S>(of(prob, i)),
                      outer,  {{head(dqkv, first + i, 2, d), dqkv.stride()}}};
            }
            return {length,
                    length,
                    d,
                    outer,
                    operand(qkv, first + i, 2, d, Transpose::yes),
                    {{of(dz, i).data(), length}}};  // (L,d)(d,L)
          },
          context.exec);
      moxie::softmax_rows_backward(RowView<const S>(prob), dz, context.exec);
      scale(dz, d, pairs, context.exec);
      moxie::kernel::grouped_gemm<S>(
          2 * pairs,
          [&](Index j) -> Product<S> {
            const Index i = j / 2;
            const Operand<S> z{{of(dz, i).data(), length}, j % 2 == 1 ? Transpose::yes : Transpose::no};
            const Index other = j % 2 == 0 ? 1 : 0;  // dq needs k, dk needs q: (L,L)(L,d) -> (L,d)
            return {length,
                    d,
                    length,
                    z,
                    operand(qkv, first + i, other, d, Transpose::no),
                    {{head(dqkv, first + i, 1 - other, d), dqkv.stride()}}};
          },
          context.exec);
    });
  }

 private:
  /// Calls f(first pair, number of pairs, scratch for their P) for each part. A pair is a sequence and a head.
  template <class F>
  void for_each_part(Index sequences, Workspace& workspace, F&& f) const {
    const Index most = std::max(Index{1}, scratch / (heads * length * length));
    for (Index first = 0; first < sequences; first += most) {
      const Workspace::Frame frame(workspace);
      const Index pairs = std::min(most, sequences - first) * heads;
      f(first * heads, pairs, workspace.matrix<S>(pairs * length, length));
    }
  }
  void probabilities(RowView<const S> qkv, Index first, Index pairs, Index d, RowView<S> prob, const Exec& exec) const {
    moxie::kernel::grouped_gemm<S>(
        pairs,
        [&](Index i) -> moxie::kernel::Product<S> {  // (L,d)(d,L) -> (L,L)
          return {length,
                  length,
                  d,
                  operand(qkv, first + i, 0, d, Transpose::no),
                  operand(qkv, first + i, 1, d, Transpose::yes),
                  {{of(prob, i).data(), length}}};
        },
        exec);
    scale(prob, d, pairs, exec);
    moxie::softmax_rows(prob, exec);
  }
  void scale(RowView<S> m, Index d, Index pairs, const Exec& exec) const {
    const S factor = S(1) / std::sqrt(S(d));
    exec.parallel_for(pairs, [&](Index i) { of(m, i).eigen() *= factor; });
  }

  template <class T>
  RowView<T> of(RowView<T> prob, Index pair) const {
    return prob.middle_rows(pair * length, length);
  }
  /// Part 0, 1, 2 (q, k, v) of a pair (sequence, head).
  template <class T>
  T* head(RowView<T> m, Index pair, Index part, Index d) const {
    return m.row(pair / heads * length) + part * heads * d + pair % heads * d;
  }
  moxie::kernel::Operand<S> operand(RowView<const S> qkv, Index pair, Index part, Index d, Transpose transpose) const {
    return {{head(qkv, pair, part, d), qkv.stride()}, transpose};
  }
};

/// Self-attention with its projections, x (T,D) -> (T,D):
///
///     q, k, v = x Wᵀ + b,   out = attention(q, k, v) Woᵀ + bo
///
/// With `qk_norm` a `LayerNorm` normalizes each head's q and k, as in the large models of DiT-MoE, where the tensors have other
/// names.
template <class S>
class SelfAttention {
 public:
  struct Tape {
    Buffer<S> qkv;       // (T,3D), normalized
    Buffer<S> attended;  // (T,D)
    typename LayerNorm<S>::Tape q, k;
  };

  SelfAttention(Layout& layout, const std::string& name, Index dim, Index heads, Index length, bool qk_norm)
      : attention_{heads, length},
        qkv_(layout, name + (qk_norm ? "Wqkv" : "qkv"), dim, 3 * dim),
        projection_(layout, name + (qk_norm ? "out_proj" : "proj"), dim, dim) {
    if (qk_norm) {
      q_norm_.emplace(layout, name + "q_norm", dim / heads);
      k_norm_.emplace(layout, name + "k_norm", dim / heads);
    }
  }

  void initialize(ParameterView<S> p, const Rng& rng) const {
    qkv_.initialize(p, rng);
    projection_.initialize(p, rng);
    if (q_norm_) {
      q_norm_->initialize(p);
      k_norm_->initialize(p);
    }
  }

  void forward(ParameterView<const S> p, RowView<const S> x, RowView<S> out, Tape& tape, const Context& context) const {
    const Index dim = x.cols();
    const RowView<S> qkv = tape.qkv.matrix(x.rows(), 3 * dim);
    const RowView<S> attended = tape.attended.matrix(x.rows(), dim);
    qkv_.forward(p, x, qkv, context.exec);
    if (q_norm_) {
      q_norm_->forward(p, part(qkv, 0, dim), part(qkv, 0, dim), tape.q, context.exec);
      k_norm_->forward(p, part(qkv, 1, dim), part(qkv, 1, dim), tape.k, context.exec);
    }
    attention_.forward(qkv, attended, context);
    projection_.forward(p, attended, out, context.exec);
  }

  /// dx overwritten, parameter gradients added to.
  void backward(ParameterView<const S> p, RowView<const S> x, RowView<const S> dout, RowView<S> dx, ParameterView<S> dp,
                const Tape& tape, const Context& context) const {
    const Index dim = x.cols();
    const Workspace::Frame frame(context.workspace);
    const RowView<S> dqkv = context.workspace.matrix<S>(x.rows(), 3 * dim);
    projection_.backward(p, tape.attended.view(x.rows(), dim), dout, dx, dp, context.exec);
    attention_.backward(tape.qkv.view(x.rows(), 3 * dim), dx, dqkv, context);
    if (q_norm_) {
      q_norm_->backward(p, part(dqkv, 0, dim), part(dqkv, 0, dim), dp, tape.q, context.exec);
      k_norm_->backward(p, part(dqkv, 1, dim), part(dqkv, 1, dim), dp, tape.k, context.exec);
    }
    qkv_.backward(p, x, dqkv, dx, dp, context.exec);
  }

 private:
  static RowView<S> part(RowView<S> qkv, Index i, Index dim) { return {qkv.data() + i * dim, qkv.rows(), dim, qkv.stride()}; }

  Attention<S> attention_;
  Linear<S> qkv_;
  Linear<S> projection_;
  std::optional<LayerNorm<S>> q_norm_;
  std::optional<LayerNorm<S>> k_norm_;
};

}  // namespace nn

// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <moxie/moxie.hpp>
#include <string>
#include <utility>
#include <vector>

/// The parts of a transformer that are not mixtures of experts. Each has its backward beside it.
///
/// Rows are tokens: B sequences of L tokens of width D are a matrix (T,D) with T = B·L. A part declares its tensors in the
/// model's layout. Its `backward` overwrites the gradient of its input, or adds where it says so, and it adds to the gradients
/// of its parameters.
namespace nn {

using moxie::Exec;
using moxie::Index;
using moxie::Layout;
using moxie::ParameterView;
using moxie::Rng;
using moxie::RowView;

/// y = x Wᵀ + b, with W (out,in) and b (out).
template <class S>
class Linear {
 public:
  /// Declares `name`.weight and `name`.bias.
  Linear(Layout& layout, const std::string& name, Index in, Index out) : Linear(layout, name, {out, in}, out) {}
  /// The weight has another shape, whose rows are the outputs: a convolution over disjoint patches has (out,C,p,p).
  Linear(Layout& layout, const std::string& name, std::vector<Index> shape, Index out)
      : weight_(layout.add(name + ".weight", std::move(shape))),
        bias_(layout.add(name + ".bias", {out}, {.role = moxie::Role::bias})) {}

  /// Glorot's uniform initialization: W from ±√(6 / (in + out)). The bias is left as it is.
  void initialize(ParameterView<S> p, const Rng& rng) const {
    const RowView<S> w = p[weight_];
    const double bound = std::sqrt(6.0 / double(w.rows() + w.cols()));
    rng.split(std::uint64_t(weight_)).fill_uniform(w, -bound, bound);
  }
  /// W becomes normal with this standard deviation. The bias is left as it is.
  void initialize_normal(ParameterView<S> p, const Rng& rng, double deviation) const {
    rng.split(std::uint64_t(weight_)).fill_normal(p[weight_], deviation);
  }

  /// y (n,out) from x (n,in). It overwrites y.
  void forward(ParameterView<const S> p, RowView<const S> x, RowView<S> y, const Exec& exec = {}) const {
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

  /// dW += dyᵀ x, db += Σ dy over the rows. The first layer of a model needs no dx.
  void backward(RowView<const S> x, RowView<const S> dy, ParameterView<S> dp, const Exec& exec = {}) const {
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
  /// The same, and dx = dy W; with `add`, dx += dy W.
  void backward(ParameterView<const S> p, RowView<const S> x, RowView<const S> dy, RowView<S> dx, ParameterView<S> dp,
                const Exec& exec = {}, bool add = false) const {
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

}  // namespace nn

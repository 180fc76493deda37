// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/cuda/plan.hpp>
#include <moxie/cuda/random.hpp>
#include <moxie/kernel/write.hpp>
#include <moxie/routing/config.hpp>
#include <moxie/routing/formula.hpp>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

namespace detail {

template <class Scalar>
MOXIE_HOST_DEVICE bool finite(Scalar x) {
  return x - x == Scalar(0);
}

// What a status is, but the first token whose logits are not finite.
inline constexpr int all_finite = largest_int;
inline constexpr int bad_bias = -1;

/// x Wᵀ of all tokens, into `to` (T,E).
template <class Scalar>
void linear(DeviceExec& exec, DeviceRows<const Scalar> x, const Scalar* weight, DeviceRows<Scalar> to) {
  multiply<Scalar, Scalar>(exec, {.m = x.rows,
                                  .n = to.cols,
                                  .k = x.cols,
                                  .a = block_of(x, 0),
                                  .b = block_of(DeviceRows<const Scalar>(weight, to.cols, x.cols), 0, true),
                                  .c = block_of(to, 0)});
}
/// A result, and whether it is added to what is there.
template <class T>
struct Result {
  T to;
  kernel::Write write;
  bool adds() const { return write == kernel::Write::add; }
};

/// dW = dzᵀ x, dx = dz W, or added to what is there.
template <class Scalar>
void linear_backward(DeviceExec& exec, DeviceRows<const Scalar> x, const Scalar* weight, DeviceRows<const Scalar> dz,
                     const Result<DeviceRows<Scalar>>& dx, const Result<Scalar*>& dweight) {
  multiply<Scalar, Scalar>(exec, {.m = dz.cols,
                                  .n = x.cols,
                                  .k = x.rows,
                                  .a = block_of(dz, 0, true),
                                  .b = block_of(x, 0),
                                  .c = block_of(DeviceRows<Scalar>(dweight.to, dz.cols, x.cols), 0),
                                  .add = dweight.adds()});
  multiply<Scalar, Scalar>(exec, {.m = x.rows,
                                  .n = x.cols,
                                  .k = dz.cols,
                                  .a = block_of(dz, 0),
                                  .b = block_of(DeviceRows<const Scalar>(weight, dz.cols, x.cols), 0),
                                  .c = block_of(dx.to, 0),
                                  .add = dx.adds()});
}

struct SetStatus {
  int* status;
  MOXIE_HOST_DEVICE void operator()(Index /*one*/) const { *status = all_finite; }
};
/// What a forward found of its logits, on the device.
class LogitStatus {
 public:
  /// Where the rows of the next forward tell it: all is finite so far.
  template <class Scalar>
  int* reset(DeviceExec& exec, const DeviceTokens<Scalar>& in) {
    rows_.assign(in.rows.begin(), in.rows.end());
    int* status = status_.resize(exec, 1);
    exec.for_each(1, SetStatus{status});
    return status;
  }
  /// Throws ValueError naming the first token whose logits are not finite. Waits for the device.
  void expect_finite(DeviceExec& exec, std::string_view where) const {
    int first_bad = all_finite;
    if (status_.size() > 0) {
      exec.read(status_.data(), &first_bad, 1);
    }
    expect_finite(where, first_bad);
  }
  /// The same of a status that has been read.
  void expect_finite(std::string_view where, int first_bad) const {
    expect_value(first_bad != bad_bias, where, "the selection bias is not finite");
    if (first_bad != all_finite) {
      const int token = rows_.empty() ? first_bad : rows_[std::size_t(first_bad)];
      throw ValueError(std::string(where) + ": the logits of token " + std::to_string(token) + " are not finite");
    }
  }

 private:
  DeviceBuffer<int> status_;
  std::vector<int> rows_;  // where tokens stand in the x that the layer was given
};

}  // namespace detail

/// z' = z + σ/E n, n given or drawn.
template <class Scalar>
struct AddNoise {
  DeviceRows<const Scalar> z;
  DeviceRows<const Scalar> noise;  // no rows: drawn
  DeviceRng rng;
  double deviation;
  Scalar* to;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const double n = noise.rows > 0 ? double(noise(i / z.cols, i % z.cols)) : rng.normal(std::uint64_t(i));
    to[i] = z.data[i] + Scalar(deviation * n);
  }
};
/// x ⊙ j, j uniform on (1-ε, 1+ε).
template <class Scalar>
struct JitterRow {
  DeviceRows<const Scalar> x;
  DeviceRng rng;
  double jitter;
  DeviceRows<Scalar> factor;
  DeviceRows<Scalar> input;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    for (Index d = lanes.first(); d < x.cols; d += lanes.step()) {
      factor(t, d) = Scalar(formula::jitter_factor(jitter, rng.uniform(std::uint64_t(t * x.cols + d))));
      input(t, d) = x(t, d) * factor(t, d);
    }
  }
};
/// dx += dinput ⊙ j.
template <class Scalar>
struct JitterBackwardRow {
  DeviceRows<const Scalar> factor;
  DeviceRows<const Scalar> dinput;
  DeviceRows<Scalar> dx;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    for (Index d = lanes.first(); d < dx.cols; d += lanes.step()) {
      dx(t, d) += dinput(t, d) * factor(t, d);
    }
  }
};

/// `moxie::Gate` on the device: logits x Wᵀ; in training with jitter on x and noise on the logits, the numbers of the CPU's.
template <class Scalar>
class Gate {
 public:
  class Tape {
   public:
    /// z (T,E) without noise, and z', the same where there is none.
    DeviceRows<const Scalar> logits() const { return logits_; }
    DeviceRows<const Scalar> noisy_logits() const { return noisy_; }
    bool noisy() const { return noisy_.data != logits_.data; }

   private:
    friend class Gate;
    DeviceRows<const Scalar> logits_, noisy_;
    DeviceRows<const Scalar> input_, factor_;  // of jitter
    DeviceBuffer<Scalar> logits_buffer_, noisy_buffer_, input_buffer_, factor_buffer_;
  };

  Gate(Index model_dim, Index experts, const GateNoise& noise) : model_dim_(model_dim), experts_(experts), noise_(noise) {}

  /// σ/E.
  double deviation() const { return noise_.logits / double(experts_); }

  /// Throws ShapeError for noise of another shape, where there is some to add.
  void forward(DeviceExec& exec, std::string_view where, const Scalar* weight, const DeviceTokens<Scalar>& in,
               Tape& tape) const {
    const Index tokens = in.count();
    const Index n = tokens * experts_;
    const Index room = in.room() * experts_;
    if (in.training && noise_.logits > 0 && in.noise.rows != 0 && in.noise.cols != experts_) {
      throw ShapeError(std::string(where) + ": noise is " + moxie::detail::dimensions(in.noise.rows, in.noise.cols) +
                       ", expected " + moxie::detail::dimensions(tokens, experts_));
    }
    DeviceRows<const Scalar> x = in.x;
    tape.factor_ = {};
    if (in.training && noise_.jitter > 0) {
      const auto rows = [&](DeviceBuffer<Scalar>& buffer) {
        return DeviceRows<Scalar>(buffer.resize(exec, tokens * model_dim_, in.room() * model_dim_), tokens, model_dim_);
      };
      const DeviceRows<Scalar> factor = rows(tape.factor_buffer_);
      const DeviceRows<Scalar> input = rows(tape.input_buffer_);
      exec.for_each_row(tokens, JitterRow<Scalar>{in.x, in.rng.split(0), noise_.jitter, factor, input});
      tape.factor_ = factor;
      x = tape.input_ = input;
    }
    const DeviceRows<Scalar> z(tape.logits_buffer_.resize(exec, n, room), tokens, experts_);
    detail::linear<Scalar>(exec, x, weight, z);
    tape.logits_ = tape.noisy_ = z;
    if (in.training && noise_.logits > 0) {
      const DeviceRows<Scalar> noisy(tape.noisy_buffer_.resize(exec, n, room), tokens, experts_);
      exec.for_each(n, AddNoise<Scalar>{z, in.noise, in.rng.split(1), deviation(), noisy.data});
      tape.noisy_ = noisy;
    }
  }

  /// From the sum of the gradients of z and z'; adds to dx and to dW.
  void backward(DeviceExec& exec, const Scalar* weight, const DeviceTokens<Scalar>& in, DeviceRows<const Scalar> dz,
                const DeviceGradient<Scalar>& into, const Tape& tape) const {
    using kernel::Write;
    if (tape.factor_.data == nullptr) {
      detail::linear_backward<Scalar>(exec, in.x, weight, dz, {into.x, Write::add}, {into.parameters, Write::add});
      return;
    }
    const DeviceExec::Frame frame(exec);
    const DeviceRows<Scalar> dinput(exec.scratch<Scalar>(in.room() * model_dim_), in.count(), model_dim_);
    detail::linear_backward<Scalar>(exec, tape.input_, weight, dz, {dinput, Write::replace}, {into.parameters, Write::add});
    exec.for_each_row(in.count(), JitterBackwardRow<Scalar>{tape.factor_, dinput, into.x});
  }

 private:
  Index model_dim_;
  Index experts_;
  GateNoise noise_;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

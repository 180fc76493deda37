// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/cuda/functor.hpp>
#include <moxie/cuda/supported.hpp>
#include <moxie/expert/config.hpp>
#include <moxie/kernel/gated_unit.hpp>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

/// The rows of a bank: row r is x_{index[r]}, or x_r where there is no index, and belongs to `expert[r]`, or to the only one.
template <class Scalar>
struct GroupedRows {
  Groups groups;
  DeviceRows<const Scalar> x;
  const int* index = nullptr;
  const int* expert = nullptr;
  Index most = 0;  ///< rows that there may be in other steps of the same shape

  Index count() const { return groups.rows(); }
  /// What memory is taken for, so that it does not grow from step to step.
  Index room() const { return most > count() ? most : count(); }
};

namespace detail {

/// One tensor of every expert in a block.
struct BankTensor {
  Index offset = 0;
  Index rows = 0;
  Index cols = 0;
  Index distance = 0;

  template <class T>
  DeviceRows<T> first(T* block) const {
    return {block + offset, rows, cols};
  }
  template <class T>
  Series<T> series(T* block, bool transposed = false) const {
    return block_of(first(block), distance, transposed);
  }
};
/// Tensor `i` of an expert's `count`, in a layout that repeats them.
inline BankTensor bank_tensor(const Layout& layout, Index i, Index count) {
  const auto& tensors = layout.tensors();
  const TensorInfo& t = tensors[std::size_t(i)];
  const bool several = Index(tensors.size()) > count;
  const Index offset = device_offset(layout, i);
  return {offset, t.rows, t.cols, several ? device_offset(layout, i + count) - offset : 0};
}

template <class From, class To>
struct Convert {
  const From* from;
  To* to;
  MOXIE_HOST_DEVICE void operator()(Index i) const { to[i] = To(from[i]); }
};
/// A vector of each expert, from equal distances to one after the other.
template <class T>
struct CopyVectors {
  const T* from;
  Index distance;
  Index size;
  T* to;
  MOXIE_HOST_DEVICE void operator()(Index i) const { to[i] = from[i / size * distance + i % size]; }
};
/// A block as Elements: itself, or rounded into scratch.
template <class Element, class Scalar>
const Element* as_elements(DeviceExec& exec, const Scalar* block, Index size) {
  if constexpr (std::is_same_v<Element, Scalar>) {
    return block;
  } else {
    Element* out = exec.scratch<Element>(size);
    exec.for_each(size, Convert<Scalar, Element>{block, out});
    return out;
  }
}

}  // namespace detail

/// What a bank keeps of a forward.
template <class Element>
struct BankTape {
  DeviceBuffer<Element> rows;    // gathered, where they are not x as it is
  DeviceBuffer<Element> before;  // what the activation was given
};

namespace detail {

/// The rows as products read them: x itself where that will do, else gathered onto the tape.
template <class Element, class Scalar>
DeviceRows<const Element> gathered(DeviceExec& exec, const GroupedRows<Scalar>& in, BankTape<Element>& tape) {
  if constexpr (std::is_same_v<Element, Scalar>) {
    if (in.index == nullptr) {
      return in.x;
    }
  }
  const DeviceRows<Element> rows(tape.rows.resize(exec, in.count() * in.x.cols, in.room() * in.x.cols), in.count(), in.x.cols);
  exec.for_each_row(in.count(), rows.cols, GatherRow<Scalar, Element>{in.x, in.index, rows});
  return rows;
}
/// Those of a forward.
template <class Element, class Scalar>
DeviceRows<const Element> kept_rows(const GroupedRows<Scalar>& in, const BankTape<Element>& tape) {
  if constexpr (std::is_same_v<Element, Scalar>) {
    if (in.index == nullptr) {
      return in.x;
    }
  }
  return {tape.rows.data(), in.count(), in.x.cols};
}

}  // namespace detail

/// What `moxie::GluExperts` is on the CPU: f(x) = unit(x Wgᵀ, x Wuᵀ) Wdᵀ, the same tensors and options, but no biases. With
/// Element = BFloat16, rows, weights and hidden values are rounded to it where products read them; sums, parameters, their
/// gradients, x and y are float.
///
/// Keeps R(D + 2H) Elements. Forward: a gather, 2 products and a loop (3 where the gate and up matrices of an expert do not
/// touch, H·D not a multiple of 16); backward 4 products and a loop (6), none of them for an expert alone.
template <class Scalar_, class Unit_, class Element_ = Scalar_>
class GluExperts {
 public:
  using Scalar = Scalar_;
  using Element = Element_;
  using Unit = GatedUnitOf<Unit_>;
  using Config = GluConfig<std::conditional_t<std::is_empty_v<Unit>, void, Unit>>;
  using Tape = BankTape<Element>;

  GluExperts(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : experts_(experts),
        hidden_(config.hidden_dim),
        layout_(glu_layout(experts, model_dim, {config.hidden_dim, config.bias}, names)) {
    expect_supported(config);
    if constexpr (requires { config.unit; }) {
      unit_ = config.unit;
      unit_.template expect_valid<Scalar>("GluExperts");
    }
    gate_ = detail::bank_tensor(layout_, 0, 3);
    up_ = detail::bank_tensor(layout_, 1, 3);
    down_ = detail::bank_tensor(layout_, 2, 3);
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return down_.rows; }
  Index hidden_dim() const { return hidden_; }

  /// Weights as products read them: half the memory with BFloat16.
  class Frozen {
    friend class GluExperts;
    DeviceBuffer<Element> weights_;
  };
  Frozen freeze(DeviceExec& exec, const Scalar* p) const {
    Frozen frozen;
    exec.for_each(layout_.size(), detail::Convert<Scalar, Element>{p, frozen.weights_.resize(exec, layout_.size())});
    return frozen;
  }

  /// h (R,D) of the rows, overwritten.
  void forward(DeviceExec& exec, const Scalar* p, const GroupedRows<Scalar>& in, DeviceRows<Scalar> h, Tape& tape) const {
    const DeviceExec::Frame frame(exec);
    run(exec, detail::as_elements<Element>(exec, p, layout_.size()), in, h, tape);
  }
  /// Bit-identical. Nothing is kept for a backward: the tape is scratch.
  void forward(DeviceExec& exec, const Frozen& frozen, const GroupedRows<Scalar>& in, DeviceRows<Scalar> h, Tape& tape) const {
    run(exec, frozen.weights_.data(), in, h, tape);
  }

  /// drows (R,D), overwritten; gradients of the parameters are added. From the dh (R,D) of a forward's h, and its tape.
  void backward(DeviceExec& exec, const Scalar* p, const GroupedRows<Scalar>& in, DeviceRows<const Element> dh,
                const DeviceGradient<Scalar>& into, const Tape& tape) const {
    const DeviceRows<Scalar> drows = into.x;
    Scalar* const grads = into.parameters;
    using Sum = SumOf<Element>;
    const Index rows = in.count();
    const DeviceExec::Frame frame(exec);
    const Element* weights = detail::as_elements<Element>(exec, p, layout_.size());
    const DeviceRows<const Element> x = detail::kept_rows(in, tape);
    const DeviceRows<const Element> gate_up(tape.before.data(), rows, 2 * hidden_);
    const DeviceRows<Sum> dhidden(exec.scratch<Sum>(in.room() * hidden_), rows, hidden_);
    const DeviceRows<Element> hidden(exec.scratch<Element>(in.room() * hidden_), rows, hidden_);
    const DeviceRows<Element> dgate_up(exec.scratch<Element>(in.room() * 2 * hidden_), rows, 2 * hidden_);
    multiply<Element, Sum>(
        exec, in.groups,
        {.m = of_group, .n = hidden_, .k = model_dim(), .a = rows_of(dh), .b = down_.series(weights), .c = rows_of(dhidden)});
    exec.for_each_row(rows, hidden.cols, GluBackwardRow<Unit, Element>{gate_up, dhidden, hidden, dgate_up, unit_});
    multiply<Element, Scalar>(exec, in.groups,
                              {.m = model_dim(),
                               .n = hidden_,
                               .k = of_group,
                               .a = rows_of(dh, true),
                               .b = rows_of(DeviceRows<const Element>(hidden)),
                               .c = down_.series(grads),
                               .add = true});
    bool add = false;
    for_each_half(dgate_up, [&](const detail::BankTensor& weight, DeviceRows<const Element> part) {
      multiply<Element, Scalar>(exec, in.groups,
                                {.m = of_group,
                                 .n = model_dim(),
                                 .k = part.cols,
                                 .a = rows_of(part),
                                 .b = weight.series(weights),
                                 .c = rows_of(drows),
                                 .add = add});
      add = true;
      multiply<Element, Scalar>(exec, in.groups,
                                {.m = part.cols,
                                 .n = model_dim(),
                                 .k = of_group,
                                 .a = rows_of(part, true),
                                 .b = rows_of(x),
                                 .c = weight.series(grads),
                                 .add = true});
    });
  }

 private:
  static constexpr Index of_group = Product<Element, Scalar>::of_group;

  void run(DeviceExec& exec, const Element* weights, const GroupedRows<Scalar>& in, DeviceRows<Scalar> h, Tape& tape) const {
    const Index rows = in.count();
    const DeviceExec::Frame frame(exec);
    const DeviceRows<const Element> x = detail::gathered(exec, in, tape);
    const DeviceRows<Element> gate_up(tape.before.resize(exec, rows * 2 * hidden_, in.room() * 2 * hidden_), rows, 2 * hidden_);
    for_each_half(gate_up, [&](const detail::BankTensor& weight, DeviceRows<Element> part) {
      multiply<Element, Element>(exec, in.groups,
                                 {.m = of_group,
                                  .n = part.cols,
                                  .k = model_dim(),
                                  .a = rows_of(x),
                                  .b = weight.series(weights, true),
                                  .c = rows_of(part)});
    });
    const DeviceRows<Element> hidden(exec.scratch<Element>(in.room() * hidden_), rows, hidden_);
    exec.for_each_row(rows, hidden.cols, GluRow<Unit, Element>{gate_up, hidden, unit_});
    multiply<Element, Scalar>(exec, in.groups,
                              {.m = of_group,
                               .n = model_dim(),
                               .k = hidden_,
                               .a = rows_of(DeviceRows<const Element>(hidden)),
                               .b = down_.series(weights, true),
                               .c = rows_of(h)});
  }

  /// Gate and up as one matrix where they touch, else one after the other.
  template <class F>
  void for_each_half(DeviceRows<Element> both, const F& f) const {
    if (up_.offset == gate_.offset + hidden_ * model_dim()) {
      f(detail::BankTensor{gate_.offset, 2 * hidden_, model_dim(), gate_.distance}, both);
    } else {
      f(gate_, both.middle_cols(0, hidden_));
      f(up_, both.middle_cols(hidden_, hidden_));
    }
  }

  Index experts_;
  Index hidden_;
  Unit unit_ = {};
  Layout layout_;
  detail::BankTensor gate_, up_, down_;
};

/// What `moxie::MlpExperts` is on the CPU: f(x) = act(x W1ᵀ + b1) W2ᵀ + b2.
///
/// Keeps R(D + H) Elements. Forward: a gather, 2 products and 2 loops; backward 4 products and 5 loops, none of them for an
/// expert alone.
template <class Scalar_, class Activation, class Element_ = Scalar_>
class MlpExperts {
 public:
  using Scalar = Scalar_;
  using Element = Element_;
  using Config = HiddenConfig;
  using Tape = BankTape<Element>;

  MlpExperts(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : experts_(experts), hidden_(config.hidden_dim), layout_(mlp_layout(experts, model_dim, config, names)) {
    fc1_ = detail::bank_tensor(layout_, 0, 4);
    bias1_ = detail::bank_tensor(layout_, 1, 4);
    fc2_ = detail::bank_tensor(layout_, 2, 4);
    bias2_ = detail::bank_tensor(layout_, 3, 4);
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return experts_; }
  Index model_dim() const { return fc2_.rows; }
  Index hidden_dim() const { return hidden_; }

  /// Weights as products read them, and biases as they are.
  class Frozen {
    friend class MlpExperts;
    DeviceBuffer<Element> weights_;
    DeviceBuffer<Scalar> bias1_, bias2_;
  };
  Frozen freeze(DeviceExec& exec, const Scalar* p) const {
    Frozen frozen;
    exec.for_each(layout_.size(), detail::Convert<Scalar, Element>{p, frozen.weights_.resize(exec, layout_.size())});
    const auto copy = [&](const detail::BankTensor& bias, Index size, DeviceBuffer<Scalar>& to) {
      exec.for_each(experts_ * size,
                    detail::CopyVectors<Scalar>{p + bias.offset, bias.distance, size, to.resize(exec, experts_ * size)});
    };
    copy(bias1_, hidden_, frozen.bias1_);
    copy(bias2_, model_dim(), frozen.bias2_);
    return frozen;
  }

  void forward(DeviceExec& exec, const Scalar* p, const GroupedRows<Scalar>& in, DeviceRows<Scalar> h, Tape& tape) const {
    const DeviceExec::Frame frame(exec);
    run(exec, detail::as_elements<Element>(exec, p, layout_.size()), {p + bias1_.offset, bias1_.distance, in.expert},
        {p + bias2_.offset, bias2_.distance, in.expert}, in, h, tape);
  }
  void forward(DeviceExec& exec, const Frozen& frozen, const GroupedRows<Scalar>& in, DeviceRows<Scalar> h, Tape& tape) const {
    run(exec, frozen.weights_.data(), {frozen.bias1_.data(), hidden_, in.expert},
        {frozen.bias2_.data(), model_dim(), in.expert}, in, h, tape);
  }

  void backward(DeviceExec& exec, const Scalar* p, const GroupedRows<Scalar>& in, DeviceRows<const Element> dh,
                const DeviceGradient<Scalar>& into, const Tape& tape) const {
    const DeviceRows<Scalar> drows = into.x;
    Scalar* const grads = into.parameters;
    using Sum = SumOf<Element>;
    const Index rows = in.count();
    const DeviceExec::Frame frame(exec);
    const Element* weights = detail::as_elements<Element>(exec, p, layout_.size());
    const DeviceRows<const Element> x = detail::kept_rows(in, tape);
    const DeviceRows<const Element> a(tape.before.data(), rows, hidden_);
    const DeviceRows<Sum> dhidden(exec.scratch<Sum>(in.room() * hidden_), rows, hidden_);
    const DeviceRows<Element> hidden(exec.scratch<Element>(in.room() * hidden_), rows, hidden_);
    const DeviceRows<Element> da(exec.scratch<Element>(in.room() * hidden_), rows, hidden_);
    multiply<Element, Sum>(
        exec, in.groups,
        {.m = of_group, .n = hidden_, .k = model_dim(), .a = rows_of(dh), .b = fc2_.series(weights), .c = rows_of(dhidden)});
    exec.for_each_row(rows, hidden.cols, MlpBackwardRow<Activation, Element>{a, dhidden, hidden, da});
    const DeviceRows<const Element> da_read = da;
    multiply<Element, Scalar>(
        exec, in.groups,
        {.m = of_group, .n = model_dim(), .k = hidden_, .a = rows_of(da_read), .b = fc1_.series(weights), .c = rows_of(drows)});
    multiply<Element, Scalar>(exec, in.groups,
                              {.m = model_dim(),
                               .n = hidden_,
                               .k = of_group,
                               .a = rows_of(dh, true),
                               .b = rows_of(DeviceRows<const Element>(hidden)),
                               .c = fc2_.series(grads),
                               .add = true});
    multiply<Element, Scalar>(exec, in.groups,
                              {.m = hidden_,
                               .n = model_dim(),
                               .k = of_group,
                               .a = rows_of(da_read, true),
                               .b = rows_of(x),
                               .c = fc1_.series(grads),
                               .add = true});
    const auto add_sums = [&](const detail::BankTensor& bias, DeviceRows<const Element> rows_summed) {
      column_sums<Sum>(exec, in.groups, rows_summed.cols, ElementOf<Sum, Element>{rows_summed},
                       GroupRows<Scalar>{grads + bias.offset, bias.distance, kernel::Write::add}, in.room());
    };
    add_sums(bias1_, da);
    add_sums(bias2_, dh);
  }

 private:
  static constexpr Index of_group = Product<Element, Scalar>::of_group;

  void run(DeviceExec& exec, const Element* weights, const BiasOfRow<const Scalar>& bias1, const BiasOfRow<const Scalar>& bias2,
           const GroupedRows<Scalar>& in, DeviceRows<Scalar> h, Tape& tape) const {
    const Index rows = in.count();
    const DeviceExec::Frame frame(exec);
    const DeviceRows<const Element> x = detail::gathered(exec, in, tape);
    const DeviceRows<Element> a(tape.before.resize(exec, rows * hidden_, in.room() * hidden_), rows, hidden_);
    multiply<Element, Element>(
        exec, in.groups,
        {.m = of_group, .n = hidden_, .k = model_dim(), .a = rows_of(x), .b = fc1_.series(weights, true), .c = rows_of(a)});
    const DeviceRows<Element> hidden(exec.scratch<Element>(in.room() * hidden_), rows, hidden_);
    exec.for_each_row(rows, hidden.cols, MlpRow<Activation, Element, Scalar>{a, bias1, hidden});
    multiply<Element, Scalar>(exec, in.groups,
                              {.m = of_group,
                               .n = model_dim(),
                               .k = hidden_,
                               .a = rows_of(DeviceRows<const Element>(hidden)),
                               .b = fc2_.series(weights, true),
                               .c = rows_of(h)});
    exec.for_each_row(rows, h.cols, AddBiasRow<Scalar>{h, bias2});
  }

  Index experts_;
  Index hidden_;
  Layout layout_;
  detail::BankTensor fc1_, bias1_, fc2_, bias2_;
};

template <class Scalar, class Element = Scalar>
using SwiGluExperts = GluExperts<Scalar, Silu, Element>;
template <class Scalar, class Element = Scalar>
using GegluTanhExperts = GluExperts<Scalar, GeluTanh, Element>;
template <class Scalar, class Element = Scalar>
using GegluErfExperts = GluExperts<Scalar, GeluErf, Element>;
template <class Scalar, class Element = Scalar>
using ReGluExperts = GluExperts<Scalar, Relu, Element>;
template <class Scalar, class Element = Scalar>
using ClampedSwiGluExperts = GluExperts<Scalar, ClampedSwiGlu, Element>;
template <class Scalar, class Element = Scalar>
using SwiGluClampedAfterExperts = GluExperts<Scalar, SwiGluClampedAfter, Element>;
template <class Scalar, class Element = Scalar>
using SoftCappedSwiGluExperts = GluExperts<Scalar, SoftCappedSwiGlu, Element>;
template <class Scalar, class Element = Scalar>
using GeluTanhExperts = MlpExperts<Scalar, GeluTanh, Element>;
template <class Scalar, class Element = Scalar>
using GeluErfExperts = MlpExperts<Scalar, GeluErf, Element>;
template <class Scalar, class Element = Scalar>
using ReluSquaredExperts = MlpExperts<Scalar, ReluSquared, Element>;

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

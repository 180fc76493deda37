// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/cuda/top_k.hpp>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

namespace detail {

/// The rows of slots: slot n of sequence b is row (n / S · B + b) S + n % S of the experts'.
struct SlotRow {
  int sequences;
  int experts;
  int slot_count;    // of an expert
  int* row_of_slot;  // of (b, n)
  int* slot_of_row;
  int* expert_of_row;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const int all = experts * slot_count;
    const int b = int(i) / all;
    const int n = int(i) % all;
    const int row = (n / slot_count * sequences + b) * slot_count + n % slot_count;
    row_of_slot[i] = row;
    slot_of_row[row] = int(i);
    expert_of_row[row] = n / slot_count;
  }
};

}  // namespace detail

/// A dense plan on the device: weights D and C (T,N) of all tokens and slots, as in `moxie::DensePlan`.
template <class Scalar>
class DensePlan {
 public:
  /// Sets the shape; the router then fills `dispatch()` and `combine()`.
  void resize(DeviceExec& exec, const DeviceSequences& sequences, Index experts, Index slots_per_expert) {
    const Index slot_count = experts * slots_per_expert;
    const Index count = sequences.count();
    const Index rows = detail::to_index("DensePlan", count * slot_count);
    dispatch_.resize(exec, sequences.tokens() * slot_count, sequences.room() * slot_count);
    combine_.resize(exec, sequences.tokens() * slot_count, sequences.room() * slot_count);
    tokens_ = sequences.tokens();
    const bool same = sequences_ == count && slots_ == slot_count && Index(starts_.size()) == experts + 1;
    slots_ = slot_count;
    if (same) {
      return;
    }
    sequences_ = -1;  // nothing is known if this throws
    starts_.clear();
    for (Index e = 0; e <= experts; ++e) {
      starts_.push_back(int(e * count * slots_per_expert));
    }
    exec.upload(starts_.data(), device_starts_.resize(exec, experts + 1), experts + 1);
    exec.for_each(rows, detail::SlotRow{int(count), int(experts), int(slots_per_expert), row_of_slot_.resize(exec, rows),
                                        slot_of_row_.resize(exec, rows), expert_.resize(exec, rows)});
    sequences_ = count;
  }

  /// No plan.
  void clear() {
    tokens_ = 0;
    slots_ = 0;
    sequences_ = -1;
    starts_.assign(1, 0);
  }

  Index tokens() const { return tokens_; }
  Index experts() const { return Index(starts_.size()) - 1; }
  /// N.
  Index slot_count() const { return slots_; }
  /// B·N, of all steps of a shape.
  Index rows() const { return starts_.back(); }
  Index room() const { return rows(); }
  Groups groups() const { return {starts_, device_starts_.data()}; }
  const int* expert() const { return expert_.data(); }
  const int* slot_of_row() const { return slot_of_row_.data(); }
  const int* row_of_slot() const { return row_of_slot_.data(); }
  DeviceRows<Scalar> dispatch() { return {dispatch_.data(), tokens_, slots_}; }
  DeviceRows<Scalar> combine() { return {combine_.data(), tokens_, slots_}; }
  DeviceRows<const Scalar> dispatch() const { return {dispatch_.data(), tokens_, slots_}; }
  DeviceRows<const Scalar> combine() const { return {combine_.data(), tokens_, slots_}; }

 private:
  Index tokens_ = 0;
  Index slots_ = 0;
  Index sequences_ = -1;
  std::vector<int> starts_{0};
  DeviceBuffer<int> device_starts_, row_of_slot_, slot_of_row_, expert_;
  DeviceBuffer<Scalar> dispatch_, combine_;
};

/// v̂ = r v, r = 1 / √(Σ v² + 1e-6).
template <class Scalar>
struct NormalizeRow {
  DeviceRows<const Scalar> v;
  DeviceRows<Scalar> hat;
  Scalar* factor;

  MOXIE_HOST_DEVICE void operator()(Index i, auto lanes) const {
    Scalar sum = 0;
    for (Index d = lanes.first(); d < v.cols; d += lanes.step()) {
      sum += v(i, d) * v(i, d);
    }
    const Scalar r = formula::l2norm_factor(lanes.sum(sum));  // NaN, where it is, is what the logits then show
    for (Index d = lanes.first(); d < v.cols; d += lanes.step()) {
      hat(i, d) = r * v(i, d);
    }
    if (lanes.first() == 0) {
      factor[i] = r;
    }
  }
};

/// Its adjoint: dv += scale · r (dv̂ - ⟨dv̂, v̂⟩ v̂); and `dots`, if it is there, gets ⟨dv̂, v̂⟩.
template <class Scalar>
struct NormalizeBackwardRow {
  DeviceRows<const Scalar> hat;
  DeviceRows<const Scalar> dhat;
  const Scalar* factor;
  const Scalar* scale;
  DeviceRows<Scalar> dv;
  Scalar* dots;

  MOXIE_HOST_DEVICE void operator()(Index i, auto lanes) const {
    Scalar dot = 0;
    for (Index d = lanes.first(); d < hat.cols; d += lanes.step()) {
      dot += hat(i, d) * dhat(i, d);
    }
    dot = lanes.sum(dot);
    for (Index d = lanes.first(); d < hat.cols; d += lanes.step()) {
      dv(i, d) += *scale * formula::l2norm_slope(factor[i], hat(i, d), dhat(i, d), dot);
    }
    if (dots != nullptr && lanes.first() == 0) {
      dots[i] = dot;
    }
  }
};

/// A logit, and exp of it less the largest of its column in the sequence.
template <class Scalar>
struct SlotLogit {
  DeviceRows<const Scalar> z;
  const Scalar* scale;

  MOXIE_HOST_DEVICE Scalar operator()(Index t, Index n) const { return (scale == nullptr ? Scalar(1) : *scale) * z(t, n); }
};
template <class Scalar>
struct SlotExponential {
  SlotLogit<Scalar> logit;
  const int* sequence;
  const Scalar* largest;  // (B,N)

  MOXIE_HOST_DEVICE Scalar operator()(Index t, Index n) const {
    return std::exp(logit(t, n) - largest[sequence[t] * logit.z.cols + n]);
  }
};
/// d_tn = exp(z_tn - largest) / Σ: the softmax over the tokens of a sequence.
template <class Scalar>
struct DispatchRow {
  SlotExponential<Scalar> exponential;
  const Scalar* sum;  // (B,N)
  DeviceRows<Scalar> d;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    for (Index n = lanes.first(); n < d.cols; n += lanes.step()) {
      d(t, n) = exponential(t, n) / sum[exponential.sequence[t] * d.cols + n];
    }
  }
};
/// Weights that are not learned: 1 over the tokens of the sequence or the slots, or slot n is token n.
template <class Scalar>
struct ConstantRow {
  bool identity;
  bool over_tokens;
  const int* starts;
  const int* sequence;
  DeviceRows<Scalar> m;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    const Index first = starts[sequence[t]];
    const Scalar share = Scalar(1) / Scalar(over_tokens ? starts[sequence[t] + 1] - first : m.cols);
    for (Index n = lanes.first(); n < m.cols; n += lanes.step()) {
      m(t, n) = identity ? Scalar(t - first == n ? 1 : 0) : share;
    }
  }
};
template <class Scalar>
struct ElementProduct {
  DeviceRows<const Scalar> a;
  DeviceRows<const Scalar> b;

  MOXIE_HOST_DEVICE Scalar operator()(Index t, Index n) const { return a(t, n) * b(t, n); }
};
/// Both softmaxes back to the logits: dz = C ⊙ (dC - Σ_n dC C) + D ⊙ (dD - Σ_t dD D), of those sides that are learned.
template <class Scalar>
struct SoftBackwardRow {
  DeviceRows<const Scalar> c, dc, d, dd;  // sides that are not learned are null
  const Scalar* dots;                     // (B,N): Σ_t dD D
  const int* sequence;
  DeviceRows<Scalar> dz;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    for (Index n = lanes.first(); n < dz.cols; n += lanes.step()) {
      dz(t, n) = c.data == nullptr ? Scalar(0) : dc(t, n);
    }
    lanes.sync();
    if (c.data != nullptr) {
      softmax_backward(c.row(t), dz.row(t), dz.cols, lanes);
    }
    if (d.data != nullptr) {
      for (Index n = lanes.first(); n < dz.cols; n += lanes.step()) {
        dz(t, n) += formula::softmax_slope(d(t, n), dd(t, n), dots[sequence[t] * dz.cols + n]);
      }
    }
  }
};

/// `moxie::SoftRouter` on the device. Nothing waits for it, so that logits that are not finite are only known when
/// `Tape::expect_finite` asks.
template <class Scalar_>
class SoftRouter {
 public:
  using Scalar = Scalar_;
  using Plan = DensePlan<Scalar>;
  using Config = SoftRouterConfig;

  class Tape {
   public:
    /// Soft MoE needs no balance loss.
    double balance_loss(DeviceExec& /*exec*/) const { return 0; }
    /// Throws ValueError naming the first token of the last forward whose logits are not finite. Waits for the device.
    void expect_finite(DeviceExec& exec) const { status_.expect_finite(exec, "SoftRouter::route"); }
    void clear() {}

   private:
    friend class SoftRouter;
    DeviceBuffer<Scalar> x_, phi_, x_factor_, phi_factor_;
    detail::LogitStatus status_;
  };

  /// Throws what `SoftRouterConfig::expect_valid` throws.
  explicit SoftRouter(const Config& config)
      : config_((config.template expect_valid<Scalar>("SoftRouter"), config)), layout_(config.layout()) {
    expect_supported(config);
  }

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return config_.model_dim; }

  /// Throws ShapeError for a sequence that has not as many tokens as there are slots, where identity mixing needs it, and
  /// ValueError for `in.top_k`, which slots do not have.
  void route(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, Plan& plan, Tape& tape) const {
    const DeviceSequences& sequences = *in.on_device;
    detail::expect_value(in.top_k == 0, "SoftRouter::route", "every token uses all slots, so there is no top_k to set");
    const Index tokens = in.count();
    const Index slot_count = config_.slot_count();
    const Groups groups = sequences.groups();
    if (config_.dispatch == Mixing::identity || config_.combine == Mixing::identity) {
      for (Index b = 0; b < groups.count(); ++b) {
        if (groups.rows(b) != slot_count) {
          throw ShapeError("SoftRouter::route: sequence " + std::to_string(b) + " has " + std::to_string(groups.rows(b)) +
                           " tokens, expected one for each of the " + std::to_string(slot_count) + " slots");
        }
      }
    }
    plan.resize(exec, sequences, config_.experts, config_.slots_per_expert);
    const DeviceExec::Frame frame(exec);
    int* status = tape.status_.reset(exec, in);
    DeviceRows<const Scalar> z;
    const Scalar* scale = config_.normalized() ? p + detail::device_offset(layout_, 1) : nullptr;
    if (config_.learned()) {
      z = logits(exec, p, in, tape);
    }
    if (config_.combine == Mixing::learned) {
      exec.for_each_row(tokens, SoftmaxRow<Scalar>{z, plan.combine(), scale, status});
    } else {
      exec.for_each_row(tokens, ConstantRow<Scalar>{config_.combine == Mixing::identity, false, groups.device,
                                                    sequences.of_token(), plan.combine()});
    }
    if (config_.dispatch == Mixing::learned) {
      if (config_.combine != Mixing::learned) {  // which else looks at the logits
        const DeviceRows<Scalar> unused(exec.scratch<Scalar>(in.room() * slot_count), tokens, slot_count);
        exec.for_each_row(tokens, SoftmaxRow<Scalar>{z, unused, scale, status});
      }
      const SlotLogit<Scalar> logit{z, scale};
      Scalar* largest = exec.scratch<Scalar>(groups.count() * slot_count);
      column_reduce<Largest, Scalar>(exec, groups, slot_count, logit, GroupRows<Scalar>{largest, slot_count}, in.room());
      const SlotExponential<Scalar> exponential{logit, sequences.of_token(), largest};
      Scalar* sum = exec.scratch<Scalar>(groups.count() * slot_count);
      column_reduce<Plus, Scalar>(exec, groups, slot_count, exponential, GroupRows<Scalar>{sum, slot_count}, in.room());
      exec.for_each_row(tokens, DispatchRow<Scalar>{exponential, sum, plan.dispatch()});
    } else {
      exec.for_each_row(tokens, ConstantRow<Scalar>{config_.dispatch == Mixing::identity, true, groups.device,
                                                    sequences.of_token(), plan.dispatch()});
    }
  }

  /// From dD and dC (T,N); adds to dx and to the gradients of Φ and the scale.
  void backward(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, const Plan& plan,
                const DensePlanGradient<Scalar>& gradient, const Tape& tape) const {
    using kernel::Write;
    const DeviceSequences& sequences = *in.on_device;
    const auto& [ddispatch, dcombine, into] = gradient;
    if (!config_.learned()) {
      return;
    }
    const Index tokens = in.count();
    const Index slot_count = config_.slot_count();
    const Index dim = config_.model_dim;
    const DeviceExec::Frame frame(exec);
    const DeviceRows<Scalar> dz(exec.scratch<Scalar>(in.room() * slot_count), tokens, slot_count);
    SoftBackwardRow<Scalar> row{{}, dcombine, {}, ddispatch, nullptr, sequences.of_token(), dz};
    if (config_.combine == Mixing::learned) {
      row.c = plan.combine();
    }
    if (config_.dispatch == Mixing::learned) {
      row.d = plan.dispatch();
      Scalar* dots = exec.scratch<Scalar>(sequences.count() * slot_count);
      column_reduce<Plus, Scalar>(exec, sequences.groups(), slot_count, ElementProduct<Scalar>{row.d, ddispatch},
                                  GroupRows<Scalar>{dots, slot_count}, in.room());
      row.dots = dots;
    }
    exec.for_each_row(tokens, row);
    if (!config_.normalize) {
      detail::linear_backward<Scalar>(exec, in.x, p, dz, {into.x, Write::add}, {into.parameters, Write::add});
      return;
    }
    const DeviceRows<const Scalar> x_hat(tape.x_.data(), tokens, dim);
    const DeviceRows<const Scalar> phi_hat(tape.phi_.data(), slot_count, dim);
    const DeviceRows<Scalar> dx_hat(exec.scratch<Scalar>(in.room() * dim), tokens, dim);
    const DeviceRows<Scalar> dphi_hat(exec.scratch<Scalar>(slot_count * dim), slot_count, dim);
    detail::linear_backward<Scalar>(exec, x_hat, phi_hat.data, dz, {dx_hat, Write::replace}, {dphi_hat.data, Write::replace});
    const Index scale_offset = detail::device_offset(layout_, 1);
    const Scalar* scale = p + scale_offset;
    Scalar* dots = exec.scratch<Scalar>(slot_count);
    const DeviceRows<Scalar> dphi(into.parameters, slot_count, dim);
    exec.for_each_row(slot_count, NormalizeBackwardRow<Scalar>{phi_hat, dphi_hat, tape.phi_factor_.data(), scale, dphi, dots});
    exec.for_each_row(tokens, NormalizeBackwardRow<Scalar>{x_hat, dx_hat, tape.x_factor_.data(), scale, into.x, nullptr});
    column_sums<Scalar>(exec, slot_count, 1, ElementOf<Scalar, Scalar>{DeviceRows<const Scalar>(dots, slot_count, 1)},
                        GroupRows<Scalar>{into.parameters + scale_offset, 1, kernel::Write::add});
  }

 private:
  DeviceRows<const Scalar> logits(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, Tape& tape) const {
    const Index slot_count = config_.slot_count();
    const Index dim = config_.model_dim;
    const DeviceRows<Scalar> z(exec.scratch<Scalar>(in.room() * slot_count), in.count(), slot_count);
    if (!config_.normalize) {
      detail::linear(exec, in.x, p, z);
      return z;
    }
    const DeviceRows<Scalar> x_hat(tape.x_.resize(exec, in.count() * dim, in.room() * dim), in.count(), dim);
    const DeviceRows<Scalar> phi_hat(tape.phi_.resize(exec, slot_count * dim), slot_count, dim);
    exec.for_each_row(in.count(), NormalizeRow<Scalar>{in.x, x_hat, tape.x_factor_.resize(exec, in.count(), in.room())});
    exec.for_each_row(slot_count, NormalizeRow<Scalar>{DeviceRows<const Scalar>(p, slot_count, dim), phi_hat,
                                                       tape.phi_factor_.resize(exec, slot_count)});
    detail::linear<Scalar>(exec, x_hat, phi_hat.data, z);
    return z;
  }

  Config config_;
  Layout layout_;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/cuda/top_k.hpp>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

namespace detail {

/// The scores of all experts and tokens, expert by expert, to be sorted; NaN last.
template <class Scalar>
struct ScoreKey {
  DeviceRows<const Scalar> s;
  Scalar* key;
  int* place;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const Scalar v = s(i % s.rows, i / s.rows);
    key[i] = v == v ? v : Scalar(-1);
    place[i] = int(i);
  }
};
struct SegmentKey {
  const int* place;
  const int* sequence;
  int tokens;
  int sequences;
  int* key;

  MOXIE_HOST_DEVICE void operator()(Index i) const { key[i] = place[i] / tokens * sequences + sequence[place[i] % tokens]; }
};
/// The best of every expert and sequence become rows.
template <class Scalar>
struct TakenRow {
  const int* place;
  const int* starts;  // of sequences, in tokens
  const int* first;   // of sequences, in an expert's rows
  int sequences;
  int rows;  // of an expert
  DeviceRows<const Scalar> s;
  int* token;
  int* expert;
  Scalar* weight;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const int e = int(i) / rows;
    const int q = int(i) % rows;
    const int b = lower_bound(first, sequences + 1, q + 1) - 1;
    const int t = int(place[e * s.rows + starts[b] + q - first[b]] % s.rows);
    token[i] = t;
    expert[i] = e;
    weight[i] = s(t, e);
  }
};
/// ds_te of what was taken.
template <class Scalar>
struct ScatterWeight {
  const int* token;
  const int* expert;
  const Scalar* dweight;
  DeviceRows<Scalar> ds;

  MOXIE_HOST_DEVICE void operator()(Index r) const { ds(token[r], expert[r]) = dweight[r]; }
};

}  // namespace detail

/// ds of a row -> dz, in place.
template <class Scalar>
struct SoftmaxBackwardRow {
  DeviceRows<const Scalar> s;
  DeviceRows<Scalar> ds;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const { softmax_backward(s.row(t), ds.row(t), s.cols, lanes); }
};

/// `moxie::ExpertChoiceRouter` on the device: the same options. The rows of an expert are sorted by sequence, then
/// by score. Nothing waits for the device, so that logits that are not finite are only known when `Tape::expect_finite` asks.
template <class Scalar_>
class ExpertChoiceRouter {
 public:
  using Scalar = Scalar_;
  using Plan = SparsePlan<Scalar>;
  using Config = ExpertChoiceRouterConfig;

  class Tape {
   public:
    /// (T,E), on the device.
    const Scalar* scores() const { return scores_.data(); }
    /// Balanced by construction.
    double balance_loss(DeviceExec& /*exec*/) const { return 0; }
    /// Throws ValueError naming the first token of the last forward whose logits are not finite. Waits for the device.
    void expect_finite(DeviceExec& exec) const { status_.expect_finite(exec, "ExpertChoiceRouter::route"); }
    void clear() {}

   private:
    friend class ExpertChoiceRouter;
    typename Gate<Scalar>::Tape gate_;
    DeviceBuffer<Scalar> scores_;
    detail::LogitStatus status_;
    std::vector<int> firsts_;  // the first of an expert's rows in each sequence
    std::vector<int> starts_;
    DeviceBuffer<int> first_;
  };

  /// Throws what `ExpertChoiceRouterConfig::expect_valid` throws.
  explicit ExpertChoiceRouter(const Config& config)
      : config_((config.template expect_valid<Scalar>("ExpertChoiceRouter"), config)),
        layout_(config.layout()),
        gate_(config.model_dim, config.experts, config.noise) {
    expect_supported(config);
  }

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return config_.model_dim; }

  /// Throws ValueError for `in.top_k`, which experts do not have.
  void route(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, Plan& plan, Tape& tape) const {
    const DeviceSequences& sequences = *in.on_device;
    constexpr std::string_view where = "ExpertChoiceRouter::route";
    detail::expect_value(in.top_k == 0, where, "experts choose their tokens, so there is no top_k to set");
    const Index tokens = in.count();
    const Index experts = config_.experts;
    const Index n = detail::to_index(where, tokens * experts);
    detail::to_index(where, sequences.count() * experts);
    const Index room = in.room() * experts;
    Index rows_of_whole = 0;  // of an expert, if no token were masked
    in.whole.for_each([&](Index /*b*/, Index begin, Index end) { rows_of_whole += config_.room(end - begin); });
    std::vector<int> firsts{0};
    for (Index b = 0; b < sequences.count(); ++b) {
      firsts.push_back(firsts.back() + int(config_.room(sequences.groups().rows(b))));
    }
    if (firsts != tape.firsts_) {
      tape.firsts_.clear();  // nothing is known if this throws
      exec.upload(firsts.data(), tape.first_.resize(exec, Index(firsts.size())), Index(firsts.size()));
      tape.firsts_ = firsts;
    }
    tape.starts_.clear();
    for (Index e = 0; e <= experts; ++e) {
      tape.starts_.push_back(int(e) * firsts.back());
    }
    const DeviceExec::Frame frame(exec);
    const DeviceRows<Scalar> s(tape.scores_.resize(exec, n, room), tokens, experts);
    int* status = tape.status_.reset(exec, in);
    gate_.forward(exec, where, p, in, tape.gate_);
    exec.for_each_row(tokens, SoftmaxRow<Scalar>{tape.gate_.noisy_logits(), s, nullptr, status});
    // By score, then by expert and sequence: a stable sort keeps the scores' order.
    Scalar* score = exec.scratch<Scalar>(room);
    int* place = exec.scratch<int>(room);
    int* segment = exec.scratch<int>(room);
    exec.for_each(n, detail::ScoreKey<Scalar>{s, score, place});
    detail::sort_by_key_descending(exec, score, place, n);
    exec.for_each(n, detail::SegmentKey{place, sequences.of_token(), int(tokens), int(sequences.count()), segment});
    detail::sort_by_key(exec, segment, place, n);
    const Index room_of_rows = experts * (rows_of_whole > firsts.back() ? rows_of_whole : Index{firsts.back()});
    plan.build(exec, tokens, in.room(), tape.starts_, room_of_rows, [&](int* token, int* expert, Scalar* weight) {
      exec.for_each(experts * firsts.back(),
                    detail::TakenRow<Scalar>{place, sequences.groups().device, tape.first_.data(), int(sequences.count()),
                                             firsts.back(), s, token, expert, weight});
    });
  }

  void backward(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, const Plan& plan,
                const SparsePlanGradient<Scalar>& gradient, const Tape& tape) const {
    const Index tokens = in.count();
    const DeviceExec::Frame frame(exec);
    const DeviceRows<Scalar> dz(exec.scratch<Scalar>(in.room() * config_.experts), tokens, config_.experts);
    exec.zero(dz.data, tokens * config_.experts);
    exec.for_each(plan.rows(), detail::ScatterWeight<Scalar>{plan.token(), plan.expert(), gradient.weight, dz});
    exec.for_each_row(tokens, SoftmaxBackwardRow<Scalar>{DeviceRows<const Scalar>(tape.scores(), tokens, config_.experts), dz});
    gate_.backward(exec, p, in, dz, gradient.into, tape.gate_);
  }

 private:
  Config config_;
  Layout layout_;
  Gate<Scalar> gate_;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/cuda/balance.hpp>
#include <moxie/cuda/gate.hpp>
#include <moxie/cuda/supported.hpp>
#include <moxie/kernel/math.hpp>
#include <moxie/routing/formula.hpp>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

namespace detail {

/// Of a row's n candidates, the best one that comes after (value, index) in decreasing order, ties to the lower index, NaN
/// never: what a selection of the K largest asks K times. Index -1: there is none.
template <class Scalar, class ValueOf>
MOXIE_HOST_DEVICE void next_best(int n, const ValueOf& value_of, auto lanes, Scalar& value, int& index) {
  Scalar best = 0;
  int place = -1;
  for (int e = lanes.first(); e < n; e += lanes.step()) {
    const Scalar v = value_of(e);
    const bool after = v == v && (index < 0 || v < value || (v == value && e > index));
    if (after && (place < 0 || v > best)) {
      best = v;
      place = e;
    }
  }
  lanes.best(best, place);
  value = best;
  index = place;
}

}  // namespace detail

/// s = softmax(z) of a row, with its logits checked: `first_bad` becomes the lowest row that is not finite.
template <class Scalar>
struct SoftmaxRow {
  DeviceRows<const Scalar> z;
  DeviceRows<Scalar> s;
  const Scalar* scale;  // of the logits, one number; null: 1
  int* first_bad;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    const Scalar factor = scale == nullptr ? Scalar(1) : *scale;
    Scalar largest = -detail::infinity<Scalar>;
    bool ok = true;
    for (Index e = lanes.first(); e < z.cols; e += lanes.step()) {
      const Scalar v = factor * z(t, e);
      ok = ok && detail::finite(v);
      largest = v > largest ? v : largest;
    }
    if (!ok) {
      detail::atomic_min(first_bad, int(t));
    }
    largest = lanes.largest(largest);
    Scalar sum = 0;
    for (Index e = lanes.first(); e < z.cols; e += lanes.step()) {
      const Scalar v = std::exp(factor * z(t, e) - largest);
      s(t, e) = v;
      sum += v;
    }
    sum = lanes.sum(sum);
    for (Index e = lanes.first(); e < z.cols; e += lanes.step()) {
      s(t, e) /= sum;
    }
  }
};

/// s = σ(z) of a row, and p = s / Σ s where `probability` (T,E) is not null, from the logits; with these checked.
template <class Scalar>
struct SigmoidRow {
  DeviceRows<const Scalar> z;
  DeviceRows<Scalar> s;
  Scalar* probability;
  int* first_bad;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    Scalar largest = -detail::infinity<Scalar>;
    bool ok = true;
    for (Index e = lanes.first(); e < z.cols; e += lanes.step()) {
      ok = ok && detail::finite(z(t, e));
      largest = z(t, e) > largest ? z(t, e) : largest;
      s(t, e) = kernel::sigmoid(z(t, e));
    }
    if (!ok) {
      detail::atomic_min(first_bad, int(t));
    }
    if (probability == nullptr) {
      return;
    }
    Scalar* p = probability + t * z.cols;
    largest = lanes.largest(largest);
    Scalar sum = 0;
    for (Index e = lanes.first(); e < z.cols; e += lanes.step()) {
      p[e] = formula::scaled_sigmoid(z(t, e), s(t, e), largest);
      sum += p[e];
    }
    sum = lanes.sum(sum);
    for (Index e = lanes.first(); e < z.cols; e += lanes.step()) {
      p[e] /= sum;
    }
  }
};

/// The softmax's adjoint of a row, in place: dz_e = s_e (ds_e - Σ_i ds_i s_i), the ds of the largest score taken from all
/// first.
template <class Scalar>
MOXIE_HOST_DEVICE void softmax_backward(const Scalar* s, Scalar* ds, Index n, auto lanes) {
  Scalar value = 0;
  int index = -1;
  detail::next_best(
      int(n), [&](int e) { return s[e]; }, lanes, value, index);
  const Scalar shift = index < 0 ? Scalar(0) : ds[index];
  lanes.sync();
  Scalar dot = 0;
  for (Index e = lanes.first(); e < n; e += lanes.step()) {
    ds[e] -= shift;
    dot += ds[e] * s[e];
  }
  dot = lanes.sum(dot);
  for (Index e = lanes.first(); e < n; e += lanes.step()) {
    ds[e] = formula::softmax_slope(s[e], ds[e], dot);
  }
}

/// What `moxie::TopKRouter` does with the logits z of a token: scores, the K experts, and their weights.
template <class Scalar>
struct TopKRow {
  int experts = 0;
  int k = 0;
  bool softmax = true;
  bool normalized = false;
  Scalar scale = 1;
  int groups = 1;
  int groups_chosen = 1;
  bool group_sum = true;         // a group is judged by its two largest scores
  const Scalar* bias = nullptr;  // E, or null
  DeviceRows<const Scalar> z = {};
  DeviceRows<Scalar> s = {};
  Scalar* group_score = nullptr;  // (T,G), where groups limit
  Scalar* probability = nullptr;  // (T,E): sigmoid scores over their sum, or null
  int* chosen = nullptr;          // (T,K)
  int* best = nullptr;            // (T,K): the largest logits, where others may be chosen; or null
  Scalar* weight = nullptr;       // (T,K)
  Scalar* share = nullptr;        // (T,K): normalized weights without the scale
  int* first_bad = nullptr;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    if (softmax) {
      SoftmaxRow<Scalar>{z, s, nullptr, first_bad}(t, lanes);
    } else {
      SigmoidRow<Scalar>{z, s, probability, first_bad}(t, lanes);
    }
    for (int e = lanes.first(); bias != nullptr && e < experts; e += lanes.step()) {
      if (!detail::finite(bias[e])) {
        detail::atomic_min(first_bad, detail::bad_bias);
      }
    }
    lanes.sync();
    const bool limited = groups_chosen < groups;
    if (limited) {
      choose_groups(t, lanes);
    }
    if (limited || bias != nullptr) {
      const Scalar* open = limited ? group_score + t * groups : nullptr;
      const int size = experts / groups;
      select(lanes, chosen + t * k, [&](int e) {
        return open != nullptr && open[e / size] < 0 ? -detail::infinity<Scalar>
                                                     : s(t, e) + (bias == nullptr ? Scalar(0) : bias[e]);
      });
      if (best != nullptr) {
        select(lanes, best + t * k, [&](int e) { return z(t, e); });
      }
    } else {
      select(lanes, chosen + t * k, [&](int e) { return z(t, e); });
    }
    lanes.sync();
    weigh(t, lanes);
  }

 private:
  /// Sets the scores of groups that may be chosen from to 0, those of others to -1.
  MOXIE_HOST_DEVICE void choose_groups(Index t, auto lanes) const {
    Scalar* score = group_score + t * groups;
    const int size = experts / groups;
    for (int g = lanes.first(); g < groups; g += lanes.step()) {
      Scalar first = -detail::infinity<Scalar>;
      Scalar second = first;
      for (int e = g * size; e < (g + 1) * size; ++e) {
        const Scalar v = s(t, e) + (bias == nullptr ? Scalar(0) : bias[e]);
        if (v > first) {
          second = first;
          first = v;
        } else if (v > second) {
          second = v;
        }
      }
      score[g] = group_sum && size > 1 ? first + second : first;
    }
    lanes.sync();
    // Chosen ones become 0 and others -1 when all have been looked at: marks of each lane's first groups in the bits of a word.
    unsigned long long open = 0;
    int turn = 0;
    for (int g = lanes.first(); g < groups; g += lanes.step(), ++turn) {
      int before = 0;
      for (int other = 0; other < groups; ++other) {
        before += score[other] > score[g] || (score[other] == score[g] && other < g) ? 1 : 0;
      }
      open |= (before < groups_chosen ? 1ULL : 0ULL) << unsigned(turn % 64);
      if (turn % 64 == 63) {
        break;  // there are no more: `expect_supported`
      }
    }
    lanes.sync();
    turn = 0;
    for (int g = lanes.first(); g < groups; g += lanes.step(), ++turn) {
      score[g] = (open >> unsigned(turn % 64) & 1ULL) != 0 ? Scalar(0) : Scalar(-1);
    }
    lanes.sync();
  }

  template <class ValueOf>
  MOXIE_HOST_DEVICE void select(auto lanes, int* to, const ValueOf& value_of) const {
    Scalar value = 0;
    int index = -1;
    for (int j = 0; j < k; ++j) {
      detail::next_best(experts, value_of, lanes, value, index);
      if (lanes.first() == 0) {
        to[j] = index < 0 ? 0 : index;  // logits that are not numbers: nothing comes of it, but it must be an expert
      }
      if (index < 0) {
        value = -detail::infinity<Scalar>;
        index = experts;
      }
    }
  }

  MOXIE_HOST_DEVICE void weigh(Index t, auto lanes) const {
    const int* e = chosen + t * k;
    const Score score = softmax ? Score::softmax : Score::sigmoid;
    formula::ShareSum<Scalar> all{};
    if (normalized) {
      all = formula::share_sum(score, z.row(t), s.row(t), e, k);
    }
    for (int j = lanes.first(); j < k; j += lanes.step()) {
      Scalar w = s(t, e[j]);
      if (normalized) {
        w = formula::share(score, z(t, e[j]), w, all);
        share[t * k + j] = w;
      }
      weight[t * k + j] = scale * w;
    }
  }
};

/// Its adjoint: dz of a token's logits, from the gradient of its rows' weights and the balance losses.
template <class Scalar>
struct TopKBackwardRow {
  TopKRow<Scalar> row;
  TokenRows rows_of;
  const Scalar* dweight = nullptr;        // of each row
  const int* sequence = nullptr;          // of each token
  const double* coefficient = nullptr;    // (B,E): ∂loss/∂p, or null
  DeviceRows<const Scalar> clean_z = {};  // without noise
  double z_loss = 0;                      // weight over the number of tokens
  double token_entropy = 0;               // the same
  DeviceRows<Scalar> dz = {};

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    const int experts = row.experts;
    Scalar* d = dz.row(t);
    const Scalar* s = row.s.row(t);
    const Scalar* p = row.probability == nullptr ? s : row.probability + t * experts;
    for (Index e = lanes.first(); e < experts; e += lanes.step()) {
      double sum = coefficient == nullptr ? 0 : coefficient[Index(sequence[t]) * experts + e];
      if (token_entropy > 0) {
        sum += token_entropy * formula::entropy_slope<Scalar>(double(p[e]));
      }
      d[e] = Scalar(sum);
    }
    if (row.softmax && !row.normalized) {
      add_weight_gradient(t, s, d, lanes);
    }
    if (row.softmax || row.probability != nullptr) {
      lanes.sync();
      softmax_backward(p, d, experts, lanes);
    }
    // Probabilities of sigmoids are a softmax of ln σ(z), whose derivative is 1 - s.
    for (Index e = lanes.first(); row.probability != nullptr && e < experts; e += lanes.step()) {
      d[e] *= Scalar(1) - s[e];
    }
    if (row.normalized) {
      add_share_gradient(t, s, d, lanes);
    } else if (!row.softmax) {
      add_weight_gradient(t, s, d, lanes);
    }
    if (z_loss > 0) {
      const double log_sum = formula::log_sum_exp(experts, clean_z.row(t));
      for (Index e = lanes.first(); e < experts; e += lanes.step()) {
        d[e] += Scalar(z_loss * formula::z_loss_slope(double(clean_z(t, e)), log_sum));
      }
    }
  }

 private:
  /// ∂/∂w_j, of weights without the scale.
  MOXIE_HOST_DEVICE Scalar dw(Index t, int j) const {
    const int r = rows_of.rows[t * row.k + j];
    return r < 0 ? Scalar(0) : row.scale * dweight[r];
  }
  /// Adds to what its lane owns.
  MOXIE_HOST_DEVICE static void add(Scalar* d, int e, Scalar x, auto lanes) {
    if (e % lanes.step() == lanes.first()) {
      d[e] += x;
    }
  }
  /// w_j = s_j: ds_j += dw_j of softmax scores, dz_j += dw_j s_j (1 - s_j) of sigmoids.
  MOXIE_HOST_DEVICE void add_weight_gradient(Index t, const Scalar* s, Scalar* d, auto lanes) const {
    const int* chosen = row.chosen + t * row.k;
    for (int j = 0; j < row.k; ++j) {
      const Scalar slope = row.softmax ? Scalar(1) : formula::sigmoid_slope(s[chosen[j]]);
      add(d, chosen[j], dw(t, j) * slope, lanes);
    }
  }
  /// w shares of the chosen scores: straight to the logits.
  MOXIE_HOST_DEVICE void add_share_gradient(Index t, const Scalar* s, Scalar* d, auto lanes) const {
    const int* chosen = row.chosen + t * row.k;
    const Scalar* w = row.share + t * row.k;
    Scalar dot = 0;
    for (int j = 0; j < row.k; ++j) {
      dot += dw(t, j) * w[j];
    }
    for (int j = 0; j < row.k; ++j) {
      add(d, chosen[j], formula::share_slope(row.softmax ? Score::softmax : Score::sigmoid, s[chosen[j]], w[j], dw(t, j), dot),
          lanes);
    }
  }
};

/// With noise, what importance and load add to the gradient of the logits: those without noise have it in common.
template <class Scalar>
struct NoisyBackwardRow {
  bool softmax;
  LoadOf<Scalar> load_of;
  DeviceRows<const Scalar> clean;  // probabilities
  const int* sequence;
  const double* importance;  // (B,E), or null
  const double* load;        // (B,E), or null
  DeviceRows<Scalar> scratch;
  DeviceRows<Scalar> dz;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    const Index experts = dz.cols;
    if (importance != nullptr) {
      const double* coefficient = importance + Index(sequence[t]) * experts;
      Scalar* d = scratch.row(t);
      for (Index e = lanes.first(); e < experts; e += lanes.step()) {
        d[e] = Scalar(coefficient[e]);
      }
      lanes.sync();
      softmax_backward(clean.row(t), d, experts, lanes);
      for (Index e = lanes.first(); e < experts; e += lanes.step()) {
        dz(t, e) += softmax ? d[e] : d[e] * (Scalar(1) - kernel::sigmoid(load_of.z(t, e)));
      }
    }
    if (load != nullptr) {
      const double* coefficient = load + Index(sequence[t]) * experts;
      double sum = 0;
      for (Index e = lanes.first(); e < experts; e += lanes.step()) {
        const double d = coefficient[e] * load_of.derivative(t, e);
        dz(t, e) += Scalar(d);
        sum += d;
      }
      sum = lanes.sum(sum);
      lanes.sync();
      if (lanes.first() == 0) {
        dz(t, load_of.best[(t + 1) * load_of.k - 1]) -= Scalar(sum);
      }
    }
  }
};

namespace detail {

/// The largest weight of a token.
template <class Scalar>
struct PriorityOf {
  const Scalar* weight;
  int k;
  Scalar* priority;
  int* token;

  MOXIE_HOST_DEVICE void operator()(Index t) const {
    Scalar most = weight[t * k];
    for (int j = 1; j < k; ++j) {
      most = weight[t * k + j] > most ? weight[t * k + j] : most;
    }
    priority[t] = most == most ? most : -detail::infinity<Scalar>;
    token[t] = int(t);
  }
};
struct KeyOf {
  const int* index;
  const int* key_of;
  int* key;
  MOXIE_HOST_DEVICE void operator()(Index i) const { key[i] = key_of[index[i]]; }
};
/// Pairs in the order in which they come to their experts: of each sequence all first choices, then all second ones; with the
/// sequence and the expert to sort by.
struct ArrivalOf {
  const int* order;  // tokens of each sequence, the first to come first
  const int* sequence;
  const int* starts;
  const int* chosen;
  int k;
  int experts;
  int* key;
  int* pair;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const int b = sequence[i / k];
    const Index length = starts[b + 1] - starts[b];
    const Index j = i - Index(starts[b]) * k;
    const int p = order[starts[b] + j % length] * k + int(j / length);
    pair[i] = p;
    key[i] = b * experts + chosen[p];
  }
};
/// A place at the expert for each, and the expert if its capacity allows.
struct PlaceOf {
  const int* key;
  const int* pair;
  int n;
  int experts;
  const int* room;  // of each sequence
  const int* chosen;
  int* place;
  int* assigned;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const int p = pair[i];
    place[p] = int(i) - lower_bound(key, n, key[i]);
    assigned[p] = place[p] < room[key[i] / experts] ? chosen[p] : -1;
  }
};

}  // namespace detail

/// `moxie::TopKRouter` on the device: the same options, parameters, choices and weights.
///
/// `route` waits for the device once: the host must know how many rows each expert has.
template <class Scalar_>
class TopKRouter {
 public:
  using Scalar = Scalar_;
  using Plan = SparsePlan<Scalar>;
  using Config = TopKRouterConfig;

  class Tape {
   public:
    /// On the device: scores (T,E), choices and places (T,K); no places without a capacity.
    const Scalar* scores() const { return scores_.data(); }
    const int* choices() const { return chosen_.data(); }
    const int* places() const { return placed_ ? place_.data() : nullptr; }
    /// K of the last forward.
    Index top_k() const { return top_k_; }
    /// Adds how often each expert was chosen in the last forward, dropped pairs too, to E numbers of the device: what
    /// `Moe::update_selection_bias` looks at, after all micro-batches of a step.
    void add_times_chosen(DeviceExec& exec, DeviceBuffer<double>& load) const {
      if (top_k_ == 0) {  // no forward, or one that failed
        return;
      }
      detail::expect_value(load.size() == row_.experts, "add_times_chosen", "the load is not of as many experts");
      column_sums<double>(exec, chosen_.size() / top_k_, row_.experts, TimesChosen{chosen_.data(), row_.k, row_.k},
                          GroupRows<double>{load.data(), row_.experts, kernel::Write::add}, most_tokens_);
    }
    double balance_loss(DeviceExec& exec) const { return losses_ ? balance_.loss(exec) : 0; }

    /// No forward.
    void clear() {
      top_k_ = 0;
      losses_ = false;
      placed_ = false;
    }

   private:
    friend class TopKRouter;
    Index top_k_ = 0;
    Index most_tokens_ = 0;  // of a step of the same shape
    bool losses_ = false;
    bool placed_ = false;
    TopKRow<Scalar> row_;
    BalanceInput<Scalar> seen_;
    typename Gate<Scalar>::Tape gate_;
    DeviceBuffer<Scalar> clean_, scores_, probabilities_, weights_, shares_, group_scores_;
    DeviceBuffer<int> chosen_, best_, place_, assigned_, room_;
    detail::LogitStatus status_;
    std::vector<int> rooms_;
    BalanceTape balance_;
  };

  /// Throws what `TopKRouterConfig::expect_valid` throws, and ValueError for options that a device does not have.
  explicit TopKRouter(const Config& config)
      : config_((config.template expect_valid<Scalar>("TopKRouter"), config)),
        layout_(config.layout()),
        gate_(config.model_dim, config.experts, config.noise) {
    expect_supported(config);
  }

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return config_.model_dim; }

  /// `moxie::update_selection_bias` on a block of the router's parameters.
  void update_selection_bias(DeviceExec& exec, Scalar* p, const DeviceBuffer<double>& load, double rate,
                             bool recentre = false) const {
    constexpr std::string_view where = "update_selection_bias";
    detail::expect_value(config_.selection_bias, where, "the router has no selection bias");
    detail::expect_value(load.size() == config_.experts, where, "the load is not of as many experts");
    detail::expect_value(std::isfinite(rate), where, "the rate is not finite");
    exec.for_each_row(
        1, SelectionBiasRow<Scalar>{load.data(), config_.experts, rate, recentre, p + detail::device_offset(layout_, 1)});
  }

  /// Throws ValueError naming the first token whose logits are not finite, and for `in.top_k` that the router could not have.
  void route(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, Plan& plan, Tape& tape) const {
    const DeviceSequences& sequences = *in.on_device;
    constexpr std::string_view where = "TopKRouter::route";
    const Index tokens = in.count();
    const Index experts = config_.experts;
    const Index k = in.top_k > 0 ? in.top_k : config_.top_k;
    if (in.top_k > 0) {
      config_.expect_top_k(where, k);
    }
    const Index pairs = detail::to_index(where, tokens * k);
    detail::to_index(where, sequences.count() * experts);
    set_rooms(exec, sequences, k, tape);
    const DeviceExec::Frame frame(exec);
    const Index room = in.room();
    tape.top_k_ = k;
    tape.most_tokens_ = room;
    TopKRow<Scalar>& row = tape.row_;
    row = {.experts = int(experts),
           .k = int(k),
           .softmax = config_.score == Score::softmax,
           .normalized = config_.normalized(),
           .scale = Scalar(config_.scale),
           .groups = int(config_.groups.count),
           .groups_chosen = int(config_.groups.chosen),
           .group_sum = config_.groups.score == GroupScore::top_2_sum,
           .bias = config_.selection_bias ? p + detail::device_offset(layout_, 1) : nullptr};
    gate_.forward(exec, where, p, in, tape.gate_);
    row.z = tape.gate_.noisy_logits();
    row.s = {tape.scores_.resize(exec, tokens * experts, room * experts), tokens, experts};
    row.chosen = tape.chosen_.resize(exec, pairs, room * k);
    row.weight = tape.weights_.resize(exec, pairs, room * k);
    row.first_bad = tape.status_.reset(exec, in);
    if (row.normalized) {
      row.share = tape.shares_.resize(exec, pairs, room * k);
    }
    if (row.groups_chosen < row.groups) {
      row.group_score = tape.group_scores_.resize(exec, tokens * row.groups, room * row.groups);
    }
    const Balance& balance = config_.balance;
    if (!row.softmax && balance.of_probabilities()) {
      row.probability = tape.probabilities_.resize(exec, tokens * experts, room * experts);
    }
    if (config_.biased() && balance.any()) {
      row.best = tape.best_.resize(exec, pairs, room * k);
    }
    exec.for_each_row(tokens, row);
    const int* assigned = row.chosen;
    tape.placed_ = config_.capacity.limited();
    if (tape.placed_) {
      assigned = assign(exec, sequences, row, tape);
    }
    tape.status_.expect_finite(where, plan.build(exec, {tokens, room, experts, k, assigned, row.weight}, row.first_bad));
    tape.losses_ = balance.any();
    if (tape.losses_) {
      take_losses(exec, in, tape);
    }
  }

  /// From ∂/∂ of the rows' weights; adds to dx and to the gradient of the gate.
  void backward(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, const Plan& plan,
                const SparsePlanGradient<Scalar>& gradient, const Tape& tape) const {
    const DeviceSequences& sequences = *in.on_device;
    const Index tokens = in.count();
    const DeviceExec::Frame frame(exec);
    const Index room = in.room() * config_.experts;
    const DeviceRows<Scalar> dz(exec.scratch<Scalar>(room), tokens, config_.experts);
    const Balance& balance = config_.balance;
    TopKBackwardRow<Scalar> row{.row = tape.row_, .rows_of = plan.rows_of_token(), .dweight = gradient.weight};
    row.sequence = sequences.of_token();
    row.coefficient = tape.losses_ && balance.of_probabilities() ? tape.balance_.coefficient() : nullptr;
    row.z_loss = tokens == 0 ? 0 : balance.z / double(tokens);
    row.token_entropy = tokens == 0 ? 0 : balance.token_entropy / double(tokens);
    row.clean_z = tape.gate_.logits();
    row.dz = dz;
    exec.for_each_row(tokens, row);
    const BalanceInput<Scalar>& seen = tape.seen_;
    if (tape.losses_ && seen.deviation > 0 && (balance.importance > 0 || balance.load > 0)) {
      const DeviceRows<Scalar> scratch(exec.scratch<Scalar>(room), tokens, config_.experts);
      exec.for_each_row(tokens,
                        NoisyBackwardRow<Scalar>{tape.row_.softmax,
                                                 {seen.logits, seen.noisy_logits, seen.best, tape.row_.k, seen.deviation},
                                                 seen.clean,
                                                 sequences.of_token(),
                                                 balance.importance > 0 ? tape.balance_.importance() : nullptr,
                                                 balance.load > 0 ? tape.balance_.load() : nullptr,
                                                 scratch,
                                                 dz});
    }
    gate_.backward(exec, p, in, dz, gradient.into, tape.gate_);
  }

 private:
  /// The balance losses of what was routed.
  void take_losses(DeviceExec& exec, const DeviceTokens<Scalar>& in, Tape& tape) const {
    const Balance& balance = config_.balance;
    const TopKRow<Scalar>& row = tape.row_;
    const Index tokens = in.count();
    BalanceInput<Scalar>& seen = tape.seen_;
    seen = {};
    seen.top_k = tape.top_k_;
    seen.probabilities = {row.probability == nullptr ? row.s.data : row.probability, tokens, config_.experts};
    seen.clean = seen.probabilities;
    seen.logits = tape.gate_.logits();
    seen.noisy_logits = row.z;
    seen.best = row.best == nullptr ? row.chosen : row.best;
    seen.counted = balance.count_chosen ? row.chosen : seen.best;
    if (tape.gate_.noisy()) {
      seen.deviation = gate_.deviation();
      if (balance.importance > 0) {
        seen.clean = clean_probabilities(exec, seen.logits, in.room(), row, tape);
      }
    }
    tape.balance_.set(exec, balance, *in.on_device, seen);
  }

  /// Probabilities of the logits without noise.
  DeviceRows<const Scalar> clean_probabilities(DeviceExec& exec, DeviceRows<const Scalar> z, Index room,
                                               const TopKRow<Scalar>& row, Tape& tape) const {
    const DeviceRows<Scalar> clean(tape.clean_.resize(exec, z.rows * z.cols, room * z.cols), z.rows, z.cols);
    if (row.softmax) {
      exec.for_each_row(z.rows, SoftmaxRow<Scalar>{z, clean, nullptr, row.first_bad});
    } else {
      const DeviceExec::Frame frame(exec);
      const DeviceRows<Scalar> s(exec.scratch<Scalar>(room * z.cols), z.rows, z.cols);
      exec.for_each_row(z.rows, SigmoidRow<Scalar>{z, s, clean.data, row.first_bad});
    }
    return clean;
  }

  /// The capacity of an expert in each sequence, on the device; sent when it changes. Throws
  /// ValueError for a capacity below 1.
  void set_rooms(DeviceExec& exec, const DeviceSequences& sequences, Index k, Tape& tape) const {
    if (!config_.capacity.limited()) {
      return;
    }
    bool same = Index(tape.rooms_.size()) == sequences.count() && tape.room_.size() == sequences.count();
    std::vector<int> rooms;
    for (Index b = 0; b < sequences.count(); ++b) {
      const Index length = sequences.groups().rows(b);
      const Index room = length == 0 ? 0 : expert_capacity(length * k, config_.experts, config_.capacity);
      rooms.push_back(int(room < length ? room : length));
      same = same && rooms.back() == tape.rooms_[std::size_t(b)];
    }
    if (!same) {
      tape.rooms_.clear();  // nothing is known if this throws
      exec.upload(rooms.data(), tape.room_.resize(exec, sequences.count()), sequences.count());
      tape.rooms_ = std::move(rooms);
    }
  }

  /// Places by a sort, as in `moxie::assign_places`: experts keep the first pairs up to their
  /// capacity.
  const int* assign(DeviceExec& exec, const DeviceSequences& sequences, const TopKRow<Scalar>& row, Tape& tape) const {
    const Index tokens = sequences.tokens();
    const Index pairs = tokens * row.k;
    const DeviceExec::Frame frame(exec);
    const Index room = sequences.room();
    int* order = exec.scratch<int>(room);
    if (config_.capacity.priority == Priority::weight) {
      Scalar* priority = exec.scratch<Scalar>(room);
      exec.for_each(tokens, detail::PriorityOf<Scalar>{row.weight, row.k, priority, order});
      detail::sort_by_key_descending(exec, priority, order, tokens);
      int* key = exec.scratch<int>(room);
      exec.for_each(tokens, detail::KeyOf{order, sequences.of_token(), key});
      detail::sort_by_key(exec, key, order, tokens);
    } else {
      exec.for_each(tokens, detail::Iota{order});
    }
    int* key = exec.scratch<int>(room * row.k);
    int* pair = exec.scratch<int>(room * row.k);
    exec.for_each(pairs, detail::ArrivalOf{order, sequences.of_token(), sequences.groups().device, row.chosen, row.k,
                                           row.experts, key, pair});
    detail::sort_by_key(exec, key, pair, pairs);
    int* assigned = tape.assigned_.resize(exec, pairs, room * row.k);
    exec.for_each(pairs, detail::PlaceOf{key, pair, int(pairs), row.experts, tape.room_.data(), row.chosen,
                                         tape.place_.resize(exec, pairs, room * row.k), assigned});
    return assigned;
  }

  Config config_;
  Layout layout_;
  Gate<Scalar> gate_;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

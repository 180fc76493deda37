// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/cuda/plan.hpp>
#include <moxie/loss/config.hpp>
#include <moxie/loss/formula.hpp>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

/// How often an expert is among the first `counted` of a token's K choices.
struct TimesChosen {
  const int* chosen;
  int k;
  int counted;

  MOXIE_HOST_DEVICE double operator()(Index t, Index e) const {
    int n = 0;
    for (int j = 0; j < counted; ++j) {
      n += chosen[t * k + j] == e ? 1 : 0;
    }
    return n;
  }
};

/// What single tokens add to a loss: column 0 the z-loss (ln Σ exp z)², column 1 the entropy -Σ p ln p; 0 for what is null.
template <class Scalar>
struct TokenLoss {
  DeviceRows<const Scalar> z;
  DeviceRows<const Scalar> p;

  MOXIE_HOST_DEVICE double operator()(Index t, Index which) const {
    double loss = 0;
    if (which == 0 && z.data != nullptr) {
      loss = formula::log_sum_exp(z.cols, z.row(t));
      loss *= loss;
    }
    if (which == 1 && p.data != nullptr) {
      for (Index e = 0; e < p.cols; ++e) {
        loss += formula::entropy_term(double(p(t, e)));
      }
    }
    return loss;
  }
};

/// Numbers of one expert and all sequences, summed.
struct SumSequences {
  const double* of_sequence;  // (B,E)
  Index sequences;
  Index experts;
  double* out;  // E

  MOXIE_HOST_DEVICE void operator()(Index e) const {
    double sum = 0;
    for (Index b = 0; b < sequences; ++b) {
      sum += of_sequence[b * experts + e];
    }
    out[e] = sum;
  }
};

/// The balance losses (`moxie::Balance`) of sequence b, and ∂loss/∂p_te, which all of its tokens t have in common; row B has
/// the losses of the whole batch, and the sum of all.
///
/// With n tokens, n_b of sequence b, B' sequences that have tokens, f_e = E count_e / (K n) and P_e = Σ_t p_te / n:
///
///     expert level    Σ f_e P_e                              f_e / n
///     device level    Σ_d mean_{e in d} f_e Σ_{e in d} P_e   mean f of e's device / n
///     mean entropy    Σ P_e ln P_e                           (ln P_e + 1) / n
///     sequence level  1/B' Σ_b E/(K n_b²) Σ_e count_be Σ_t p_te,  GShard: the same of first choices
struct BalanceRow {
  Balance weights;
  Index experts = 0;
  Index sequences = 0;
  Index nonempty = 0;
  double k = 1;
  const int* starts = nullptr;
  const double* counts = nullptr;       // (B,E)
  const double* firsts = nullptr;       // (B,E), or null
  const double* p = nullptr;            // (B,E): Σ_t p
  const double* batch_count = nullptr;  // E
  const double* batch_p = nullptr;      // E
  double* coefficient = nullptr;        // (B,E)
  double* of_sequence = nullptr;        // B

  MOXIE_HOST_DEVICE void operator()(Index b, auto lanes) const {
    const double length = double(starts[b + 1] - starts[b]);
    if (length == 0) {
      if (lanes.first() == 0) {
        of_sequence[b] = 0;
      }
      return;
    }
    const double n = double(starts[sequences]);
    const double share = 1 / double(nonempty);
    double loss = 0;
    for (Index e = lanes.first(); e < experts; e += lanes.step()) {
      const Index i = b * experts + e;
      double c = (weights.expert_level * frequency(e) + weights.device_level * device_frequency(e)) / n;
      if (weights.mean_entropy > 0) {
        c -= weights.mean_entropy * formula::entropy_slope<double>(batch_p[e] / n) / n;
      }
      double of_sequence_level =
          weights.sequence_level * share * formula::sequence_factor(double(experts), k, length) * counts[i];
      if (firsts != nullptr) {
        of_sequence_level += weights.gshard * share * formula::sequence_factor(double(experts), 1, length) * firsts[i];
      }
      loss += of_sequence_level * p[i];
      c += of_sequence_level;
      coefficient[i] = c;
    }
    loss = lanes.sum(loss);
    if (lanes.first() == 0) {
      of_sequence[b] = loss;
    }
  }

  MOXIE_HOST_DEVICE double frequency(Index e) const {
    return double(experts) * batch_count[e] / (k * double(starts[sequences]));
  }
  MOXIE_HOST_DEVICE double device_frequency(Index e) const {
    if (weights.device_level == 0) {
      return 0;
    }
    const Index size = experts / weights.devices;
    double sum = 0;
    for (Index i = e / size * size; i < (e / size + 1) * size; ++i) {
      sum += frequency(i);
    }
    return sum / double(size);
  }
};

/// The squared coefficient of variation of E numbers of each sequence, CV² = variance / mean²: `factor` times it is added to
/// the sequence's loss, and its derivative 2 / (E mean²) ((v - mean) - variance / mean) to `coefficient`. Importance and load
/// are such losses.
struct VariationRow {
  const double* numbers;  // (B,E)
  Index experts;
  double factor;
  double* coefficient;  // (B,E)
  double* of_sequence;  // B

  MOXIE_HOST_DEVICE void operator()(Index b, auto lanes) const {
    const double* v = numbers + b * experts;
    double mean = 0;
    for (Index e = lanes.first(); e < experts; e += lanes.step()) {
      mean += v[e] / double(experts);
    }
    mean = lanes.sum(mean);
    if (mean == 0) {  // a sequence without tokens among others
      return;
    }
    double variance = 0;
    for (Index e = lanes.first(); e < experts; e += lanes.step()) {
      variance += (v[e] - mean) * (v[e] - mean) / double(experts);
    }
    variance = lanes.sum(variance);
    for (Index e = lanes.first(); e < experts; e += lanes.step()) {
      coefficient[b * experts + e] += factor * formula::squared_variation_slope(v[e], double(experts), mean, variance);
    }
    if (lanes.first() == 0) {
      of_sequence[b] += factor * formula::squared_variation(mean, variance);
    }
  }
};

/// How likely it is that expert e would be chosen again with fresh noise: Φ((z_te - θ_t) / σ), θ_t the K-th largest noisy logit
/// of the token. (n,E), summed by sequence: the load.
template <class Scalar>
struct LoadOf {
  DeviceRows<const Scalar> z;
  DeviceRows<const Scalar> noisy;
  const int* best;
  int k;
  double deviation;

  MOXIE_HOST_DEVICE double distance(Index t, Index e) const {
    return (double(z(t, e)) - double(noisy(t, best[(t + 1) * k - 1]))) / deviation;
  }
  MOXIE_HOST_DEVICE double operator()(Index t, Index e) const { return formula::normal_distribution(distance(t, e)); }
  /// The derivative with respect to z_te; that to θ_t is the negative sum over e.
  MOXIE_HOST_DEVICE double derivative(Index t, Index e) const { return formula::normal_density(distance(t, e)) / deviation; }
};

/// Everything together: one number.
struct BalanceLoss {
  BalanceRow row;
  const double* of_tokens = nullptr;  // z-loss and entropy, summed
  double* loss = nullptr;

  MOXIE_HOST_DEVICE void operator()(Index /*one*/, auto lanes) const {
    const double n = double(row.starts[row.sequences]);
    double sum = 0;
    for (Index e = lanes.first(); e < row.experts; e += lanes.step()) {
      const double share = row.batch_p[e] / n;
      sum += (row.weights.expert_level * row.frequency(e) + row.weights.device_level * row.device_frequency(e)) * share;
      sum -= row.weights.mean_entropy * formula::entropy_term(share);
    }
    for (Index b = lanes.first(); b < row.sequences; b += lanes.step()) {
      sum += row.of_sequence[b];
    }
    sum = lanes.sum(sum);
    if (lanes.first() == 0) {
      *loss = sum + (row.weights.z * of_tokens[0] + row.weights.token_entropy * of_tokens[1]) / n;
    }
  }
};

/// b_i += γ sign(mean load - load_i), then b_i -= mean b where it recentres: a row alone.
template <class Scalar>
struct SelectionBiasRow {
  const double* load;
  Index experts;
  double rate;
  bool recentre;
  Scalar* bias;

  MOXIE_HOST_DEVICE void operator()(Index /*one*/, auto lanes) const {
    double total = 0;
    for (Index e = lanes.first(); e < experts; e += lanes.step()) {
      total += load[e];
    }
    total = lanes.sum(total);
    double mean = 0;
    for (Index e = lanes.first(); e < experts; e += lanes.step()) {
      bias[e] += Scalar(rate * formula::load_direction(load[e], total, double(experts)));
      mean += double(bias[e]) / double(experts);
    }
    mean = lanes.sum(mean);
    for (Index e = lanes.first(); recentre && e < experts; e += lanes.step()) {
      bias[e] -= Scalar(mean);
    }
  }
};

/// What the losses look at, as in `moxie::BalanceInput`: all (T,E), or (T,K).
template <class Scalar>
struct BalanceInput {
  Index top_k = 1;
  DeviceRows<const Scalar> probabilities;  ///< of the logits that select
  DeviceRows<const Scalar> clean;          ///< of the logits without noise
  DeviceRows<const Scalar> logits;         ///< without noise
  DeviceRows<const Scalar> noisy_logits;
  const int* counted = nullptr;
  const int* best = nullptr;
  double deviation = 0;  ///< of the noise; 0: there is none
};

/// The balance losses of a forward: their sum, and their gradient with respect to the numbers of every sequence.
class BalanceTape {
 public:
  template <class Scalar>
  void set(DeviceExec& exec, const Balance& weights, const DeviceSequences& sequences, const BalanceInput<Scalar>& in) {
    const Index experts = in.logits.cols;
    const Index count = sequences.count();
    const auto k = int(in.top_k);
    double* loss = loss_.resize(exec, 1);
    known_ = false;
    if (sequences.tokens() == 0) {
      exec.zero(loss, 1);
      return;
    }
    const Groups groups = sequences.groups();
    const DeviceExec::Frame frame(exec);
    BalanceRow row;
    row.weights = weights;
    row.experts = experts;
    row.sequences = count;
    row.k = double(k);
    row.starts = groups.device;
    for (Index b = 0; b < count; ++b) {
      row.nonempty += groups.rows(b) > 0 ? 1 : 0;
    }
    const auto sums = [&](auto value) {
      double* out = exec.scratch<double>(count * experts);
      column_sums<double>(exec, groups, experts, value, GroupRows<double>{out, experts}, sequences.room());
      return out;
    };
    const auto of_batch = [&](const double* of_sequence) {
      double* out = exec.scratch<double>(experts);
      exec.for_each(experts, SumSequences{of_sequence, count, experts, out});
      return out;
    };
    const DeviceRows<const Scalar> p = in.probabilities;
    row.counts = sums(TimesChosen{in.counted, k, k});
    row.firsts = weights.gshard > 0 ? sums(TimesChosen{in.best, k, 1}) : nullptr;
    row.p = sums(ElementOf<double, Scalar>{p});
    row.batch_count = of_batch(row.counts);
    row.batch_p = of_batch(row.p);
    row.coefficient = coefficient_.resize(exec, count * experts);
    row.of_sequence = exec.scratch<double>(count);
    exec.zero(row.coefficient, count * experts);
    exec.for_each_row(count, row);
    add_variations(exec, row, in, sums);
    double* of_tokens = exec.scratch<double>(2);
    if (weights.z > 0 || weights.token_entropy > 0) {
      const TokenLoss<Scalar> value{weights.z > 0 ? in.logits : DeviceRows<const Scalar>(),
                                    weights.token_entropy > 0 ? p : DeviceRows<const Scalar>()};
      column_sums<double>(exec, sequences.tokens(), 2, value, GroupRows<double>{of_tokens, 2}, sequences.room());
    } else {
      exec.zero(of_tokens, 2);
    }
    exec.for_each_row(1, BalanceLoss{row, of_tokens, loss});
  }

  /// (B,E): ∂loss/∂p_te for the tokens of sequence b; with noise that of importance for the clean p, and of load, apart.
  const double* coefficient() const { return coefficient_.data(); }
  const double* importance() const { return importance_.data(); }
  const double* load() const { return load_.data(); }
  /// The losses, weighted. Waits for the device, once a forward.
  double loss(DeviceExec& exec) const {
    if (!known_ && loss_.size() > 0) {
      exec.read(loss_.data(), &value_, 1);
      known_ = true;
    }
    return value_;
  }

 private:
  /// The importance and load losses. `sums(value)` adds a value up over the tokens of each sequence.
  template <class Scalar, class Sums>
  void add_variations(DeviceExec& exec, const BalanceRow& row, const BalanceInput<Scalar>& in, const Sums& sums) {
    const Balance& weights = row.weights;
    const Index count = row.sequences;
    const Index experts = row.experts;
    const bool noisy = in.deviation > 0;
    const double share = 1 / double(row.nonempty);
    if (weights.importance > 0) {
      double* coefficient = row.coefficient;
      if (noisy) {
        coefficient = importance_.resize(exec, count * experts);
        exec.zero(coefficient, count * experts);
      }
      const double* of_clean = noisy ? sums(ElementOf<double, Scalar>{in.clean}) : row.p;
      exec.for_each_row(count, VariationRow{of_clean, experts, weights.importance * share, coefficient, row.of_sequence});
    }
    if (weights.load > 0 && noisy) {
      double* coefficient = load_.resize(exec, count * experts);
      exec.zero(coefficient, count * experts);
      const double* load = sums(LoadOf<Scalar>{in.logits, in.noisy_logits, in.best, int(in.top_k), in.deviation});
      exec.for_each_row(count, VariationRow{load, experts, weights.load * share, coefficient, row.of_sequence});
    }
  }

  DeviceBuffer<double> coefficient_, importance_, load_;
  DeviceBuffer<double> loss_;
  mutable double value_ = 0;
  mutable bool known_ = false;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

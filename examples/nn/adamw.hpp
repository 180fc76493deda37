// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <moxie/moxie.hpp>
#include <numeric>
#include <vector>

namespace nn {

using moxie::Exec;
using moxie::Index;
using moxie::Parameters;

/// Pieces of a flat block, for loops over all parameters: their size does not depend on the number of threads, so sums do not.
inline constexpr Index piece = 1 << 14;

/// ‖g‖₂ of a block, accumulated in double. NaN or infinite if an element is.
template <class S>
double norm(const Parameters<S>& g, const Exec& exec) {
  const Index n = g.flat().size();
  std::vector<double> sums(static_cast<std::size_t>((n + piece - 1) / piece));
  exec.parallel_for(Index(sums.size()), [&](Index i) {
    constexpr Index lanes = 8;  // that do not wait for each other
    std::array<double, lanes> sum{};
    const S* const begin = g.flat().data() + i * piece;
    const Index size = std::min(piece, n - i * piece);
    for (Index j = 0; j + lanes <= size; j += lanes) {
      for (Index l = 0; l < lanes; ++l) {
        sum[std::size_t(l)] += double(begin[j + l]) * double(begin[j + l]);
      }
    }
    for (Index j = size / lanes * lanes; j < size; ++j) {
      sum[0] += double(begin[j]) * double(begin[j]);
    }
    sums[static_cast<std::size_t>(i)] = std::accumulate(sum.begin(), sum.end(), 0.0);
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

/// All parameters become zero, gradients before a step.
template <class S>
void set_zero(Parameters<S>& p, const Exec& exec) {
  exec.parallel_ranges(p.flat().size(), piece, [&](Index begin, Index end) { p.flat().segment(begin, end - begin).setZero(); });
}

template <class S>
void scale(Parameters<S>& p, S factor, const Exec& exec) {
  exec.parallel_ranges(p.flat().size(), piece, [&](Index begin, Index end) { p.flat().segment(begin, end - begin) *= factor; });
}

struct AdamWConfig {
  double rate = 2e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;
  double clip = 1;             ///< gradients are scaled down to this norm; 0 leaves them
  std::int64_t warm_up = 200;  ///< steps over which the rate rises linearly
  double ema_decay = 0.997;
};

/// AdamW (Loshchilov and Hutter 2019) with clipping and warm-up, and an exponential moving average of the weights:
///
///     m = β1 m + (1-β1) g,  v = β2 v + (1-β2) g²,  w -= rate (m̂ / (√v̂ + ε) + decay w),  ema = d ema + (1-d) w,
///     d = min(ema_decay, n / (9 + n)) in step n = 1, 2, ...
template <class S>
class AdamW {
 public:
  AdamW(const AdamWConfig& config, const Parameters<S>& weights)
      : config_(config), m_(weights.zeros_like()), v_(weights.zeros_like()), ema_(weights) {}

  /// One step; returns the norm of the gradient before clipping. Throws ValueError, and changes nothing, if it is not finite.
  double step(Parameters<S>& weights, const Parameters<S>& grads, const Exec& exec) {
    const double length = norm(grads, exec);
    moxie::detail::expect_value(std::isfinite(length), "AdamW::step", "the gradient is not finite");
    const double n = double(++steps_);
    const double scale = config_.clip > 0 && length > config_.clip ? config_.clip / length : 1.0;
    const double rate = config_.rate * (config_.warm_up > 0 ? std::min(1.0, n / double(config_.warm_up)) : 1.0);
    const auto beta1 = S(config_.beta1);
    const auto beta2 = S(config_.beta2);
    const auto correction1 = S(1 / (1 - std::pow(config_.beta1, n)));
    const auto correction2 = S(1 / (1 - std::pow(config_.beta2, n)));
    const auto decay = S(1 - rate * config_.weight_decay);
    const auto ema = S(std::min(config_.ema_decay, n / (9 + n)));
    exec.parallel_ranges(weights.flat().size(), piece, [&](Index begin, Index end) {
      const auto part = [&](auto&& block) { return block.flat().segment(begin, end - begin); };
      auto w = part(weights);
      auto m = part(m_);
      auto v = part(v_);
      auto average = part(ema_);
      const auto g = part(grads) * S(scale);
      m = beta1 * m + (S(1) - beta1) * g;
      v = beta2 * v + (S(1) - beta2) * g.square();
      w = decay * w - S(rate) * (m * correction1) / ((v * correction2).sqrt() + S(config_.epsilon));
      average = ema * average + (S(1) - ema) * w;
    });
    return length;
  }

  const AdamWConfig& config() const { return config_; }
  std::int64_t steps() const { return steps_; }
  void set_steps(std::int64_t steps) { steps_ = steps; }
  Parameters<S>& m() { return m_; }
  Parameters<S>& v() { return v_; }
  Parameters<S>& ema() { return ema_; }

 private:
  AdamWConfig config_;
  std::int64_t steps_ = 0;
  Parameters<S> m_;
  Parameters<S> v_;
  Parameters<S> ema_;
};

}  // namespace nn

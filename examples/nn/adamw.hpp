// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <moxie/moxie.hpp>
#include <numbers>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace nn {

using moxie::Exec;
using moxie::Index;
using moxie::Parameters;
using moxie::TensorInfo;

/// Elements in a piece of a flat block, for loops over all parameters. The pieces do not depend on the number of threads, so
/// neither do sums over them.
inline constexpr Index piece = 1 << 14;

/// ‖g‖₂ of a block, accumulated in double. NaN or infinite if an element is.
template <class S>
double norm(const Parameters<S>& g, const Exec& exec) {
  const Index n = g.flat().size();
  std::vector<double> sums(static_cast<std::size_t>((n + piece - 1) / piece));
  exec.parallel_for(Index(sums.size()), [&](Index i) {
    constexpr Index lanes = 8;  // independent sums, so that additions overlap
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

/// All elements become zero: gradients before a step.
template <class S>
void set_zero(Parameters<S>& p, const Exec& exec) {
  exec.parallel_ranges(p.flat().size(), piece, [&](Index begin, Index end) { p.flat().segment(begin, end - begin).setZero(); });
}

/// All elements are multiplied by `factor`.
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

/// The factor of the learning rate in step n = 1, 2, ...
using Schedule = std::function<double(std::int64_t)>;

/// min(1, n / steps).
inline Schedule linear_warm_up(std::int64_t steps) {
  return [=](std::int64_t n) { return steps > 0 ? std::min(1.0, double(n) / double(steps)) : 1.0; };
}

/// Warm-up, then half a cosine from 1 down to `last` in step `steps` (Loshchilov and Hutter 2017); `last` from then on.
inline Schedule cosine_decay(std::int64_t warm_up, std::int64_t steps, double last = 0) {
  return [=](std::int64_t n) {
    const double way = std::clamp(double(n - warm_up) / double(std::max<std::int64_t>(1, steps - warm_up)), 0.0, 1.0);
    return linear_warm_up(warm_up)(n) * (last + (1 - last) * 0.5 * (1 + std::cos(std::numbers::pi * way)));
  };
}

/// What AdamW does with one tensor.
struct TensorRule {
  double rate = 1;          ///< multiplies `AdamWConfig::rate`; 0 freezes the tensor
  double weight_decay = 0;  ///< in the place of `AdamWConfig::weight_decay`
  Schedule schedule = {};   ///< in the place of `AdamWConfig::warm_up`, if there is one
};

/// AdamW (Loshchilov and Hutter 2019) with clipping, and an exponential moving average of the weights:
///
///     g = grad · min(1, clip / ‖grad‖),  m = β1 m + (1-β1) g,  v = β2 v + (1-β2) g²
///     η = rate · r · s(n),   w = w - η (m̂ / (√v̂ + ε) + λ w)          m̂ = m / (1 - β1ⁿ), v̂ = v / (1 - β2ⁿ)
///     ema = d ema + (1-d) w,   d = min(ema_decay, n / (9 + n))       in step n = 1, 2, ...
///
/// The factor r, the decay λ and the schedule s belong to each tensor: a `TensorRule` that the constructor asks for. Tensors
/// that no gradient trains (`Trained::elsewhere`) are neither moved nor decayed; their average follows them.
///
/// The result is bit-identical for any number of threads. Cost: one pass over five blocks.
template <class S>
class AdamW {
 public:
  /// All tensors have r = 1, the config's decay and its warm-up.
  AdamW(const AdamWConfig& config, const Parameters<S>& weights)
      : AdamW(config, weights, [&](const TensorInfo&) { return TensorRule{.weight_decay = config.weight_decay}; }) {}

  /// `rule(info)` gives the `TensorRule` of each tensor; it is called here only. Decay for the weights alone, and half the
  /// rate for gates, for example:
  ///
  ///     AdamW<float> adam(config, weights, [](const moxie::TensorInfo& t) {
  ///       return nn::TensorRule{.rate = t.role == moxie::Role::gate ? 0.5 : 1,
  ///                             .weight_decay = t.role == moxie::Role::weight ? 0.1 : 0};
  ///     });
  ///
  /// Throws ValueError if a rate or a decay is negative or not finite.
  template <class Rule>
  AdamW(const AdamWConfig& config, const Parameters<S>& weights, Rule&& rule)
      : config_(config), m_(weights.zeros_like()), v_(weights.zeros_like()), ema_(weights) {
    const std::vector<TensorInfo>& tensors = weights.layout().tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      TensorRule found =
          tensors[i].trained == moxie::Trained::by_gradient ? TensorRule(rule(tensors[i])) : TensorRule{.rate = 0};
      for (const double number : {found.rate, found.weight_decay}) {
        moxie::detail::expect_value(number >= 0 && std::isfinite(number), "AdamW",
                                    "a rate or a decay of '" + tensors[i].name + "' is negative or not finite");
      }
      if (!found.schedule) {
        found.schedule = linear_warm_up(config.warm_up);
      }
      rules_.push_back(std::move(found));
      const Index first = weights.layout().offset(Index(i));
      const Index end = first + tensors[i].rows * tensors[i].cols;
      for (Index begin = first; begin < end; begin += piece) {
        pieces_.push_back({begin, std::min(piece, end - begin), i});
      }
    }
  }

  /// One step. Returns the norm of the gradient before clipping. Throws ValueError, and changes nothing, if it is not finite.
  double step(Parameters<S>& weights, const Parameters<S>& grads, const Exec& exec = {}) {
    const double length = norm(grads, exec);
    moxie::detail::expect_value(std::isfinite(length), "AdamW::step", "the gradient is not finite");
    const double n = double(++steps_);
    const double clipped = config_.clip > 0 && length > config_.clip ? config_.clip / length : 1.0;
    const auto beta1 = S(config_.beta1);
    const auto beta2 = S(config_.beta2);
    const auto correction1 = S(1 / (1 - std::pow(config_.beta1, n)));
    const auto correction2 = S(1 / (1 - std::pow(config_.beta2, n)));
    const auto ema = S(std::min(config_.ema_decay, n / (9 + n)));
    std::vector<double> rates;  // of each tensor
    for (const TensorRule& rule : rules_) {
      rates.push_back(config_.rate * rule.rate * rule.schedule(steps_));
    }
    exec.parallel_for(Index(pieces_.size()), [&](Index i) {
      const Piece& place = pieces_[std::size_t(i)];
      const auto part = [&](auto&& block) { return block.flat().segment(place.begin, place.size); };
      const double rate = rates[place.tensor];
      const auto decay = S(1 - rate * rules_[place.tensor].weight_decay);
      auto w = part(weights);
      auto m = part(m_);
      auto v = part(v_);
      auto average = part(ema_);
      const auto g = part(grads) * S(clipped);
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
  struct Piece {
    Index begin;
    Index size;
    std::size_t tensor;
  };

  AdamWConfig config_;
  std::int64_t steps_ = 0;
  std::vector<TensorRule> rules_;  // one for each tensor
  std::vector<Piece> pieces_;
  Parameters<S> m_;
  Parameters<S> v_;
  Parameters<S> ema_;
};

}  // namespace nn

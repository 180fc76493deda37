// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <moxie/core/exec.hpp>
#include <moxie/core/matrix.hpp>
#include <numbers>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dit {

using moxie::Exec;
using moxie::Index;
using moxie::RowView;

/// How much noise each of the N steps of a diffusion adds: its β_t.
enum class NoiseSchedule {
  linear,  ///< from 1e-4 · 1000/N to 0.02 · 1000/N: Ho et al. 2020
  cosine,  ///< 1 - ᾱ((t+1)/N) / ᾱ(t/N), at most 0.999, with ᾱ(u) = cos²((u + 0.008) / 1.008 · π/2): Nichol and Dhariwal 2021
};

/// What the network says of the variance of a step.
enum class StepVariance {
  learned_range,  ///< an output v a pixel, log variance = f log β_t + (1 - f) log β̃_t with f = (v + 1) / 2: Nichol and Dhariwal
  fixed_large,  ///< nothing; β_t
  fixed_small,  ///< nothing; β̃_t, the posterior's
};

namespace detail {

inline Index step_count(std::string_view text, std::string_view respacing) {
  Index n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc{} || end != text.data() + text.size() || n < 1) {
    throw std::invalid_argument("respacing '" + std::string(respacing) +
                                "': expected nothing, counts separated by commas, or 'ddim' and a count");
  }
  return n;
}

}  // namespace detail

/// The steps, of `steps`, that a shorter diffusion keeps, in order: all for "". "n,m,..." cuts the steps into as many sections
/// of about equal length, and takes n, m, ... of them at equal distances, the first and the last of each included. "ddimN"
/// takes every i-th from the first on, with the smallest i that gives N of them. Throws std::invalid_argument if there is no
/// such choice.
inline std::vector<Index> respaced_steps(Index steps, std::string_view respacing) {
  std::vector<Index> kept;
  const auto fail = [&](const std::string& why) -> void {
    throw std::invalid_argument("respacing '" + std::string(respacing) + "': " + why);
  };
  if (respacing.starts_with("ddim")) {
    const Index wanted = detail::step_count(respacing.substr(4), respacing);
    Index stride = 1;
    while (stride < steps && (steps + stride - 1) / stride != wanted) {
      ++stride;
    }
    if ((steps + stride - 1) / stride != wanted) {
      fail("no stride takes " + std::to_string(wanted) + " of " + std::to_string(steps) + " steps");
    }
    for (Index t = 0; t < steps; t += stride) {
      kept.push_back(t);
    }
    return kept;
  }
  std::vector<Index> counts;
  for (std::string_view rest = respacing; !respacing.empty();) {
    const std::size_t comma = rest.find(',');
    counts.push_back(detail::step_count(rest.substr(0, comma), respacing));
    if (comma == std::string_view::npos) {
      break;
    }
    rest.remove_prefix(comma + 1);
  }
  if (counts.empty()) {
    counts.push_back(steps);
  }
  const Index sections = Index(counts.size());
  Index start = 0;
  for (Index i = 0; i < sections; ++i) {
    const Index count = counts[std::size_t(i)];
    const Index size = steps / sections + (i < steps % sections ? 1 : 0);
    if (count > size) {
      fail("a section of " + std::to_string(size) + " steps has no " + std::to_string(count));
    }
    const double stride = count > 1 ? double(size - 1) / double(count - 1) : 1;
    double at = 0;
    for (Index j = 0; j < count; ++j, at += stride) {
      kept.push_back(start + Index(std::nearbyint(at)));  // half to even
    }
    start += size;
  }
  return kept;
}

/// A diffusion of images x_0 into noise in T steps, and what follows from its β_t:
///
///     q(x_t | x_0) = N(√ᾱ_t x_0, 1 - ᾱ_t),                     ᾱ_t = Π_{s ≤ t} (1 - β_s)
///     q(x_{t-1} | x_t, x_0) = N(c1_t x_0 + c2_t x_t, β̃_t),     β̃_t = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)
///
/// Ho et al. 2020, equations 4 to 7. Kept steps of a longer diffusion have the ᾱ that it has there. In double.
struct DiffusionSchedule {
  NoiseSchedule noise;
  Index whole;                   ///< steps of the long diffusion
  std::vector<Index> timesteps;  ///< of the long diffusion: what the network is told
  std::vector<double> betas;
  std::vector<double> alphas_cumprod;       ///< ᾱ_t
  std::vector<double> alphas_cumprod_prev;  ///< ᾱ_{t-1}, 1 for the first
  std::vector<double> alphas_cumprod_next;  ///< ᾱ_{t+1}, 0 for the last
  std::vector<double> sqrt_alphas_cumprod;
  std::vector<double> sqrt_one_minus_alphas_cumprod;
  std::vector<double> log_one_minus_alphas_cumprod;
  std::vector<double> sqrt_recip_alphas_cumprod;    ///< √(1/ᾱ_t)
  std::vector<double> sqrt_recipm1_alphas_cumprod;  ///< √(1/ᾱ_t - 1)
  std::vector<double> posterior_variance;           ///< β̃_t
  /// log β̃_t. That of the first step, where β̃ is zero, is the second's.
  std::vector<double> posterior_log_variance_clipped;
  std::vector<double> posterior_mean_coef1;  ///< c1_t
  std::vector<double> posterior_mean_coef2;  ///< c2_t

  /// Throws std::invalid_argument for fewer than two steps, or a respacing that cannot be read.
  explicit DiffusionSchedule(NoiseSchedule kind = NoiseSchedule::linear, Index steps = 1000, std::string_view respacing = "")
      : noise(kind), whole(steps) {
    if (steps < 2) {
      throw std::invalid_argument("a diffusion has at least 2 steps, got " + std::to_string(steps));
    }
    timesteps = respaced_steps(steps, respacing);
    if (timesteps.size() < 2) {
      throw std::invalid_argument("a diffusion has at least 2 steps, got respacing '" + std::string(respacing) + "'");
    }
    std::vector<double> kept(std::size_t(steps), 0);
    double product = 1;
    for (Index t = 0; t < steps; ++t) {
      if (!(beta(kind, t, steps) < 1 - 1e-9)) {
        throw std::invalid_argument("a diffusion of " + std::to_string(steps) +
                                    " steps has one that leaves nothing of the image: this schedule needs more steps");
      }
      product *= 1 - beta(kind, t, steps);
      kept[std::size_t(t)] = product;
    }
    double before = 1;
    for (const Index t : timesteps) {
      betas.push_back(1 - kept[std::size_t(t)] / before);
      before = kept[std::size_t(t)];
    }
    const std::size_t n = betas.size();
    product = 1;
    for (const double b : betas) {
      alphas_cumprod_prev.push_back(product);
      product *= 1 - b;
      alphas_cumprod.push_back(product);
    }
    for (std::size_t t = 0; t < n; ++t) {
      const double a = alphas_cumprod[t];
      const double previous = alphas_cumprod_prev[t];
      alphas_cumprod_next.push_back(t + 1 < n ? alphas_cumprod[t + 1] : 0);
      sqrt_alphas_cumprod.push_back(std::sqrt(a));
      sqrt_one_minus_alphas_cumprod.push_back(std::sqrt(1 - a));
      log_one_minus_alphas_cumprod.push_back(std::log(1 - a));
      sqrt_recip_alphas_cumprod.push_back(std::sqrt(1 / a));
      sqrt_recipm1_alphas_cumprod.push_back(std::sqrt(1 / a - 1));
      posterior_variance.push_back(betas[t] * (1 - previous) / (1 - a));
      posterior_mean_coef1.push_back(betas[t] * std::sqrt(previous) / (1 - a));
      posterior_mean_coef2.push_back((1 - previous) * std::sqrt(1 - betas[t]) / (1 - a));
    }
    for (std::size_t t = 0; t < n; ++t) {
      posterior_log_variance_clipped.push_back(std::log(posterior_variance[std::max(t, std::size_t(1))]));
    }
  }

  Index steps() const { return Index(betas.size()); }
  /// Other steps of the same long diffusion.
  DiffusionSchedule respaced(std::string_view respacing) const { return DiffusionSchedule(noise, whole, respacing); }

 private:
  static double beta(NoiseSchedule kind, Index t, Index steps) {
    if (kind == NoiseSchedule::linear) {
      const double scale = 1000.0 / double(steps);
      const double first = scale * 1e-4;
      const double last = scale * 0.02;
      return first + (last - first) * double(t) / double(steps - 1);
    }
    const auto alpha_bar = [](double u) {
      const double c = std::cos((u + 0.008) / 1.008 * std::numbers::pi / 2);
      return c * c;
    };
    return std::min(1 - alpha_bar(double(t + 1) / double(steps)) / alpha_bar(double(t) / double(steps)), 0.999);
  }
};

/// The Gaussian diffusion of DDPM with a network that predicts the noise ε, and, where the variance is learned, v.
///
/// Images are rows of n numbers; a network's output has ε in its first n columns and v in n more. Everything is computed in
/// double, pixel by pixel, for each image at its own step t.
class GaussianDiffusion {
 public:
  explicit GaussianDiffusion(DiffusionSchedule schedule, StepVariance variance = StepVariance::learned_range)
      : schedule_(std::move(schedule)), variance_(variance) {}

  const DiffusionSchedule& schedule() const { return schedule_; }
  StepVariance variance() const { return variance_; }
  /// Columns of a network's output for images of n numbers.
  Index output_columns(Index n) const { return variance_ == StepVariance::learned_range ? 2 * n : n; }

  /// The step that belongs to u, which is uniform on [0,1).
  Index time(double u) const { return std::min(Index(u * double(schedule_.steps())), schedule_.steps() - 1); }
  /// x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) noise.
  double noised(double x_start, Index t, double noise) const {
    const auto i = std::size_t(t);
    return schedule_.sqrt_alphas_cumprod[i] * x_start + schedule_.sqrt_one_minus_alphas_cumprod[i] * noise;
  }
  /// The mean of q(x_{t-1} | x_t, x_0).
  double posterior_mean(double x_start, double x_t, Index t) const {
    const auto i = std::size_t(t);
    return schedule_.posterior_mean_coef1[i] * x_start + schedule_.posterior_mean_coef2[i] * x_t;
  }

  /// A pixel of p(x_{t-1} | x_t), and the image that it leads to.
  struct Prediction {
    double x_start = 0;
    double mean = 0;
    double log_variance = 0;
  };
  /// `clip` keeps the predicted image in [-1, 1].
  Prediction predict(double x_t, double eps, double v, Index t, bool clip) const {
    const double x_start = start_of(x_t, eps, t, clip);
    return {x_start, posterior_mean(x_start, x_t, t), log_variance(v, t)};
  }

  /// An image's loss, its parts in means over its pixels.
  struct Loss {
    double mse = 0;  ///< (noise - ε)²
    double vb = 0;   ///< the variational bound's term for this step, in bits; its gradient goes to v alone. Zero if fixed
    double total() const { return mse + vb; }
  };
  /// L_hybrid of Nichol and Dhariwal 2021, equation 16, with λ = 1 as in the code of DiT: mse + vb, vb that of a KL divergence,
  /// or for t = 0 of the likelihood of 8-bit pixels. `rescaled` multiplies vb by T/1000. If `doutput` has columns it becomes
  /// `dloss` times the loss's gradient.
  template <class S>
  Loss loss(RowView<const S> x_start, RowView<const S> x_t, RowView<const S> noise, RowView<const S> output, Index image,
            Index t, bool rescaled, double dloss, RowView<S> doutput) const {
    const Index n = x_start.cols();
    const double weight = rescaled ? double(schedule_.steps()) / 1000 : 1;
    Loss sum;
    for (Index j = 0; j < n; ++j) {
      const double eps = double(output(image, j));
      const double difference = eps - double(noise(image, j));
      sum.mse += difference * difference;
      if (doutput.size() != 0) {
        doutput(image, j) = S(dloss * 2 * difference / double(n));
      }
      if (variance_ == StepVariance::learned_range) {
        const auto [value, dv] = bound(double(x_start(image, j)), double(x_t(image, j)), eps, double(output(image, n + j)), t);
        sum.vb += weight * value;
        if (doutput.size() != 0) {
          doutput(image, n + j) = S(dloss * weight * dv / double(n));
        }
      }
    }
    sum.mse /= double(n);
    sum.vb /= double(n);
    return sum;
  }

  /// A draw from p(x_{t-1} | x_t): mean + σ noise, and for t = 0 the mean. Ho et al. 2020, algorithm 2.
  double ddpm_step(double x_t, double eps, double v, Index t, double noise, bool clip) const {
    const Prediction p = predict(x_t, eps, v, t, clip);
    return p.mean + (t > 0 ? std::exp(0.5 * p.log_variance) * noise : 0);
  }
  /// Song, Meng and Ermon 2021, equation 12; `eta` = 0 adds no noise, 1 as much as DDPM.
  double ddim_step(double x_t, double eps, Index t, double noise, double eta, bool clip) const {
    const auto i = std::size_t(t);
    const auto [x_start, direction] = start_and_noise(x_t, eps, t, clip);
    const double a = schedule_.alphas_cumprod[i];
    const double previous = schedule_.alphas_cumprod_prev[i];
    const double sigma = eta * std::sqrt((1 - previous) / (1 - a)) * std::sqrt(1 - a / previous);
    return std::sqrt(previous) * x_start + std::sqrt(1 - previous - sigma * sigma) * direction + (t > 0 ? sigma * noise : 0);
  }
  /// The other way round: x_{t+1} of the path that has no noise.
  double ddim_reverse_step(double x_t, double eps, Index t, bool clip) const {
    const auto [x_start, direction] = start_and_noise(x_t, eps, t, clip);
    const double next = schedule_.alphas_cumprod_next[std::size_t(t)];
    return std::sqrt(next) * x_start + std::sqrt(1 - next) * direction;
  }

  /// The log variance of a step for the output v.
  double log_variance(double v, Index t) const {
    const auto i = std::size_t(t);
    switch (variance_) {
      case StepVariance::learned_range: {
        const double fraction = (v + 1) / 2;
        return fraction * std::log(schedule_.betas[i]) + (1 - fraction) * schedule_.posterior_log_variance_clipped[i];
      }
      case StepVariance::fixed_large:
        return std::log(t == 0 ? schedule_.posterior_variance[1] : schedule_.betas[i]);
      case StepVariance::fixed_small:
        break;
    }
    return schedule_.posterior_log_variance_clipped[i];
  }

 private:
  /// The predicted image.
  double start_of(double x_t, double eps, Index t, bool clip) const {
    const auto i = std::size_t(t);
    const double x = schedule_.sqrt_recip_alphas_cumprod[i] * x_t - schedule_.sqrt_recipm1_alphas_cumprod[i] * eps;
    return clip ? std::clamp(x, -1.0, 1.0) : x;
  }
  /// The same, and the noise that leads from it to x_t.
  std::pair<double, double> start_and_noise(double x_t, double eps, Index t, bool clip) const {
    const auto i = std::size_t(t);
    const double x_start = start_of(x_t, eps, t, clip);
    return {x_start, (schedule_.sqrt_recip_alphas_cumprod[i] * x_t - x_start) / schedule_.sqrt_recipm1_alphas_cumprod[i]};
  }

  /// A pixel's term of the bound in bits, and its derivative for v.
  std::pair<double, double> bound(double x_start, double x_t, double eps, double v, Index t) const {
    const auto i = std::size_t(t);
    const Prediction p = predict(x_t, eps, v, t, false);
    const double dlog_variance = (std::log(schedule_.betas[i]) - schedule_.posterior_log_variance_clipped[i]) / 2;
    const auto [value, derivative] =
        t == 0 ? negative_log_likelihood(x_start, p.mean, p.log_variance)
               : kl(posterior_mean(x_start, x_t, t), schedule_.posterior_log_variance_clipped[i], p.mean, p.log_variance);
    return {value / std::numbers::ln2, derivative * dlog_variance / std::numbers::ln2};
  }
  /// KL(N(m1, exp l1) || N(m2, exp l2)), and its derivative for l2.
  static std::pair<double, double> kl(double m1, double l1, double m2, double l2) {
    const double ratio = std::exp(l1 - l2);
    const double square = (m1 - m2) * (m1 - m2) * std::exp(-l2);
    return {0.5 * (-1 + l2 - l1 + ratio + square), 0.5 * (1 - ratio - square)};
  }
  /// -log of the probability that N(mean, exp l) gives to the pixel's step of 2/255, and its derivative for l. The outermost
  /// steps reach to infinity; probabilities are at least 1e-12; the distribution function is 0.5 (1 + tanh(√(2/π) (z + 0.044715
  /// z³))).
  static std::pair<double, double> negative_log_likelihood(double x, double mean, double l) {
    constexpr double least = 1e-12;
    // The distribution function at z = (x + shift - mean) / σ, and its derivative for l.
    const auto distribution = [&](double shift) {
      const double z = (x - mean + shift) * std::exp(-0.5 * l);
      const double c = std::sqrt(2 / std::numbers::pi);
      const double th = std::tanh(c * (z + 0.044715 * z * z * z));
      return std::pair(0.5 * (1 + th), 0.5 * ((1 - th) * (1 + th)) * c * (1 + 3 * 0.044715 * z * z) * -0.5 * z);
    };
    const auto [above, dabove] = distribution(1.0 / 255);
    const auto [below, dbelow] = distribution(-1.0 / 255);
    const double probability = x < -0.999 ? above : x > 0.999 ? 1 - below : above - below;
    const double derivative = x < -0.999 ? dabove : x > 0.999 ? -dbelow : dabove - dbelow;
    return {-std::log(std::max(probability, least)), probability >= least ? -derivative / probability : 0};
  }

  DiffusionSchedule schedule_;
  StepVariance variance_;
};

}  // namespace dit

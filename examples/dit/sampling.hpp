// SPDX-License-Identifier: MIT
#pragma once

#include <charconv>
#include <dit/model.hpp>
#include <dit/process.hpp>
#include <string>

namespace dit {

/// How images are drawn.
struct SamplerConfig {
  std::string method =
      {};  ///< euler, heun (rectified flow), ddpm, ddim (diffusion); empty: euler, ddpm, or ddim if steps say so
  std::string steps = "25";   ///< how many; of a diffusion a respacing of its steps: "250", "10,15,20", "ddim50"
  double guidance = 3;        ///< 1: none
  Index guided_channels = 0;  ///< 0: all; the samplers of DiT and DiT-MoE for DDPM guide 3
  double eta = 0;             ///< noise of DDIM: 0 none, 1 as much as DDPM
  bool clip = false;          ///< a diffusion's predicted images to [-1,1], which latents are not in
};

/// Classifier-free guidance (Ho and Salimans 2022): rows [0,n) of v are predictions for labels, rows [n,2n) those for no class.
/// The first `columns` of both become
///
///     v(∅) + guidance (v(label) - v(∅))
template <class S>
void guide(RowView<S> v, Index columns, double guidance) {
  const Index n = v.rows() / 2;
  auto with = v.eigen().topRows(n).leftCols(columns);
  auto without = v.eigen().bottomRows(n).leftCols(columns);
  with = without + S(guidance) * (with - without);
  without = with;
}

/// Draws images with a model, from noise to image.
template <class AnyModel, class S>
class Sampler {
 public:
  /// Throws ValueError for a method that the process does not have and for options out of range, std::invalid_argument for
  /// steps that cannot be read.
  Sampler(const Process& process, const SamplerConfig& config, const AnyModel& model) : config_(config), model_(model) {
    constexpr std::string_view where = "Sampler";
    const bool flow = std::holds_alternative<RectifiedFlow>(process);
    std::string& method = config_.method;
    if (method.empty()) {
      method = flow ? "euler" : config.steps.starts_with("ddim") ? "ddim" : "ddpm";
    }
    const bool of_flow = method == "euler" || method == "heun";
    moxie::detail::expect_value(of_flow || method == "ddpm" || method == "ddim", where,
                                "the method is euler, heun, ddpm or ddim, not '" + method + "'");
    moxie::detail::expect_value(
        of_flow == flow, where,
        flow ? "rectified flow is sampled by euler or heun" : "a diffusion (DDPM) is sampled by ddpm or ddim");
    moxie::detail::expect_value(std::isfinite(config.guidance) && config.eta >= 0 && config.eta <= 1, where,
                                "guidance must be finite, and eta between 0 and 1");
    moxie::detail::expect_value(config.eta == 0 || method == "ddim", where, "only ddim has an eta");
    moxie::detail::expect_value(!config.clip || !flow, where, "rectified flow predicts no images to clip");
    moxie::detail::expect_value(config.guided_channels >= 0 && config.guided_channels <= model.config().channels, where,
                                "there are not so many channels to guide");
    if (flow) {
      const auto [end, error] = std::from_chars(config.steps.data(), config.steps.data() + config.steps.size(), steps_);
      if (error != std::errc{} || end != config.steps.data() + config.steps.size() || steps_ < 1) {
        throw std::invalid_argument("steps '" + config.steps + "': expected a number, at least 1 (euler, heun)");
      }
    } else {
      const auto& diffusion = std::get<GaussianDiffusion>(process);
      diffusion_.emplace(diffusion.schedule().respaced(config.steps), diffusion.variance());
      steps_ = diffusion_->schedule().steps();
    }
  }

  const SamplerConfig& config() const { return config_; }
  Index steps() const { return steps_; }

  /// Images (n, C·H·W) of these labels. Image i of the call draws its noise from `rng.split(first + i)`, so that it does not
  /// depend on the batch that it is drawn in. `observe(way, z, v)` is called with each prediction v of the network, guided, for
  /// z at `way` from the image (0) to noise (1).
  template <class Observe>
  Matrix<S> operator()(ParameterView<const S> p, const std::vector<Index>& labels, const Rng& rng, std::uint64_t first,
                       typename AnyModel::Tape& tape, const Exec& exec, Observe&& observe) const {
    Matrix<S> z(Index(labels.size()), model_.config().image_dim());
    for (Index b = 0; b < z.rows(); ++b) {
      rng.split(first + std::uint64_t(b)).fill_normal(RowView<S>(z.row(b)));
    }
    integrate(p, z, labels, rng, first, tape, exec, observe);
    return z;
  }

  /// The same from noise z that is given, which becomes the images.
  template <class Observe>
  void integrate(ParameterView<const S> p, Matrix<S>& z, const std::vector<Index>& labels, const Rng& rng, std::uint64_t first,
                 typename AnyModel::Tape& tape, const Exec& exec, Observe&& observe) const {
    Matrix<S> v;
    if (diffusion_) {
      denoise(p, z, v, labels, rng, first, tape, exec, observe);
      return;
    }
    // dz/dt = v, from t = 1 to 0 in equal steps.
    const Index n = z.rows();
    const Index size = z.cols();
    for (Index i = steps_; i >= 1; --i) {
      const double t = double(i) / double(steps_);
      predict(p, z, t, labels, v, tape, exec);
      observe(t, RowView<const S>(z), RowView<const S>(v.data(), n, size, v.cols()));
      if (config_.method == "euler") {
        z -= v.topLeftCorner(n, size) / S(steps_);
        continue;
      }
      const Matrix<S> first_v = v.topLeftCorner(n, size);
      const Matrix<S> ahead = z - first_v / S(steps_);
      predict(p, ahead, double(i - 1) / double(steps_), labels, v, tape, exec);
      z -= (first_v + v.topLeftCorner(n, size)) / S(2 * steps_);
    }
  }

 private:
  template <class Observe>
  void denoise(ParameterView<const S> p, Matrix<S>& z, Matrix<S>& v, const std::vector<Index>& labels, const Rng& rng,
               std::uint64_t first, typename AnyModel::Tape& tape, const Exec& exec, Observe&& observe) const {
    const Index size = z.cols();
    const DiffusionSchedule& schedule = diffusion_->schedule();
    const bool ddim = config_.method == "ddim";
    for (Index i = steps_ - 1; i >= 0; --i) {
      const Index timestep = schedule.timesteps[std::size_t(i)];
      predict(p, z, double(timestep), labels, v, tape, exec);
      observe(double(timestep + 1) / double(schedule.whole), RowView<const S>(z),
              RowView<const S>(v.data(), z.rows(), size, v.cols()));
      exec.parallel_for(z.rows(), [&](Index b) {
        const Rng normal = rng.split(first + std::uint64_t(b)).split(std::uint64_t(i));
        const bool noisy = i > 0 && !(ddim && config_.eta == 0);
        for (Index j = 0; j < size; ++j) {
          const double noise = noisy ? normal.normal(std::uint64_t(j)) : 0;
          const double variance = v.cols() > size ? double(v(b, size + j)) : 0;
          z(b, j) = S(ddim ? diffusion_->ddim_step(double(z(b, j)), double(v(b, j)), i, noise, config_.eta, config_.clip)
                           : diffusion_->ddpm_step(double(z(b, j)), double(v(b, j)), variance, i, noise, config_.clip));
        }
      });
    }
  }

  /// The first n rows of v: the network's output for the labels, guided.
  void predict(ParameterView<const S> p, const Matrix<S>& z, double t, const std::vector<Index>& labels, Matrix<S>& v,
               typename AnyModel::Tape& tape, const Exec& exec) const {
    const ModelConfig& shape = model_.config();
    const Index n = z.rows();
    if (config_.guidance == 1) {
      v.resize(n, shape.output_dim());
      model_.forward(p, z, std::vector<S>(std::size_t(n), S(t)), labels, v, tape, exec);
      return;
    }
    Matrix<S> both(2 * n, z.cols());
    both << z, z;
    std::vector<Index> all_labels(labels);
    all_labels.resize(std::size_t(2 * n), shape.classes);
    v.resize(2 * n, shape.output_dim());
    model_.forward(p, both, std::vector<S>(std::size_t(2 * n), S(t)), all_labels, v, tape, exec);
    const Index channels = config_.guided_channels == 0 ? shape.channels : config_.guided_channels;
    guide<S>(v, channels * shape.image_size * shape.image_size, config_.guidance);
  }

  SamplerConfig config_;
  const AnyModel& model_;
  std::optional<GaussianDiffusion> diffusion_;
  Index steps_ = 0;
};

}  // namespace dit

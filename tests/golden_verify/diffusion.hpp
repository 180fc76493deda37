// SPDX-License-Identifier: MIT
#pragma once

#include <dit/gaussian_diffusion.hpp>
#include <numeric>

#include "golden_case.hpp"

namespace golden {

/// The schedule that the metadata names.
inline dit::DiffusionSchedule diffusion_schedule(const GoldenCase& golden) {
  const std::string& noise = golden.text("noise_schedule");
  if (noise != "linear" && noise != "cosine" && noise != "squaredcos_cap_v2") {
    throw GoldenError("metadata 'noise_schedule' is '" + moxie::printable(noise) + "', expected linear or cosine");
  }
  std::string respacing = golden.text("respacing");
  std::erase_if(respacing, [](char c) { return std::string_view("'\"[] ").find(c) != std::string_view::npos; });
  if (respacing == "None") {
    respacing.clear();
  }
  const Index steps =
      golden.file().metadata().count("diffusion_steps") != 0 ? golden.integer("diffusion_steps", 2, 1 << 20) : 1000;
  dit::DiffusionSchedule schedule(noise == "linear" ? dit::NoiseSchedule::linear : dit::NoiseSchedule::cosine, steps,
                                  respacing);
  if (schedule.steps() != golden.integer("num_timesteps")) {
    throw GoldenError("the respacing keeps " + std::to_string(schedule.steps()) + " steps, expected " +
                      golden.text("num_timesteps"));
  }
  return schedule;
}

/// Family `diffusion_schedule`: the numbers of a diffusion, in double whatever the scalar.
template <class Scalar>
void verify_diffusion_schedule(GoldenCase& golden) {
  const dit::DiffusionSchedule s = diffusion_schedule(golden);
  const auto compare = [&](const std::string& name, const std::vector<double>& actual) {
    golden.require("schedule/" + name, {s.steps()});
    golden.compare("schedule/" + name, actual);
  };
  compare("betas", s.betas);
  compare("alphas_cumprod", s.alphas_cumprod);
  compare("alphas_cumprod_prev", s.alphas_cumprod_prev);
  compare("alphas_cumprod_next", s.alphas_cumprod_next);
  compare("sqrt_alphas_cumprod", s.sqrt_alphas_cumprod);
  compare("sqrt_one_minus_alphas_cumprod", s.sqrt_one_minus_alphas_cumprod);
  compare("log_one_minus_alphas_cumprod", s.log_one_minus_alphas_cumprod);
  compare("sqrt_recip_alphas_cumprod", s.sqrt_recip_alphas_cumprod);
  compare("sqrt_recipm1_alphas_cumprod", s.sqrt_recipm1_alphas_cumprod);
  compare("posterior_variance", s.posterior_variance);
  compare("posterior_log_variance_clipped", s.posterior_log_variance_clipped);
  compare("posterior_mean_coef1", s.posterior_mean_coef1);
  compare("posterior_mean_coef2", s.posterior_mean_coef2);
  golden.compare_exactly("schedule/timestep_map", {s.timesteps.begin(), s.timesteps.end()});
}

/// Family `diffusion_steps`: what a diffusion does with the outputs of a network.
template <class Scalar>
void verify_diffusion_steps(GoldenCase& golden) {
  const auto option = [&](const std::string& key, const std::string& usual) {
    const auto& metadata = golden.file().metadata();
    std::string value = metadata.count(key) != 0 ? golden.text(key) : usual;
    return value.substr(value.rfind('.') + 1);
  };
  if (option("model_mean_type", "EPSILON") != "EPSILON") {
    throw GoldenError("metadata 'model_mean_type': only EPSILON is known");
  }
  const std::string loss_type = option("loss_type", "MSE");
  if (loss_type != "MSE" && loss_type != "RESCALED_MSE") {
    throw GoldenError("metadata 'loss_type': only MSE and RESCALED_MSE are known");
  }
  const std::string variance = option("model_var_type", "LEARNED_RANGE");
  const bool learned = variance == "LEARNED_RANGE";
  if (!learned && variance != "FIXED_LARGE" && variance != "FIXED_SMALL") {
    throw GoldenError("metadata 'model_var_type': only LEARNED_RANGE, FIXED_LARGE and FIXED_SMALL are known");
  }
  const dit::GaussianDiffusion diffusion(diffusion_schedule(golden), learned ? dit::StepVariance::learned_range
                                                                     : variance == "FIXED_LARGE"
                                                                         ? dit::StepVariance::fixed_large
                                                                         : dit::StepVariance::fixed_small);
  const dit::DiffusionSchedule& schedule = diffusion.schedule();

  const std::vector<Index> like_x = golden.shape("input/x_start");
  if (like_x.size() != 4) {
    throw GoldenError("tensor input/x_start has " + std::to_string(like_x.size()) + " dimensions, expected 4");
  }
  std::vector<Index> like_output = like_x;
  like_output[1] *= learned ? 2 : 1;
  const Index batch = like_x[0];
  const Index n = like_x[1] * like_x[2] * like_x[3];
  const Index columns = diffusion.output_columns(n);
  std::vector<std::string> images{"input/noise",
                                  "input/step_noise",
                                  "output/x_t",
                                  "output/q_mean",
                                  "output/q_variance",
                                  "output/q_log_variance",
                                  "output/q_posterior_mean",
                                  "output/q_posterior_variance",
                                  "output/q_posterior_log_variance_clipped"};
  for (const std::string clip : {"clip0", "clip1"}) {
    for (const char* what : {"mean", "variance", "log_variance", "pred_xstart"}) {
      images.push_back("p_mean_variance_" + clip + "/" + what);
    }
    for (const char* sampler : {"p_sample_", "ddim_eta0_", "ddim_eta50_", "ddim_eta100_", "ddim_reverse_"}) {
      images.push_back(sampler + clip + "/sample");
    }
  }
  for (const std::string& name : images) {
    golden.allow(name, like_x);
  }
  for (const char* name : {"input/noise", "input/step_noise", "output/x_t"}) {
    golden.require(name, like_x);
  }
  golden.require("input/model_output", like_output);
  golden.require("grad/model_output", like_output);
  for (const char* name : {"input/t", "input/dloss", "loss/loss", "loss/mse"}) {
    golden.require(name, {batch});
  }
  golden.allow("loss/vb", {batch});
  golden.allow("output/mapped_t", {batch});

  const Matrix<Scalar> x_start = golden.matrix<Scalar>("input/x_start", batch, n);
  const Matrix<Scalar> noise = golden.matrix<Scalar>("input/noise", batch, n);
  const Matrix<Scalar> step_noise = golden.matrix<Scalar>("input/step_noise", batch, n);
  const Matrix<Scalar> output = golden.matrix<Scalar>("input/model_output", batch, columns);
  const std::vector<std::int64_t> steps = golden.read<std::int64_t>("input/t");
  const std::vector<double> dloss = golden.read<double>("input/dloss");
  for (const std::int64_t t : steps) {
    if (t < 0 || t >= schedule.steps()) {
      throw GoldenError("tensor input/t has the step " + std::to_string(t));
    }
  }

  // A number of each pixel, of f(image, pixel, step).
  const auto compare = [&](const std::string& name, const auto& f) {
    if (!golden.contains(name)) {
      return;
    }
    std::vector<double> actual;
    for (Index b = 0; b < batch; ++b) {
      for (Index j = 0; j < n; ++j) {
        actual.push_back(double(Scalar(f(b, j, Index(steps[std::size_t(b)])))));
      }
    }
    golden.compare(name, actual);
  };
  Matrix<Scalar> x_t(batch, n);
  for (Index b = 0; b < batch; ++b) {
    for (Index j = 0; j < n; ++j) {
      x_t(b, j) = Scalar(diffusion.noised(double(x_start(b, j)), Index(steps[std::size_t(b)]), double(noise(b, j))));
    }
  }
  const auto at = [](Index t) { return std::size_t(t); };
  const auto x = [&](Index b, Index j) { return double(x_t(b, j)); };
  const auto eps = [&](Index b, Index j) { return double(output(b, j)); };
  const auto v = [&](Index b, Index j) { return learned ? double(output(b, n + j)) : 0; };
  compare("output/x_t", [&](Index b, Index j, Index) { return x(b, j); });
  compare("output/q_mean",
          [&](Index b, Index j, Index t) { return schedule.sqrt_alphas_cumprod[at(t)] * double(x_start(b, j)); });
  compare("output/q_variance", [&](Index, Index, Index t) { return 1 - schedule.alphas_cumprod[at(t)]; });
  compare("output/q_log_variance", [&](Index, Index, Index t) { return schedule.log_one_minus_alphas_cumprod[at(t)]; });
  compare("output/q_posterior_mean",
          [&](Index b, Index j, Index t) { return diffusion.posterior_mean(double(x_start(b, j)), x(b, j), t); });
  compare("output/q_posterior_variance", [&](Index, Index, Index t) { return schedule.posterior_variance[at(t)]; });
  compare("output/q_posterior_log_variance_clipped",
          [&](Index, Index, Index t) { return schedule.posterior_log_variance_clipped[at(t)]; });
  if (golden.contains("output/mapped_t")) {
    std::vector<std::int64_t> mapped;
    for (const std::int64_t t : steps) {
      mapped.push_back(schedule.timesteps[std::size_t(t)]);
    }
    golden.compare_exactly("output/mapped_t", mapped);
  }
  for (const bool clip : {false, true}) {
    const std::string suffix = clip ? "_clip1/" : "_clip0/";
    const auto predict = [&](Index b, Index j, Index t) { return diffusion.predict(x(b, j), eps(b, j), v(b, j), t, clip); };
    compare("p_mean_variance" + suffix + "mean", [&](Index b, Index j, Index t) { return predict(b, j, t).mean; });
    compare("p_mean_variance" + suffix + "pred_xstart", [&](Index b, Index j, Index t) { return predict(b, j, t).x_start; });
    compare("p_mean_variance" + suffix + "log_variance",
            [&](Index b, Index j, Index t) { return predict(b, j, t).log_variance; });
    compare("p_mean_variance" + suffix + "variance", [&](Index b, Index j, Index t) {
      // The reference's smaller variance is 0 at the last step; its logarithm alone is clipped.
      return diffusion.variance() == dit::StepVariance::fixed_small ? schedule.posterior_variance[std::size_t(t)]
                                                                    : std::exp(predict(b, j, t).log_variance);
    });
    compare("p_sample" + suffix + "sample", [&](Index b, Index j, Index t) {
      return diffusion.ddpm_step(x(b, j), eps(b, j), v(b, j), t, double(step_noise(b, j)), clip);
    });
    for (const Index eta : {0, 50, 100}) {
      compare("ddim_eta" + std::to_string(eta) + suffix + "sample", [&](Index b, Index j, Index t) {
        return diffusion.ddim_step(x(b, j), eps(b, j), t, double(step_noise(b, j)), double(eta) / 100, clip);
      });
    }
    compare("ddim_reverse" + suffix + "sample",
            [&](Index b, Index j, Index t) { return diffusion.ddim_reverse_step(x(b, j), eps(b, j), t, clip); });
  }

  Matrix<Scalar> doutput = unwritten<Scalar>(batch, columns);
  std::vector<double> mse;
  std::vector<double> vb;
  std::vector<double> total;
  for (Index b = 0; b < batch; ++b) {
    const auto loss = diffusion.loss<Scalar>(x_start, x_t, noise, output, b, Index(steps[std::size_t(b)]),
                                             loss_type == "RESCALED_MSE", dloss[std::size_t(b)], doutput);
    mse.push_back(loss.mse);
    vb.push_back(loss.vb);
    total.push_back(loss.total());
  }
  golden.compare("loss/mse", mse);
  golden.compare("loss/loss", total);
  if (golden.contains("loss/vb")) {
    golden.compare("loss/vb", vb);
  }
  golden.compare("grad/model_output", values(doutput));
}

}  // namespace golden

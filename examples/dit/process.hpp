// SPDX-License-Identifier: MIT
#pragma once

#include <dit/gaussian_diffusion.hpp>
#include <dit/rectified_flow.hpp>
#include <moxie/core/random.hpp>
#include <type_traits>
#include <variant>
#include <vector>

namespace dit {

using moxie::Exec;
using moxie::Matrix;
using moxie::Rng;

/// What leads from images to noise, and what a network learns to find the way back.
using Process = std::variant<RectifiedFlow, GaussianDiffusion>;

/// Images that are on their way to noise, with what training needs of them.
template <class S>
struct Batch {
  Matrix<S> clean;       // x, (B, C·H·W)
  Matrix<S> noise;       // z
  Matrix<S> images;      // x_t
  std::vector<S> times;  // as the network is told them
  std::vector<Index> labels;

  Index size() const { return clean.rows(); }

  /// Images are chosen at random; a label becomes "no class" (`classes`) with probability `label_dropout`. With `stratified`,
  /// image b draws its time from the b-th of B equal parts of the times. Everything is drawn from streams of `step`.
  void draw(const Process& process, bool stratified, RowView<const float> data, const std::vector<std::int64_t>& data_labels,
            Index batch, Index classes, double label_dropout, const Rng& step, const Exec& exec) {
    clean.resize(batch, data.cols());
    noise.resize(batch, data.cols());
    times.resize(std::size_t(batch));
    labels.resize(std::size_t(batch));
    const Rng choice = step.split(0);
    const Rng time = step.split(1);
    const Rng drop = step.split(2);
    const Rng normal = step.split(3);
    exec.parallel_for(batch, [&](Index b) {
      const auto i = std::uint64_t(b);
      const Index chosen = choice.below(data.rows(), i);
      const double u = time.uniform(i);
      times[std::size_t(b)] = S(
          std::visit([&](const auto& p) { return double(p.time(stratified ? (double(b) + u) / double(batch) : u)); }, process));
      labels[std::size_t(b)] = drop.uniform(i) < label_dropout ? classes : Index(data_labels[std::size_t(chosen)]);
      for (Index j = 0; j < data.cols(); ++j) {
        clean(b, j) = S(data(chosen, j));
        noise(b, j) = S(normal.normal(i * std::uint64_t(data.cols()) + std::uint64_t(j)));
      }
    });
    add_noise(process, exec);
  }

  /// x_t of the images, noise and times that are there.
  void add_noise(const Process& process, const Exec& exec) {
    images.resize(size(), clean.cols());
    exec.parallel_for(size(), [&](Index b) {
      const S t = times[std::size_t(b)];
      std::visit(
          [&](const auto& p) {
            for (Index j = 0; j < clean.cols(); ++j) {
              if constexpr (is_flow<decltype(p)>) {
                images(b, j) = p.noised(clean(b, j), t, noise(b, j));
              } else {
                images(b, j) = S(p.noised(double(clean(b, j)), Index(t), double(noise(b, j))));
              }
            }
          },
          process);
    });
  }

  /// The loss of the network's output for the images from `first` on, one row of `output` each, the mean over these; `doutput`
  /// becomes its gradient.
  double loss(const Process& process, Index first, RowView<const S> output, RowView<S> doutput) const {
    const Index n = output.rows();
    const auto part = [&](const Matrix<S>& m) { return RowView<const S>(m).middle_rows(first, n); };
    double sum = 0;
    for (Index b = 0; b < n; ++b) {
      sum += std::visit(
          [&](const auto& p) {
            if constexpr (is_flow<decltype(p)>) {
              return p.template loss<S>(part(clean), part(noise), output, b, 1 / double(n), doutput);
            } else {
              const auto t = Index(times[std::size_t(first + b)]);
              return p.template loss<S>(part(clean), part(images), part(noise), output, b, t, false, 1 / double(n), doutput)
                  .total();
            }
          },
          process);
    }
    return sum / double(n);
  }

 private:
  template <class P>
  static constexpr bool is_flow = std::is_same_v<std::decay_t<P>, RectifiedFlow>;
};

}  // namespace dit

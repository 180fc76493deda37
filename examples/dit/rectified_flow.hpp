// SPDX-License-Identifier: MIT
#pragma once

#include <dit/model.hpp>

namespace dit {

/// Rectified flow (Liu et al. 2022; logit-normal times of Esser et al. 2024): straight paths from images x at t = 0 to noise z
/// at t = 1, and a network that predicts their velocity.
///
///     x_t = (1 - t) x + t z,   loss = mean (v(x_t, t, label) - (z - x))²
///
/// A step draws everything from its own streams, so that step n of a resumed training is step n of an undisturbed one.
template <class S>
struct FlowBatch {
  Matrix<S> images;  // x_t, (B, C·H·W)
  Matrix<S> target;  // z - x
  std::vector<S> times;
  std::vector<Index> labels;

  /// Images are chosen at random; a label becomes "no class" (`classes`) with probability `label_dropout`.
  void draw(RowView<const float> data, const std::vector<std::int64_t>& data_labels, Index batch, Index classes,
            double label_dropout, const Rng& step, const Exec& exec) {
    images.resize(batch, data.cols());
    target.resize(batch, data.cols());
    times.resize(std::size_t(batch));
    labels.resize(std::size_t(batch));
    const Rng choice = step.split(0);
    const Rng time = step.split(1);
    const Rng drop = step.split(2);
    const Rng noise = step.split(3);
    exec.parallel_for(batch, [&](Index b) {
      const auto i = std::uint64_t(b);
      const Index chosen = choice.below(data.rows(), i);
      const S t = S(1 / (1 + std::exp(-time.normal(i))));
      times[std::size_t(b)] = t;
      labels[std::size_t(b)] = drop.uniform(i) < label_dropout ? classes : Index(data_labels[std::size_t(chosen)]);
      for (Index j = 0; j < data.cols(); ++j) {
        const S x = S(data(chosen, j));
        const S z = S(noise.normal(i * std::uint64_t(data.cols()) + std::uint64_t(j)));
        images(b, j) = (S(1) - t) * x + t * z;
        target(b, j) = z - x;
      }
    });
  }

  /// The loss of a prediction; `dv` becomes its gradient 2 (v - target) / size.
  double loss(RowView<const S> v, RowView<S> dv) const {
    double sum = 0;
    for (Index b = 0; b < v.rows(); ++b) {
      for (Index j = 0; j < v.cols(); ++j) {
        const S difference = v(b, j) - target(b, j);
        sum += double(difference) * double(difference);
        dv(b, j) = S(2) * difference / S(v.size());
      }
    }
    return sum / double(v.size());
  }
};

/// Euler's method from noise to images in `steps` equal steps, with classifier-free guidance (Ho and Salimans 2022):
///
///     v = v(∅) + guidance (v(label) - v(∅)),   z -= v / steps      at t = 1, ..., 1 / steps
///
/// Both predictions come from one batch of twice the size. Image i of the call is drawn from `rng.split(first + i)`.
/// `observe()` is called after each prediction, to look at the tape.
template <class AnyModel, class S, class Observe>
Matrix<S> sample(const AnyModel& model, ParameterView<const S> p, const std::vector<Index>& labels, Index steps,
                 double guidance, const Rng& rng, std::uint64_t first, typename AnyModel::Tape& tape, const Exec& exec,
                 Observe&& observe) {
  const Index n = Index(labels.size());
  const Index size = model.config().image_dim();
  Matrix<S> z(2 * n, size);
  Matrix<S> v(2 * n, size);
  for (Index b = 0; b < n; ++b) {
    rng.split(first + std::uint64_t(b)).fill_normal(RowView<S>(z.row(b)));
  }
  std::vector<Index> both(labels);
  both.resize(std::size_t(2 * n), model.config().classes);
  for (Index i = steps; i >= 1; --i) {
    z.bottomRows(n) = z.topRows(n);
    const std::vector<S> t(std::size_t(2 * n), S(double(i) / double(steps)));
    model.forward(p, z, t, both, v, tape, exec);
    observe();
    z.topRows(n) -= (v.bottomRows(n) + S(guidance) * (v.topRows(n) - v.bottomRows(n))) / S(steps);
  }
  return z.topRows(n);
}

}  // namespace dit

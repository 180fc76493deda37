// SPDX-License-Identifier: MIT
#pragma once

#include <dit/model.hpp>

namespace dit {

/// The time 1 / (1 + exp(-normal)) of a normal number: most often in the middle of the path.
inline double logit_normal(double normal) { return 1 / (1 + std::exp(-normal)); }

/// Rectified flow (Liu et al. 2022; logit-normal times of Esser et al. 2024): straight paths from images x at t = 0 to noise z
/// at t = 1, and a network that predicts their velocity.
///
///     x_t = (1 - t) x + t z,   loss = mean (v(x_t, t, label) - (z - x))²
///
/// Times are logit-normal, and the network is given t itself. A step draws everything from its own streams, so that step n of a
/// resumed training is step n of an undisturbed one.
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
      const S t = S(logit_normal(time.normal(i)));
      times[std::size_t(b)] = t;
      labels[std::size_t(b)] = drop.uniform(i) < label_dropout ? classes : Index(data_labels[std::size_t(chosen)]);
      for (Index j = 0; j < data.cols(); ++j) {
        const S x = S(data(chosen, j));
        const S z = S(noise.normal(i * std::uint64_t(data.cols()) + std::uint64_t(j)));
        set(b, j, x, z, t);
      }
    });
  }

  /// A pixel's place on the path from x to z.
  void set(Index b, Index j, S x, S z, S t) {
    images(b, j) = (S(1) - t) * x + t * z;
    target(b, j) = z - x;
  }

  /// The loss of a prediction; `dv` becomes its gradient 2 (v - target) / size. Outputs beyond the velocity (a learned
  /// variance) have no part in it.
  double loss(RowView<const S> v, RowView<S> dv) const {
    double sum = 0;
    for (Index b = 0; b < v.rows(); ++b) {
      for (Index j = 0; j < v.cols(); ++j) {
        const S difference = j < target.cols() ? v(b, j) - target(b, j) : S(0);
        sum += double(difference) * double(difference);
        dv(b, j) = S(2) * difference / S(target.size());
      }
    }
    return sum / double(target.size());
  }
};

/// Classifier-free guidance (Ho and Salimans 2022): rows [0,n) of v are predictions for labels, rows [n,2n) those for no class.
/// The first `columns` of both become
///
///     v(∅) + guidance (v(label) - v(∅))
///
/// Rectified flow guides all; the sampler of DiT and DiT-MoE for DDPM the first three channels.
template <class S>
void guide(RowView<S> v, Index columns, double guidance) {
  const Index n = v.rows() / 2;
  auto with = v.eigen().topRows(n).leftCols(columns);
  auto without = v.eigen().bottomRows(n).leftCols(columns);
  with = without + S(guidance) * (with - without);
  without = with;
}

/// Euler's method from noise z (n, C·H·W) at t = 1 to images in `steps` equal steps, z -= v / steps at t = 1, ..., 1 / steps,
/// with guidance; both predictions come from one batch of twice the size. `observe(i, z, v)` is called with each prediction, at
/// t = i / steps: z - t v is the image that it leads to.
template <class AnyModel, class S, class Observe>
void integrate(const AnyModel& model, ParameterView<const S> p, Matrix<S>& z, const std::vector<Index>& labels, Index steps,
               double guidance, typename AnyModel::Tape& tape, const Exec& exec, Observe&& observe) {
  const Index n = z.rows();
  const Index size = z.cols();
  Matrix<S> both(2 * n, size);
  Matrix<S> v(2 * n, model.config().output_dim());
  std::vector<Index> all_labels(labels);
  all_labels.resize(std::size_t(2 * n), model.config().classes);
  for (Index i = steps; i >= 1; --i) {
    both << z, z;
    const std::vector<S> t(std::size_t(2 * n), S(double(i) / double(steps)));
    model.forward(p, both, t, all_labels, v, tape, exec);
    guide<S>(v, size, guidance);
    const RowView<const S> guided(v.data(), n, size, v.cols());
    observe(i, RowView<const S>(z), guided);
    z -= guided.eigen() / S(steps);
  }
}

/// The same from noise of its own: image i of the call is drawn from `rng.split(first + i)`.
template <class AnyModel, class S, class Observe>
Matrix<S> sample(const AnyModel& model, ParameterView<const S> p, const std::vector<Index>& labels, Index steps,
                 double guidance, const Rng& rng, std::uint64_t first, typename AnyModel::Tape& tape, const Exec& exec,
                 Observe&& observe) {
  Matrix<S> z(Index(labels.size()), model.config().image_dim());
  for (Index b = 0; b < z.rows(); ++b) {
    rng.split(first + std::uint64_t(b)).fill_normal(RowView<S>(z.row(b)));
  }
  integrate(model, p, z, labels, steps, guidance, tape, exec, observe);
  return z;
}

}  // namespace dit

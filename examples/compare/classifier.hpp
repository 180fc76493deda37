// SPDX-License-Identifier: MIT
#pragma once

#include <compare/convolution.hpp>
#include <dit/data_set.hpp>
#include <filesystem>
#include <moxie/io/safetensors.hpp>
#include <nn/activation.hpp>
#include <nn/adamw.hpp>
#include <optional>

/// The judge of drawn images: a small network that tells the classes of real ones apart.
namespace compare {

struct ClassifierConfig {
  Index side = 28;
  Index channels = 1;
  Index classes = 10;
  Index features = 128;
};

/// Two convolutions, a layer of features and one of classes, with ReLU between them:
///
///     conv 5x5 / 2 (32) - conv 3x3 / 2 (64) - linear (features) - linear (classes)
template <class S>
class Classifier {
 public:
  struct Tape {
    Index batch = 0;
    Buffer<S> x, windows1, h1, a1, windows2, h2, a2, h3, a3, logits;
    mutable Buffer<S> scratch, dlogits, d3, d2, d1;
  };

  explicit Classifier(const ClassifierConfig& config)
      : config_(config),
        conv1_(layout_, "conv1", config.side, config.channels, 32, 5, 2),
        conv2_(layout_, "conv2", conv1_.side(), 32, 64, 3, 2),
        features_(layout_, "features", conv2_.side() * conv2_.side() * 64, config.features),
        classes_(layout_, "classes", config.features, config.classes) {}

  const ClassifierConfig& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  void initialize(ParameterView<S> p, const Rng& rng) const {
    moxie::set_zero(p);
    conv1_.initialize(p, rng);
    conv2_.initialize(p, rng);
    features_.initialize(p, rng);
    classes_.initialize(p, rng);
  }

  /// Logits (B, classes) of images (B, C·H·W).
  RowView<const S> forward(ParameterView<const S> p, RowView<const S> images, Tape& tape, const Exec& exec) const {
    const Index batch = images.rows();
    const Index area = config_.side * config_.side;
    moxie::detail::expect_shape("Classifier::forward", "images", images, -1, config_.channels * area, "B");
    tape.batch = batch;
    const RowView<S> x = tape.x.matrix(batch * area, config_.channels);
    for (Index b = 0; b < batch; ++b) {
      for (Index i = 0; i < images.cols(); ++i) {
        x(b * area + i % area, i / area) = images(b, i);
      }
    }
    const Index area1 = conv1_.side() * conv1_.side();
    const Index area2 = conv2_.side() * conv2_.side();
    const RowView<S> h1 = tape.h1.matrix(batch * area1, 32);
    const RowView<S> a1 = tape.a1.matrix(batch * area1, 32);
    const RowView<S> h2 = tape.h2.matrix(batch * area2, 64);
    const RowView<S> a2 = tape.a2.matrix(batch * area2, 64);
    const RowView<S> h3 = tape.h3.matrix(batch, config_.features);
    const RowView<S> a3 = tape.a3.matrix(batch, config_.features);
    const RowView<S> logits = tape.logits.matrix(batch, config_.classes);
    conv1_.forward(p, x, h1, tape.windows1, exec);
    nn::activate<moxie::Relu, S>(h1, a1);
    conv2_.forward(p, a1, h2, tape.windows2, exec);
    nn::activate<moxie::Relu, S>(h2, a2);
    features_.forward(p, flat(RowView<const S>(a2), batch), h3, exec);
    nn::activate<moxie::Relu, S>(h3, a3);
    classes_.forward(p, a3, logits, exec);
    return logits;
  }
  /// What the last layer sees of the forward's images, (B, features).
  RowView<const S> features(const Tape& tape) const { return tape.a3.view(tape.batch, config_.features); }

  /// The mean cross-entropy of the forward's images; adds its gradient.
  double backward(ParameterView<const S> p, std::span<const Index> labels, ParameterView<S> grads, const Tape& tape,
                  const Exec& exec) const {
    const Index batch = tape.batch;
    const RowView<S> dlogits = tape.dlogits.matrix(batch, config_.classes);
    double loss = 0;
    dlogits.eigen() = tape.logits.view(batch, config_.classes).eigen();
    for (Index b = 0; b < batch; ++b) {
      auto row = dlogits.eigen().row(b).array();
      const Index label = labels[std::size_t(b)];
      row = (row - row.maxCoeff()).exp();
      row /= row.sum();
      loss -= std::log(std::max(double(row(label)), 1e-30)) / double(batch);
      row(label) -= S(1);
      row /= S(batch);
    }
    const Index area1 = conv1_.side() * conv1_.side();
    const Index area2 = conv2_.side() * conv2_.side();
    const RowView<S> d3 = tape.d3.matrix(batch, config_.features);
    const RowView<S> d2 = tape.d2.matrix(batch * area2, 64);
    const RowView<S> d1 = tape.d1.matrix(batch * area1, 32);
    classes_.backward(p, tape.a3.view(batch, config_.features), dlogits, d3, grads, exec);
    nn::activate_backward<moxie::Relu, S>(tape.h3.view(batch, config_.features), d3);
    features_.backward(p, flat(tape.a2.view(batch * area2, 64), batch), d3, flat(d2, batch), grads, exec);
    nn::activate_backward<moxie::Relu, S>(tape.h2.view(batch * area2, 64), d2);
    conv2_.backward(p, tape.windows2, d2, d1, tape.scratch, grads, exec);
    nn::activate_backward<moxie::Relu, S>(tape.h1.view(batch * area1, 32), d1);
    conv1_.backward(p, tape.windows1, d1, {}, tape.scratch, grads, exec);
    return loss;
  }

 private:
  /// An image's pixels and channels as one row.
  template <class T>
  static RowView<T> flat(RowView<T> m, Index batch) {
    return {m.data(), batch, m.size() / batch};
  }

  ClassifierConfig config_;
  Layout layout_;
  Convolution<S> conv1_;
  Convolution<S> conv2_;
  nn::Linear<S> features_;
  nn::Linear<S> classes_;
};

struct ClassifierTraining {
  std::int64_t steps = 6000;
  Index batch = 64;
  Index shift = 2;  ///< images are moved by up to so many pixels
  double rate = 1e-3;
  std::uint64_t seed = 1;
};

/// Trains on images of a data set in random places, and returns the averaged weights. `observe(step, loss)` may throw.
template <class Observe>
moxie::Parameters<float> train_classifier(const Classifier<float>& classifier, const dit::DataSet& data,
                                          const ClassifierTraining& config, const Exec& exec, Observe&& observe) {
  const ClassifierConfig& shape = classifier.config();
  moxie::detail::expect_value(data.images.cols() == shape.channels * shape.side * shape.side, "train_classifier",
                              "the classifier is for other images");
  moxie::Parameters<float> weights(classifier.layout());
  classifier.initialize(weights, Rng(config.seed).split(0));
  moxie::Parameters<float> grads = weights.zeros_like();
  nn::AdamW<float> optimizer({.rate = config.rate, .clip = 0, .warm_up = 100, .ema_decay = 0.999}, weights);
  Classifier<float>::Tape tape;
  Matrix<float> images(config.batch, data.images.cols());
  std::vector<Index> labels(std::size_t(config.batch));
  const Index area = shape.side * shape.side;
  for (std::int64_t step = 0; step < config.steps; ++step) {
    const Rng rng = Rng(config.seed).split(1).split(std::uint64_t(step));
    exec.parallel_for(config.batch, [&](Index b) {
      const auto i = std::uint64_t(b);
      const Index chosen = rng.split(0).below(data.count(), i);
      const Index dy = rng.split(1).below(2 * config.shift + 1, i) - config.shift;
      const Index dx = rng.split(2).below(2 * config.shift + 1, i) - config.shift;
      labels[std::size_t(b)] = Index(data.labels[std::size_t(chosen)]);
      for (Index j = 0; j < images.cols(); ++j) {
        const Index y = std::clamp(j % area / shape.side + dy, Index{0}, shape.side - 1);
        const Index x = std::clamp(j % shape.side + dx, Index{0}, shape.side - 1);
        images(b, j) = data.images(chosen, j / area * area + y * shape.side + x);
      }
    });
    nn::set_zero(grads, exec);
    classifier.forward(weights, images, tape, exec);
    const double loss = classifier.backward(weights, labels, grads, tape, exec);
    optimizer.step(weights, grads, exec);
    observe(step + 1, loss);
  }
  return optimizer.ema();
}

/// What a classifier says of images.
struct Judgement {
  std::vector<Index> classes;  ///< the likeliest one of each
  Matrix<float> features;

  /// Share of the images that are of these classes.
  double agreement(std::span<const std::int64_t> labels) const {
    Index right = 0;
    for (std::size_t i = 0; i < classes.size(); ++i) {
      right += classes[i] == labels[i] ? 1 : 0;
    }
    return double(right) / double(std::max<std::size_t>(classes.size(), 1));
  }
};

inline Judgement judge(const Classifier<float>& classifier, ParameterView<const float> weights, RowView<const float> images,
                       const Exec& exec) {
  Judgement result;
  result.features.resize(images.rows(), classifier.config().features);
  Classifier<float>::Tape tape;
  constexpr Index batch = 250;
  for (Index first = 0; first < images.rows(); first += batch) {
    const Index n = std::min(batch, images.rows() - first);
    const RowView<const float> logits = classifier.forward(weights, images.middle_rows(first, n), tape, exec);
    result.features.middleRows(first, n) = classifier.features(tape).eigen();
    for (Index b = 0; b < n; ++b) {
      Index best = 0;
      logits.eigen().row(b).maxCoeff(&best);
      result.classes.push_back(best);
    }
  }
  return result;
}

}  // namespace compare

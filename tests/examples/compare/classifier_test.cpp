// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <compare/classifier.hpp>
#include <moxie/testing/gradient_check.hpp>

using compare::Classifier;
using compare::Exec;
using compare::Index;
using compare::Matrix;
using compare::Rng;
using moxie::testing::check_gradient;

TEST_CASE("Classifier: the gradient of the cross-entropy agrees with finite differences") {
  const Classifier<double> classifier({.side = 5, .channels = 2, .classes = 3, .features = 6});
  moxie::Parameters<double> p(classifier.layout());
  classifier.initialize(p, Rng(1));
  const Matrix<double> images = moxie::random_normal<double>(4, 50, Rng(2));
  const std::vector<Index> labels{2, 0, 1, 1};
  Classifier<double>::Tape tape;
  moxie::Parameters<double> grads = p.zeros_like(), unused = p.zeros_like();
  const auto loss = [&] {
    classifier.forward(p, images, tape, Exec{1});
    return classifier.backward(p, labels, unused, tape, Exec{1});
  };
  classifier.forward(p, images, tape, Exec{1});
  const double value = classifier.backward(p, labels, grads, tape, Exec{1});
  CHECK(value == doctest::Approx(loss()).epsilon(1e-12));
  for (const auto& tensor : classifier.layout().tensors()) {
    CAPTURE(tensor.name);
    // A small step: ReLU has a kink.
    const auto report = check_gradient(loss, p[tensor.name], grads[tensor.name], {.step = 1e-6, .max_elements = 60});
    CHECK_MESSAGE(report.passes(1e-5), report.message());
  }
}

TEST_CASE("Classifier: learns to tell shapes apart, the same with any number of threads") {
  const dit::DataSet train = dit::generated_shapes(2000, Rng(1));
  const dit::DataSet test = dit::generated_shapes(500, Rng(2));
  const Classifier<float> classifier({.features = 32});
  const compare::ClassifierTraining config{.steps = 150, .batch = 32};
  double first = 0, last = 0;
  const auto weights = train_classifier(classifier, train, config, Exec{2},
                                        [&](std::int64_t step, double loss) { (step <= 10 ? first : last) = loss; });
  CHECK(last < first);
  const compare::Judgement judgement = judge(classifier, weights, test.images, Exec{2});
  CHECK(judgement.agreement(test.labels) > 0.9);
  CHECK(judgement.features.rows() == 500);
  CHECK(judgement.features.cols() == 32);
  CHECK((judgement.features.array() >= 0).all());
  const auto again = train_classifier(classifier, train, {.steps = 5}, Exec{1}, [](auto...) {});
  const auto threads = train_classifier(classifier, train, {.steps = 5}, Exec{2}, [](auto...) {});
  CHECK((again.flat() == threads.flat()).all());
}

TEST_CASE("Classifier: images of another size are refused") {
  const Classifier<float> classifier({.side = 20});
  const dit::DataSet data = dit::generated_shapes(10, Rng(1));
  CHECK_THROWS_AS(train_classifier(classifier, data, {.steps = 1}, Exec{1}, [](auto...) {}), moxie::ValueError);
  const moxie::Parameters<float> weights(classifier.layout());
  CHECK_THROWS_AS(judge(classifier, weights, data.images, Exec{1}), moxie::ShapeError);
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <moxie/testing/gradient_check.hpp>
#include <temporary_folder.hpp>

// The lesson itself, without its main.
#define main minimal_dit_main
#include <08_minimal_dit.cpp>
#undef main

namespace {

constexpr Shape tiny{
    .image = 4, .patch = 2, .classes = 3, .dim = 8, .depth = 2, .heads = 2, .experts = 4, .top_k = 2, .hidden = 6};

}  // namespace

TEST_CASE("minimal DiT: every gradient agrees with central differences") {
  DiT<double> model(tiny);
  Parameters<double> p(model.layout());
  for (std::size_t i = 0; i < model.layout().tensors().size(); ++i) {
    Rng{1}.split(i).fill_normal(p.view()[Index(i)], 0.25);  // adaLN-Zero's zeros would hide most gradients
  }
  const Matrix<double> images = moxie::random_normal<double>(6, tiny.pixels(), Rng{2});
  const Matrix<double> dv = moxie::random_normal<double>(6, tiny.pixels(), Rng{3});
  const std::vector<double> t{0.1, 0.5, 0.9, 0.3, 0.7, 0.99};
  const std::vector<Index> labels{2, 0, 3, 1, 1, 2};  // 3 is "no class"
  const auto choices = [&] {
    std::vector<Index> first;
    for (Index block = 0; block < tiny.depth; ++block) {
      for (Index token = 0; token < 6 * tiny.tokens(); ++token) {
        first.push_back(model.block(block).first_choice(token));
      }
    }
    return first;
  };
  const auto balance = [&] { return model.block(0).balance_loss() + model.block(1).balance_loss(); };
  const auto loss = [&] { return model.forward(p, images, t, labels).cwiseProduct(dv).sum() + balance(); };
  loss();
  const std::vector<Index> chosen = choices();
  CHECK(balance() > 0);
  Parameters<double> dp = p.zeros_like();
  model.backward(p, dv, dp);
  moxie::zip(
      [&](const moxie::TensorInfo& tensor, RowView<double> w, RowView<double> dw) {
        const auto same_choice = [&] {
          const double value = loss();
          return choices() == chosen ? value : std::numeric_limits<double>::quiet_NaN();
        };
        const auto report = moxie::testing::check_gradient(same_choice, w, dw, {.max_elements = 40}, tensor.name);
        CHECK_MESSAGE(report.passes(1e-6), report.message());
      },
      p, dp);
}

TEST_CASE("minimal DiT: starts from velocity zero, every block being the identity") {
  DiT<float> model(tiny);
  const Matrix<float> images = moxie::random_normal<float>(2, tiny.pixels(), Rng{2});
  CHECK(model.forward(model.initial_weights(Rng{1}), images, {0.2F, 0.7F}, {0, 3}).isZero());
}

TEST_CASE("minimal DiT: drawing walks from noise along the guided velocity") {
  DiT<float> model(tiny);
  Parameters<float> p = model.initial_weights(Rng{1});
  for (std::size_t i = 0; i < model.layout().tensors().size(); ++i) {
    Rng{1}.split(i).fill_normal(p.view()[Index(i)], 0.2);
  }
  const Matrix<float> noise = moxie::random_normal<float>(2, tiny.pixels(), Rng{3});
  Matrix<float> walked = noise;
  float last_time = 1.04F;
  const Matrix<float> images = sample(model, p, {0, 2}, [&](float t, const Matrix<float>& x, const Matrix<float>& v) {
    CHECK(std::abs(t - (last_time - 0.04F)) < 1e-5F);
    CHECK((x - walked).cwiseAbs().maxCoeff() < 1e-5F);
    const std::vector<float> times(2, t);
    DiT<float> other(tiny);
    const Matrix<float> with = other.forward(p, x, times, {0, 2});
    const Matrix<float> without = other.forward(p, x, times, {3, 3});
    CHECK((v - (3 * with - 2 * without)).cwiseAbs().maxCoeff() < 1e-4F);
    walked -= v / 25;
    last_time = t;
  });
  CHECK(std::abs(last_time - 0.04F) < 1e-5F);
  CHECK((images - walked).cwiseAbs().maxCoeff() < 1e-5F);
}

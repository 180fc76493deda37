// SPDX-License-Identifier: MIT
//
// Lesson 3: an expert of your own.
//
// An expert is a function of its rows with the adjoint. This one scales and shifts each feature and bends it:
//
//     f(x) = tanh(a ⊙ x + b)        da = Σ_rows d ⊙ x,  db = Σ_rows d,  dx = d ⊙ a   with d = dh ⊙ (1 - f²)
//
// `ExpertBank` makes E of it; the layer, the routers and the checks of moxie/testing then take it like one of the library's.
#include <cstdio>
#include <moxie/moxie.hpp>
#include <moxie/testing/gradient_check.hpp>

using moxie::Index;

template <class S>
struct TanhExpert {
  using Scalar = S;
  struct Config {};

  TanhExpert(Index model_dim, const Config& /*config*/) {
    layout_.add("a", {model_dim});
    layout_.add("b", {model_dim});
  }
  const moxie::Layout& layout() const { return layout_; }
  void initialize(moxie::ParameterView<S> p, const moxie::Rng& rng) const { rng.fill_normal(p["a"]); }

  void forward(moxie::ParameterView<const S> p, moxie::RowView<const S> x, moxie::RowView<S> h) const {
    h.eigen() =
        ((x.eigen().array().rowwise() * p["a"].eigen().row(0).array()).rowwise() + p["b"].eigen().row(0).array()).tanh();
  }
  void backward(moxie::ParameterView<const S> p, moxie::RowView<const S> x, moxie::RowView<const S> dh, moxie::RowView<S> dx,
                moxie::ParameterView<S> dp) const {
    forward(p, x, dx);  // f, in the place where its adjoint goes
    dx.eigen() = dh.eigen().array() * (1 - dx.eigen().array().square());
    dp["a"].eigen() += dx.eigen().cwiseProduct(x.eigen()).colwise().sum();
    dp["b"].eigen() += dx.eigen().colwise().sum();
    dx.eigen().array().rowwise() *= p["a"].eigen().row(0).array();
  }

 private:
  moxie::Layout layout_;
};

int main() {
  using Experts = moxie::ExpertBank<TanhExpert<double>>;
  moxie::TopKMoE<double, Experts> layer({.model_dim = 6, .experts = 5, .top_k = 2});
  layer.initialize(moxie::Rng{3});
  for (const auto& tensor : layer.layout().tensors()) {
    std::printf("%s (%td)\n", tensor.name.c_str(), tensor.rows * tensor.cols);
  }
  const auto x = moxie::random_normal<double>(20, 6, moxie::Rng{4});
  const auto dy = moxie::random_normal<double>(20, 6, moxie::Rng{5});
  bool right = true;
  for (const auto& report : moxie::testing::check_layer_gradients(layer, {x}, dy)) {  // of x, then of every tensor
    std::printf("%s\n", report.message().c_str());
    right = right && report.passes(1e-6);
  }
  return right ? 0 : 1;
}

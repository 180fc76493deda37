// SPDX-License-Identifier: MIT
//
// Lesson 9: a router of your own with a learned gate. ReMoE (Wang et al. 2024): a token goes to every expert whose logit is
// positive, and the logit is the weight.
//
//     z = x Wgᵀ,   w = max(z, 0)       (T,D)(D,E) -> (T,E)
//
// `GatedRouter` owns the gate and its backward. What is left to write is what becomes of the logits, there and back.
#include <cstdio>
#include <moxie/moxie.hpp>
#include <moxie/testing/gradient_check.hpp>

using moxie::Index;

struct ReluRouter : moxie::GatedRouter<ReluRouter, double> {
  ReluRouter(Index model_dim, Index experts) : GatedRouter("ReluRouter", model_dim, experts) {}

  void choose(moxie::ParameterView<const double> /*p*/, const moxie::Tokens<double>& /*in*/, moxie::RowView<const double> z,
              Plan& plan, Tape& /*tape*/, const moxie::Context& /*context*/) const {
    std::vector<Index> expert(std::size_t(z.size()), -1);  // pair t·E + e; -1: none
    for (Index i = 0; i < z.size(); ++i) {
      expert[std::size_t(i)] = z.data()[i] > 0 ? i % experts() : -1;
    }
    plan.build(z.rows(), experts(), experts(), expert, {z.data(), expert.size()});
  }
  void choose_backward(const moxie::Tokens<double>& /*in*/, const Plan& plan, const moxie::RouterGradient<Plan>& gradient,
                       moxie::RowView<double> dz, Tape& /*tape*/, const moxie::Context& /*context*/) const {
    for (Index r = 0; r < plan.rows(); ++r) {
      dz.data()[plan.pair(r)] = gradient.plan.weight[r];
    }
  }
};

int main() {
  using Experts = moxie::SwiGluExperts<double>;
  moxie::Moe<ReluRouter, Experts> layer(ReluRouter(6, 4), Experts(4, 6, {.hidden_dim = 8}));
  layer.initialize(moxie::Rng{1});
  const auto x = moxie::random_normal<double>(20, 6, moxie::Rng{2});
  const auto dy = moxie::random_normal<double>(20, 6, moxie::Rng{3});
  bool right = true;
  for (const auto& report : moxie::testing::check_layer_gradients(layer, {x}, dy)) {
    std::printf("%s\n", report.message().c_str());
    right = right && report.passes(1e-6);
  }
  return right ? 0 : 1;
}

// SPDX-License-Identifier: MIT
//
// Lesson 1: what a mixture-of-experts layer computes.
//
// T tokens of width D (rows of x), E experts, K of them for each token:
//
//     s   = softmax(x Wgᵀ)                       (T,E)  how well each expert fits each token
//     y_t = Σ_{i in the K largest of s_t} s_ti f_i(x_t)        f_i(x) = (silu(x Wgateᵀ) ⊙ (x Wupᵀ)) Wdownᵀ
//
// The layer computes only the K chosen experts of each token. Here the same sum is written out, expert by expert, in plain
// Eigen.
#include <cstdio>
#include <moxie/moxie.hpp>

using moxie::Index;
using moxie::Matrix;

// f_i(x_t) for one token, as the equation says.
static Eigen::RowVectorXd expert(const moxie::TopKMoE<double>& layer, Index i, const Eigen::RowVectorXd& x) {
  const auto w = [&](const char* name) {
    return layer.parameters()["experts." + std::to_string(i) + "." + name + "_proj.weight"].eigen();
  };
  const Eigen::ArrayXd gate = w("gate") * x.transpose();  // (H,D)(D) -> (H)
  const Eigen::ArrayXd up = w("up") * x.transpose();
  const Eigen::VectorXd hidden = gate / (1 + (-gate).exp()) * up;
  return (w("down") * hidden).transpose();  // (D,H)(H) -> (D)
}

int main() {
  constexpr Index T = 10, D = 16, E = 4, K = 2, H = 32;

  moxie::TopKMoE<double> layer({.model_dim = D, .experts = E, .top_k = K, .expert = {.hidden_dim = H}});
  layer.initialize(moxie::Rng{42});

  const Matrix<double> x = moxie::random_normal<double>(T, D, moxie::Rng{1});
  Matrix<double> y(T, D);
  auto tape = layer.make_tape(T);  // remembers the routing, and what a backward pass would need
  layer.forward(x, y, tape);

  // The plan: R = T K assignments (token, expert, weight), sorted by expert.
  const auto& plan = tape.plan();
  for (Index i = 0; i < E; ++i) {
    std::printf("expert %td computes tokens", i);
    for (Index r = plan.expert_starts()[std::size_t(i)]; r < plan.expert_starts()[std::size_t(i + 1)]; ++r) {
      std::printf(" %td (%.2f)", plan.token(r), plan.weight(r));
    }
    std::printf("\n");
  }

  // The same by the equation.
  double worst = 0;
  for (Index t = 0; t < T; ++t) {
    Eigen::ArrayXd s = (layer.parameters()["gate.weight"].eigen() * x.row(t).transpose()).array().exp();
    s /= s.sum();
    Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(D);
    Eigen::ArrayXd left = s;
    for (Index k = 0; k < K; ++k) {
      Index best = 0;
      left.maxCoeff(&best);
      sum += s[best] * expert(layer, best, x.row(t));
      left[best] = -1;
    }
    worst = std::max(worst, (sum - y.row(t)).cwiseAbs().maxCoeff());
  }
  std::printf("largest difference from the equation: %.1e\n", worst);
  return worst < 1e-12 ? 0 : 1;
}

// SPDX-License-Identifier: MIT
//
// Lesson 5: Soft MoE, routing without choosing.
//
// Nothing is selected: every slot of every expert gets a weighted mean of all tokens of its sequence, and every token a
// weighted mean of all slots' outputs. For a sequence X (L,D), slots Φ (N,D), N = E·S:
//
//     Z = l2norm(X) (g · l2norm(Φ))ᵀ      (L,N)
//     A = softmax over tokens (the paper's D),  C = softmax over slots
//     Y = C f(Aᵀ X)
//
// So the arithmetic depends on the number of slots, not of experts, no expert is ever idle, and everything has a gradient. It
// is not causal: every output depends on all tokens of its sequence, and on none of another sequence.
#include <cstdio>
#include <moxie/moxie.hpp>

using moxie::Index;
using moxie::Matrix;

int main() {
  constexpr Index B = 2, L = 6, D = 8, E = 3, S = 2;
  moxie::SoftMoE<double> layer({.model_dim = D, .experts = E, .slots_per_expert = S, .expert = {.hidden_dim = 16}});
  layer.initialize(moxie::Rng{1});

  Matrix<double> x = moxie::random_normal<double>(B * L, D, moxie::Rng{2});
  Matrix<double> y(B * L, D);
  auto tape = layer.make_tape(B * L);
  layer.forward({x, L}, y, tape);  // two sequences of six tokens

  const auto dispatch = tape.plan().dispatch().eigen();  // (B L, N)
  std::printf("how much each token of the first sequence gives to each slot:\n");
  for (Index t = 0; t < L; ++t) {
    for (Index n = 0; n < E * S; ++n) {
      std::printf(" %.2f", dispatch(t, n));
    }
    std::printf("\n");
  }
  const double columns = (dispatch.topRows(L).colwise().sum().array() - 1).abs().maxCoeff();
  const double rows = (tape.plan().combine().eigen().rowwise().sum().array() - 1).abs().maxCoeff();
  std::printf("sums of a slot's shares and of a token's shares are 1 up to %.0e and %.0e\n", columns, rows);

  // Backward: every tensor has a gradient, every expert learns from every token.
  const Matrix<double> dy = y;  // of the loss ½ Σ y²
  Matrix<double> dx(B * L, D);
  auto grads = layer.parameters().zeros_like();
  layer.backward({x, L}, dy, dx, grads, tape);
  bool all_learn = true;
  for (Index i = 0; i < Index(grads.layout().tensors().size()); ++i) {
    const double length = grads.view()[i].eigen().norm();
    std::printf("gradient of %-24s %.3f\n", grads.layout().tensors()[std::size_t(i)].name.c_str(), length);
    all_learn = all_learn && length > 0;
  }

  // A token of the second sequence changes: the first sequence does not notice.
  const Matrix<double> before = y;
  x.row(L).array() += 1;
  layer.forward({x, L}, y, tape);
  const bool first_same = before.topRows(L) == y.topRows(L);
  const bool second_changed = ((before - y).bottomRows(L).rowwise().norm().array() > 0).all();
  std::printf("the other sequence %s, all tokens of its own %s\n", first_same ? "is unchanged" : "changed",
              second_changed ? "changed" : "did not change");
  return columns < 1e-12 && rows < 1e-12 && all_learn && first_same && second_changed ? 0 : 1;
}

// SPDX-License-Identifier: MIT
//
// Lesson 4: a router of your own.
//
// A router turns tokens into a plan: who computes what, and how much it counts. This one has no parameters: it sends a token to
// the experts at the positions of its K largest features, with equal weights.
//
//     chosen_t = K largest of |x_t|, feature i belongs to expert i mod E,   w = 1/K
//
// `FixedRouter` is the base of a router without a gradient: `experts` and `route` are all that is left to write.
#include <cmath>
#include <cstdio>
#include <moxie/moxie.hpp>

using moxie::Index;
using moxie::Matrix;

class LargestFeatureRouter : public moxie::FixedRouter<float> {
 public:
  LargestFeatureRouter(Index experts, Index top_k) : experts_(experts), top_k_(top_k) {}
  Index experts() const { return experts_; }

  void route(moxie::ParameterView<const float> /*p*/, const moxie::Tokens<float>& in, Plan& plan, Tape& /*tape*/,
             const moxie::Context& /*context*/) const {
    std::vector<Index> expert;  // pair t·K + k: the k-th choice of token t
    std::vector<float> weight(std::size_t(in.count() * top_k_), 1.0F / float(top_k_));
    for (Index t = 0; t < in.count(); ++t) {
      std::vector<float> size(static_cast<std::size_t>(experts_), 0.0F);
      for (Index i = 0; i < in.x.cols(); ++i) {
        float& largest = size[std::size_t(i % experts_)];
        largest = std::max(largest, std::abs(in.x(t, i)));
      }
      std::vector<Index> chosen(static_cast<std::size_t>(top_k_));
      moxie::select_top_k(size.data(), experts_, top_k_, chosen.data());
      expert.insert(expert.end(), chosen.begin(), chosen.end());
    }
    plan.build(in.count(), experts_, top_k_, expert, weight);
  }

 private:
  Index experts_;
  Index top_k_;
};

int main() {
  constexpr Index T = 12, D = 8, E = 4, K = 2;
  using Experts = moxie::GeluErfExperts<float>;
  moxie::Moe<LargestFeatureRouter, Experts> layer(LargestFeatureRouter(E, K), Experts(E, D, {.hidden_dim = 16}));
  layer.initialize(moxie::Rng{1});

  const Matrix<float> x = moxie::random_normal<float>(T, D, moxie::Rng{2});
  Matrix<float> y(T, D), dx(T, D);
  auto tape = layer.make_tape(T);
  auto grads = layer.parameters().zeros_like();
  layer.forward(x, y, tape);
  layer.backward(x, y, dx, grads, tape);

  std::int64_t total = 0;
  for (const std::int64_t n : tape.plan().tokens_per_expert()) {
    std::printf("%lld tokens\n", static_cast<long long>(n));
    total += n;
  }
  // Token 0 goes where its largest feature is, and all pairs are assigned.
  Index largest = 0;
  x.row(0).cwiseAbs().maxCoeff(&largest);
  const bool first_right = tape.plan().pair(tape.plan().rows_of_token(0)[0]) == 0;
  bool found = false;
  for (const Index r : tape.plan().rows_of_token(0)) {
    const auto starts = tape.plan().expert_starts();
    found = found || (r >= starts[std::size_t(largest % E)] && r < starts[std::size_t(largest % E + 1)]);
  }
  return total == T * K && first_right && found && dx.norm() > 0 ? 0 : 1;
}

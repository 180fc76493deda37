// SPDX-License-Identifier: MIT
//
// Lesson 2: training, and why balance losses exist.
//
// A teacher mixture labels random tokens; a student of the same shape learns it from loss = mean (y - teacher)². Its gate is
// given a bad start: it prefers one expert for every token. Experts that get no tokens get no gradient, so the preference feeds
// itself. The expert-level balance loss
//
//     α E/(K T) Σ_i n_i P_i        n_i tokens of expert i, P_i its mean score
//
// is smallest when the load is even, and pulls the gate out of the corner. MaxVio = max load / mean load - 1 measures it.
#include <cstdio>
#include <moxie/moxie.hpp>

using moxie::Index;
using moxie::Matrix;

struct Result {
  double first_loss, last_loss, max_violation;
};

static Result train(double alpha) {
  constexpr Index T = 128, D = 8, E = 4, H = 16;
  const moxie::TopKMoE<float>::Config teacher_config{.model_dim = D, .experts = E, .top_k = 2, .expert = {.hidden_dim = H}};
  moxie::TopKMoE<float> teacher(teacher_config);
  teacher.initialize(moxie::Rng{7});

  auto config = teacher_config;
  config.balance.expert_level = alpha;
  moxie::TopKMoE<float> layer(config);
  layer.initialize(moxie::Rng{8});
  layer.parameters()["gate.weight"].middle_rows(1, E - 1).eigen().col(0).setConstant(-3);  // for tokens with a positive first
  layer.parameters()["gate.weight"].middle_rows(0, 1).eigen().col(0).setConstant(3);       // feature, all of which are

  auto grads = layer.parameters().zeros_like();
  auto mean = layer.parameters().zeros_like();
  auto square = layer.parameters().zeros_like();
  auto tape = layer.make_tape(T);
  auto teacher_tape = teacher.make_tape(T);
  Matrix<float> y(T, D), target(T, D), dy(T, D), dx(T, D);
  Result result{};
  double violation = 0;
  constexpr int steps = 600;
  for (int step = 1; step <= steps; ++step) {
    Matrix<float> x = moxie::random_normal<float>(T, D, moxie::Rng{9}.split(std::uint64_t(step)));
    x.col(0) = x.col(0).cwiseAbs();
    teacher.forward(x, target, teacher_tape);
    layer.forward(x, y, tape);
    dy = (y - target) * (2.0F / float(y.size()));
    const double loss = double((y - target).squaredNorm()) / double(y.size());
    grads.set_zero();
    layer.backward(x, dy, dx, grads, tape);  // the gradient of loss + balance loss
    // Adam over all parameters at once: weights, gradients and moments are blocks of one layout.
    const float c1 = 1 - std::pow(0.9F, float(step)), c2 = 1 - std::pow(0.999F, float(step));
    moxie::zip(
        [&](const auto&, auto w, auto g, auto m, auto v) {
          m.eigen() = 0.9F * m.eigen() + 0.1F * g.eigen();
          v.eigen() = 0.999F * v.eigen() + 0.001F * g.eigen().cwiseAbs2();
          w.eigen().array() -= 0.01F * (m.eigen().array() / c1) / ((v.eigen().array() / c2).sqrt() + 1e-8F);
        },
        layer.parameters(), grads, mean, square);
    result.first_loss = step == 1 ? loss : result.first_loss;
    result.last_loss = loss;
    violation += step > steps - 50 ? tape.statistics().max_violation / 50 : 0;
  }
  result.max_violation = violation;
  std::printf("balance %.2f: loss %.4f -> %.4f, MaxVio %.2f\n", alpha, result.first_loss, result.last_loss,
              result.max_violation);
  return result;
}

int main() {
  const Result without = train(0.0);
  const Result with = train(0.1);
  const bool learned = with.last_loss < 0.5 * with.first_loss;
  const bool balanced = with.max_violation < 0.5 * without.max_violation;
  return learned && balanced ? 0 : 1;
}

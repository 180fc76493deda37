// SPDX-License-Identifier: MIT
//
// Lesson 2: training, and the reason for balance losses.
//
// A teacher mixture labels random tokens. A student of the same shape learns it from loss = mean (y - teacher)². Every token
// goes to one expert (K = 1), and the student's gate has a bad start: it prefers expert 0 for every token. An expert with few
// tokens learns little, and an expert without tokens has no gradient. So the gate has no reason to choose another expert, and
// the student stays close to a mixture of one expert. The expert-level balance loss
//
//     α E/(K T) Σ_i n_i P_i        n_i: tokens of expert i, P_i: mean score of expert i
//
// has the gradient α E n_i/(K T) with respect to P_i. It lowers the scores of experts with many tokens more than those of
// experts with few, and so it pulls the gate towards an even load. Its value is α at even load. It is a pull and no measure:
// its value can be below α at uneven load. Two experts and three tokens with the scores (.51,.49), (.51,.49), (.001,.999) have
// n = (2,1), and the value is 0.894 α. MaxVio = max load / mean load - 1 is a measure.
//
// The pull has a price: it is not the direction in which `loss` falls. α = 0.01 is enough here; α = 0.1 makes the load a little
// more even, and the loss larger.
#include <cmath>
#include <cstdio>
#include <moxie/moxie.hpp>

using moxie::Index;
using moxie::Matrix;

// Means over the last 50 steps, except `first_loss`.
struct Result {
  double first_loss, loss, max_violation, idle_experts;
};

static Result train(double alpha) {
  constexpr Index T = 128, D = 8, E = 4, H = 16;
  const moxie::TopKMoE<float>::Config teacher_config{.model_dim = D, .experts = E, .top_k = 1, .expert = {.hidden_dim = H}};
  moxie::TopKMoE<float> teacher(teacher_config);
  teacher.initialize(moxie::Rng{7});

  auto config = teacher_config;
  config.balance.expert_level = alpha;
  moxie::TopKMoE<float> layer(config);
  layer.initialize(moxie::Rng{8});
  // The first feature of every token is positive, so this gate prefers expert 0.
  layer.parameters()["gate.weight"].eigen().col(0).setConstant(-3);
  layer.parameters()["gate.weight"].eigen()(0, 0) = 3;

  auto grads = layer.parameters().zeros_like();
  auto mean = layer.parameters().zeros_like();
  auto square = layer.parameters().zeros_like();
  auto tape = layer.make_tape(T);
  auto teacher_tape = teacher.make_tape(T);
  Matrix<float> y(T, D), target(T, D), dy(T, D), dx(T, D);
  Result result{};
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
    if (step > steps - 50) {
      result.loss += loss / 50;
      result.max_violation += tape.statistics().max_violation / 50;
      for (const std::int64_t tokens : tape.plan().tokens_per_expert()) {
        result.idle_experts += tokens == 0 ? 1.0 / 50 : 0;
      }
    }
  }
  std::printf("balance %.2f: loss %.4f -> %.4f, MaxVio %.2f, experts without a token %.2f\n", alpha, result.first_loss,
              result.loss, result.max_violation, result.idle_experts);
  return result;
}

int main() {
  const Result none = train(0);
  const Result some = train(0.01);
  const Result much = train(0.1);
  bool right = true;
  const auto check = [&](bool holds, const char* claim) {
    std::printf("  %s: %s\n", claim, holds ? "yes" : "NO");
    right = right && holds;
  };
  check(some.loss < 0.1 * some.first_loss, "the student learns");
  check(none.max_violation > 2 && none.idle_experts > 0,
        "without the balance loss, one expert has most of the tokens, and others are without one at times");
  check(some.max_violation < 0.5 && some.idle_experts == 0, "with it, all experts have tokens");
  check(some.loss < 0.85 * none.loss, "and the loss is smaller");
  check(much.max_violation < some.max_violation && much.loss > 1.1 * some.loss, "ten times as much has a price");
  return right ? 0 : 1;
}

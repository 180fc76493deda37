// SPDX-License-Identifier: MIT
#include <sys/resource.h>

#include <benchmarks.hpp>
#include <dit/model.hpp>
#include <dit/optimizer.hpp>
#include <moxie/layer/shared_expert_moe.hpp>
#include <vector>

// The model of the examples in the size DiT-MoE-S/2-8E2A (Fei et al. 2024), on four latents of 4 x 32 x 32: a forward, and a
// training step with AdamW.
namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using Layer = moxie::SharedExpertMoE<float>;
using Model = dit::Model<Layer>;

constexpr Index dim = 384, hidden = 4 * dim, shared = 2 * dim, experts = 8, top_k = 2, batch = 4;

Model make_model() {
  const Layer layer({.model_dim = dim,
                     .experts = experts,
                     .top_k = top_k,
                     .expert = {.hidden_dim = hidden},
                     .shared = {.hidden_dim = shared},
                     .balance = {.expert_level = 0.01}});
  return Model(
      {.image_size = 32, .channels = 4, .patch = 2, .dim = dim, .depth = 12, .heads = 6, .classes = 1000, .learn_sigma = true},
      layer, "moe.");
}

/// Of a forward: the products of every token of every block, the modulations of every image, the embeddings and the last layer.
double flops(const dit::ModelConfig& c) {
  const double length = double(c.tokens());
  const double token = 4.0 * dim * dim + 2.0 * length * dim + 3.0 * dim * (top_k * hidden + shared) + dim * experts;
  const double image = length * token + 6.0 * dim * dim;
  const double rest = length * dim * double(c.patch_dim() + c.patch_output_dim()) + (256.0 + dim + 2.0 * dim) * dim;
  return 2.0 * batch * (double(c.depth) * image + rest);
}

/// GiB of a training step: weights, gradients, two moments and the average; and what the tapes of a block keep: twelve matrices
/// (T,D), R (D + 2H) of the experts, 2 T H' of the shared ones, and the scratch of its backward, R (2D + 3H). Attention's
/// probabilities are scratch of the whole model, twice.
double formula(const Model& model) {
  const dit::ModelConfig& c = model.config();
  const double tokens = double(batch * c.tokens());
  const double block = 12 * tokens * dim + top_k * tokens * (dim + 2 * hidden) + 2 * tokens * shared;
  const double scratch = top_k * tokens * (2 * dim + 3 * hidden);
  const double probabilities = double(batch * c.heads) * double(c.tokens()) * double(c.tokens());
  return 4 * (5 * double(model.layout().size()) + double(c.depth) * (block + scratch) + 2 * probabilities) / double(1 << 30);
}

void add(bool train, const Exec& exec) {
  benchmark::RegisterBenchmark(
      train ? "training_step/DiT-S/2-8E2A" : "forward/DiT-S/2-8E2A",
      [=](benchmark::State& state) {
        const Model model = make_model();
        moxie::Parameters<float> p{moxie::Layout(model.layout())};
        model.initialize(p.view(), moxie::Rng(1));
        const Index size = model.config().output_dim();
        Matrix<float> x = moxie::random_normal<float>(batch, model.config().image_dim(), moxie::Rng(2));
        Matrix<float> v(batch, size), dv = moxie::random_normal<float>(batch, size, moxie::Rng(3));
        const std::vector<float> times = {0.1F, 0.3F, 0.6F, 0.9F};
        const std::vector<Index> labels = {1, 10, 100, 1000};
        auto tape = model.make_tape();
        const double work = flops(model.config());
        state.counters["parameters"] = double(model.layout().parameter_count());
        if (!train) {
          moxie::bench::measure<float>(state, exec, {{work, 0}},
                                       [&] { model.forward(p.view(), x, times, labels, v, tape, exec); });
          return;
        }
        auto grads = p.zeros_like();
        dit::AdamW<float> optimizer({}, p);
        moxie::bench::measure<float>(state, exec, {{3 * work, 0}}, [&] {
          dit::set_zero(grads, exec);
          model.forward(p.view(), x, times, labels, v, tape, exec);
          model.backward(p.view(), dv, grads.view(), tape, exec);
          optimizer.step(p, grads, exec);
        });
        rusage usage{};
        getrusage(RUSAGE_SELF, &usage);
        state.counters["process_gib"] = double(usage.ru_maxrss) / double(1 << 20);
        state.counters["formula_gib"] = formula(model);
      })
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

const moxie::bench::Register registration([](const Exec& exec) {
  add(false, exec);
  add(true, exec);
});

}  // namespace

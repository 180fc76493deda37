// SPDX-License-Identifier: MIT
#include <sys/resource.h>

#include <benchmarks.hpp>
#include <dit/model.hpp>
#include <dit/zoo.hpp>
#include <moxie/layer/shared_expert_moe.hpp>
#include <nn/adamw.hpp>
#include <string>
#include <vector>

// The model of the examples in the size DiT-MoE-S/2-8E2A (Fei et al. 2024), on latents of 4 x 32 x 32: a forward of 4 images,
// and training steps of 4 and 16 with AdamW.
namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using Layer = moxie::SharedExpertMoE<float>;
using Model = dit::Model<Layer>;

const dit::NamedModel named = dit::named_model("S/2-8E2A");

Model make_model() {
  return {named.model,
          Layer({.model_dim = named.model.dim,
                 .experts = named.experts,
                 .top_k = named.top_k,
                 .expert = {.hidden_dim = named.hidden_dim},
                 .shared = {.hidden_dim = named.shared_hidden_dim},
                 .balance = {.expert_level = 0.01}}),
          "moe."};
}

void add(Index batch, bool train, const Exec& exec) {
  const std::string name =
      (train ? "training_step/DiT-MoE-" : "forward/DiT-MoE-") + named.name + "/batch" + std::to_string(batch);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const Model model = make_model();
    moxie::Parameters<float> p{moxie::Layout(model.layout())};
    model.initialize(p.view(), moxie::Rng(1));
    const Index size = model.config().output_dim();
    Matrix<float> x = moxie::random_normal<float>(batch, model.config().image_dim(), moxie::Rng(2));
    Matrix<float> v(batch, size), dv = moxie::random_normal<float>(batch, size, moxie::Rng(3));
    std::vector<float> times;
    std::vector<Index> labels;
    for (Index b = 0; b < batch; ++b) {
      times.push_back((float(b) + 0.5F) / float(batch));
      labels.push_back(b * model.config().classes / batch);
    }
    auto tape = model.make_tape();
    const double work = 2.0 * double(batch) * double(dit::multiply_adds(named));
    state.counters["parameters"] = double(model.layout().parameter_count());
    if (!train) {
      moxie::bench::measure<float>(state, exec, {{work, 0}}, [&] { model.forward(p.view(), x, times, labels, v, tape, exec); });
      return;
    }
    auto grads = p.zeros_like();
    nn::AdamW<float> optimizer({}, p);
    moxie::bench::measure<float>(state, exec, {{3 * work, 0}}, [&] {
      nn::set_zero(grads, exec);
      model.forward(p.view(), x, times, labels, v, tape, exec);
      model.backward(p.view(), dv, grads.view(), tape, exec);
      optimizer.step(p, grads, exec);
    });
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    state.counters["process_gib"] = double(usage.ru_maxrss) / double(1 << 20);
    state.counters["formula_gib"] = double(dit::training_bytes(named, batch)) / double(1 << 30);
  })->Unit(benchmark::kMillisecond);
}

const moxie::bench::Register registration([](const Exec& exec) {
  add(4, false, exec);
  add(4, true, exec);
  add(16, true, exec);
});

}  // namespace

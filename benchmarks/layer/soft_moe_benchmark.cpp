// SPDX-License-Identifier: MIT
#include <benchmarks.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <string>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Keep;
using moxie::Matrix;
using moxie::bench::Work;

/// Soft MoE with as many slots as a sequence has tokens.
struct Case {
  const char* name;
  Index dim, hidden, experts, slots, sequences, length;
};
constexpr Case cases[] = {
    {"soft-16E16S", 384, 1536, 16, 16, 16, 256},
    {"soft-128E2S", 384, 1536, 128, 2, 16, 256},
};

/// 4RDH of the experts; logits, dispatch and combine 2TND each; three times that with backward.
Work work_of(const Case& c, bool backward) {
  const double rows = double(c.sequences) * double(c.experts) * double(c.slots);
  const double tokens = double(c.sequences) * double(c.length);
  const double width = double(c.dim);
  const double flops = 4 * rows * width * double(c.hidden) + 6 * tokens * double(c.experts) * double(c.slots) * width;
  const double weights = 4 * double(c.experts) * width * (2 * double(c.hidden) + double(c.slots));
  return backward ? Work{3 * flops, 4 * weights + 16 * tokens * width} : Work{flops, weights + 8 * tokens * width};
}

void add(const Case& c, bool backward, const Exec& exec) {
  benchmark::RegisterBenchmark(
      ((backward ? "forward_backward/" : "forward/") + std::string(c.name)).c_str(),
      [=](benchmark::State& state) {
        moxie::SoftMoE<float> layer(
            {.model_dim = c.dim, .experts = c.experts, .slots_per_expert = c.slots, .expert = {.hidden_dim = c.hidden}});
        layer.initialize(moxie::Rng(42));
        const Index count = c.sequences * c.length;
        Matrix<float> x(count, c.dim), y(count, c.dim), dy(count, c.dim), dx(count, c.dim);
        moxie::Rng(43).fill_normal(moxie::RowView<float>(x));
        moxie::Rng(44).fill_normal(moxie::RowView<float>(dy));
        auto grads = layer.parameters().zeros_like();
        auto tape = layer.make_tape(count, backward ? Keep::activations : Keep::nothing);
        const moxie::Tokens<float> in(x, c.length);
        const auto step = [&] {
          layer.forward(in, y, tape, exec);
          if (backward) {
            layer.backward(in, dy, dx, grads, tape, exec);
          }
        };
        step();
        moxie::bench::measure<float>(state, exec, {work_of(c, backward)}, step);
      })
      ->Unit(benchmark::kMillisecond);
}

const moxie::bench::Register registration([](const Exec& exec) {
  for (const Case& c : cases) {
    add(c, false, exec);
    add(c, true, exec);
  }
});

}  // namespace

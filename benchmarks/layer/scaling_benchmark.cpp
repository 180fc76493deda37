// SPDX-License-Identifier: MIT
#include <unistd.h>

#include <benchmarks.hpp>
#include <memory>
#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <string>

// Time against the number of experts, at a constant number of routed rows or slots: what Puigcerver et al. 2023 measured for
// Soft MoE and its sparse rivals.
namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Keep;
using moxie::Matrix;
using moxie::bench::Work;

constexpr Index dim = 256, hidden = 512, sequences = 2, length = 2048;
constexpr Index tokens = sequences * length;
constexpr Index rows = 2 * tokens;  // two experts a token, two tokens' rooms an expert, or as many slots
constexpr Index most_experts = rows / sequences;

using Experts = moxie::SwiGluExperts<float>;
using TopK = moxie::TopKMoE<float, Experts>;
using ExpertChoice = moxie::ExpertChoiceMoE<float, Experts>;
using Soft = moxie::SoftMoE<float, Experts>;

std::unique_ptr<TopK> top_k(Index experts) {
  return std::make_unique<TopK>(
      TopK::Config{.model_dim = dim, .experts = experts, .top_k = rows / tokens, .expert = {.hidden_dim = hidden}});
}
std::unique_ptr<ExpertChoice> expert_choice(Index experts) {
  return std::make_unique<ExpertChoice>(ExpertChoice::Config{
      .model_dim = dim, .experts = experts, .expert = {.hidden_dim = hidden}, .capacity = {.factor = double(rows) / tokens}});
}
std::unique_ptr<Soft> soft(Index experts) {
  return std::make_unique<Soft>(Soft::Config{
      .model_dim = dim, .experts = experts, .slots_per_expert = most_experts / experts, .expert = {.hidden_dim = hidden}});
}

/// Two phases, since the experts wait for the router: 2TDE of the gate, or of Soft MoE's logits, dispatch and combine 2TDN
/// each; and 6RDH of the experts. With backward three times that. Weights are read once, or read twice and their gradients read
/// and written.
std::vector<Work> work_of(Index experts, bool is_soft, bool backward) {
  const double gate = double(is_soft ? most_experts : experts) * dim;
  const double weights = 3.0 * double(experts) * dim * hidden;
  const double in_out = 2.0 * tokens * dim;
  std::vector<Work> phases = {{(is_soft ? 6.0 : 2.0) * tokens * gate, 4 * gate},
                              {6.0 * rows * dim * hidden, 4 * (weights + in_out)}};
  for (Work& phase : phases) {
    phase.flops *= backward ? 3 : 1;
    phase.bytes *= backward ? 4 : 1;
  }
  return phases;
}

enum class Pass { forward, frozen, forward_backward };

template <class MakeLayer>
void add(const std::string& router, MakeLayer make_layer, bool is_soft, Index experts, Pass pass, const Exec& exec) {
  const bool backward = pass == Pass::forward_backward;
  const std::string name = backward ? "forward_backward" : pass == Pass::frozen ? "forward_frozen" : "forward";
  benchmark::RegisterBenchmark((name + "/scaling-" + router + "/" + std::to_string(experts)).c_str(), [=](benchmark::State&
                                                                                                              state) {
    const std::vector<Work> work = work_of(experts, is_soft, backward);
    // Weights, and gradients or frozen weights.
    const double needed = 2 * 12.0 * double(experts) * dim * hidden + 2e9;
    if (double(sysconf(_SC_AVPHYS_PAGES)) * double(sysconf(_SC_PAGESIZE)) < needed) {
      state.SkipWithError("not enough memory");
      return;
    }
    const auto layer = make_layer(experts);
    layer->initialize(moxie::Rng(42));
    Matrix<float> x(tokens, dim), y(tokens, dim), dy(tokens, dim), dx(tokens, dim);
    moxie::Rng(43).fill_normal(moxie::RowView<float>(x));
    moxie::Rng(44).fill_normal(moxie::RowView<float>(dy));
    auto tape = layer->make_tape(tokens, backward ? Keep::activations : Keep::nothing);
    const moxie::Tokens<float> in(x, length);
    if (pass == Pass::frozen) {
      const auto frozen = layer->freeze(exec);
      moxie::bench::measure<float>(state, exec, work, [&] { layer->forward(frozen, in, y, tape, exec); });
    } else if (backward) {
      auto grads = layer->parameters().zeros_like();
      moxie::bench::measure<float>(state, exec, work, [&] {
        layer->forward(in, y, tape, exec);
        layer->backward(in, dy, dx, grads, tape, exec);
      });
    } else {
      moxie::bench::measure<float>(state, exec, work, [&] { layer->forward(in, y, tape, exec); });
    }
  })->Unit(benchmark::kMillisecond);
}

const moxie::bench::Register registration([](const Exec& exec) {
  for (const Pass pass : {Pass::forward, Pass::frozen, Pass::forward_backward}) {
    for (Index experts = 8; experts <= most_experts; experts *= 2) {
      add("top_k", top_k, false, experts, pass, exec);
      add("expert_choice", expert_choice, false, experts, pass, exec);
      add("soft", soft, true, experts, pass, exec);
    }
  }
});

}  // namespace

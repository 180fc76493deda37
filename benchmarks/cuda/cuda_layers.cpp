// SPDX-License-Identifier: MIT
//
// What a step of the device's layers costs: launches, products, memory and waits, and on a device the time of a forward and a
// backward, with products of all experts at once and with one expert after the other, beside the bound by arithmetic and
// bandwidth. The same source for nvcc and, for the counts, for any other compiler.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <moxie/cuda/cuda.hpp>
#include <random>
#include <string>
#include <vector>

namespace {

using moxie::Index;
using namespace moxie::cuda;

struct Peak {
  double flops = 0;  // a second, of a large product
  double bytes = 0;  // a second, read and written by a copy
};

#if defined(__CUDACC__)
/// A handle and a stream for all; the `DeviceExec` is a layer's own, so that its scratch is too.
struct Run {
  cublasHandle_t handle = [] {
    cublasHandle_t made = nullptr;
    detail::expect_success(cublasCreate(&made), "cublasCreate");
    return made;
  }();
  cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    detail::expect_success(cudaStreamCreate(&made), "cudaStreamCreate");
    return made;
  }();
};
DeviceExec make_exec() {
  static const Run run;
  return DeviceExec(run.stream, run.handle);
}

/// Median milliseconds of a call, by events of the stream.
template <class F>
double milliseconds(DeviceExec& exec, F&& call) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  detail::expect_success(cudaEventCreate(&begin), "cudaEventCreate");
  detail::expect_success(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i < 23; ++i) {
    detail::expect_success(cudaEventRecord(begin, exec.stream()), "cudaEventRecord");
    call();
    detail::expect_success(cudaEventRecord(end, exec.stream()), "cudaEventRecord");
    detail::expect_success(cudaEventSynchronize(end), "cudaEventSynchronize");
    float time = 0;
    detail::expect_success(cudaEventElapsedTime(&time, begin, end), "cudaEventElapsedTime");
    if (i >= 3) {
      times.push_back(time);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + 10, times.end());
  return times[10];
}

template <class Element>
Peak peak() {
  DeviceExec exec = make_exec();
  const DeviceExec::Frame frame(exec);
  constexpr Index n = 8192;
  using Out = Element;
  Element* a = exec.scratch<Element>(n * n);
  Element* b = exec.scratch<Element>(n * n);
  Out* c = exec.scratch<Out>(n * n);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<Element> numbers(std::size_t(n * n) / 64);  // not zeros, which a device multiplies faster
  std::generate(numbers.begin(), numbers.end(), [&] { return Element(normal(random)); });
  for (Index part = 0; part < 64; ++part) {
    exec.upload(numbers.data(), a + part * n * n / 64, n * n / 64);
    exec.upload(numbers.data(), b + part * n * n / 64, n * n / 64);
  }
  const double product = milliseconds(exec, [&] {
    multiply<Element, Out>(exec, {.m = n,
                                  .n = n,
                                  .k = n,
                                  .a = block_of(DeviceRows<const Element>(a, n, n), 0),
                                  .b = block_of(DeviceRows<const Element>(b, n, n), 0),
                                  .c = block_of(DeviceRows<Out>(c, n, n), 0)});
  });
  const double copy = milliseconds(exec, [&] { exec.copy(a, b, n * n); });
  return {2.0 * n * n * n / product * 1e3, 2.0 * sizeof(Element) * n * n / copy * 1e3};
}
#else
DeviceExec make_exec() { return DeviceExec(); }
#endif

/// Arithmetic and least bytes of a forward's products; a backward has twice both.
struct Work {
  double flops = 0;
  double bytes = 0;
};

std::string counted(const DeviceCounts& c) {
  return std::to_string(c.launches) + " + " + std::to_string(c.products) + " | " + std::to_string(c.synchronizations);
}

template <class Layer>
void measure(const char* name, const Layer& layer, Index tokens, Index length, const Work& work, const Peak& peak) {
  using S = typename Layer::Scalar;
  DeviceExec exec = make_exec();
  const Index dim = layer.model_dim();
  DeviceParameters<S> weights(exec, layer.layout());
  DeviceParameters<S> grads(exec, layer.layout());
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<S> numbers(std::size_t(std::max(layer.layout().size(), tokens * dim)));
  std::generate(numbers.begin(), numbers.end(), [&] { return S(0.05F * normal(random)); });
  weights.upload(exec, numbers.data());
  DeviceBuffer<S> x, y, dx;
  const DeviceRows<S> in(x.resize(exec, tokens * dim), tokens, dim);
  const DeviceRows<S> out(y.resize(exec, tokens * dim), tokens, dim);
  const DeviceRows<S> din(dx.resize(exec, tokens * dim), tokens, dim);
  std::generate(numbers.begin(), numbers.end(), [&] { return S(normal(random)); });
  exec.upload(numbers.data(), in.data, tokens * dim);
  auto tape = layer.make_tape();
  const DeviceTokens<S> sequences(in, length);
  const auto forward = [&] { layer.forward(exec, weights, sequences, out, tape); };
  const auto backward = [&] { layer.backward(exec, weights, sequences, out, {din, grads}, tape); };
  exec.reset_counts();
  forward();
  backward();
  const DeviceCounts first = exec.counts();
  exec.reset_counts();
  forward();
  const DeviceCounts of_forward = exec.counts();
  exec.reset_counts();
  backward();
  const DeviceCounts of_backward = exec.counts();
  std::printf("| %s | %s | %s | %.1f | %.1f |", name, counted(of_forward).c_str(), counted(of_backward).c_str(),
              double(first.bytes) / 1048576, double(exec.scratch_bytes()) / 1048576);
#if defined(__CUDACC__)
  const double bound = 1e3 * std::max(work.flops / peak.flops, work.bytes / peak.bytes);
  for (const auto& [pass, times] : {std::pair<bool, double>{true, 1}, {false, 2}}) {
    const auto timed = [&](double group_up_to) {
      exec.group_up_to = group_up_to;
      return pass ? milliseconds(exec, forward) : milliseconds(exec, backward);
    };
    const double chosen = timed(DeviceExec::default_group_up_to);
    const double grouped = timed(std::numeric_limits<double>::infinity());
    const double loop = timed(0);
    std::printf(" %.3f | %.3f | %.3f | %.3f |", chosen, grouped, loop, times * bound);
  }
  exec.group_up_to = DeviceExec::default_group_up_to;
#else
  static_cast<void>(work);
  static_cast<void>(peak);
#endif
  std::printf("\n");
}

template <class Element>
void measure_all(const char* type) {
  using SwiGlu = SwiGluExperts<float, Element>;
  using Mlp = GeluTanhExperts<float, Element>;
#if defined(__CUDACC__)
  const Peak limit = peak<Element>();
  std::printf("\n%s: products reach %.1f TFLOP/s, copies %.0f GB/s\n\n", type, limit.flops / 1e12, limit.bytes / 1e9);
#else
  const Peak limit;
  std::printf("\n%s\n\n", type);
#endif
  std::printf(
      "| layer | forward: loops + products | waits | backward: loops + products | waits | tape, MiB | scratch, MiB |%s\n",
      host_build ? "" : " forward, ms | all at once | each alone | bound | backward, ms | all at once | each alone | bound |");
  std::printf("|---|---|---|---|---|--:|--:|%s\n", host_build ? "" : "--:|--:|--:|--:|--:|--:|--:|--:|");
  const auto glu = [](Index rows, Index experts, Index dim, Index hidden) {
    return Work{6.0 * double(rows * dim * hidden), 3.0 * double(experts * dim * hidden) * sizeof(Element)};
  };
  constexpr Index tokens = 1024;
  const auto top_k = [&](const char* name, Index dim, Index experts, Index k, Index hidden) {
    measure(name, TopKMoE<float, SwiGlu>({.model_dim = dim, .experts = experts, .top_k = k, .expert = {.hidden_dim = hidden}}),
            tokens, 256, glu(tokens * k, experts, dim, hidden), limit);
  };
  top_k("S/2-8E2A", 384, 8, 2, 1536);
  top_k("S/2-64E2A", 384, 64, 2, 1536);
  top_k("XL/2-8E2A", 1152, 8, 2, 4608);
  Work shared = glu(tokens * 2, 8, 384, 1536);
  shared.flops += 6.0 * tokens * 384 * 3072;
  measure("S/2-8E2A, 2 shared",
          SharedExpertMoE<float, SwiGlu>(
              {.model_dim = 384, .experts = 8, .top_k = 2, .expert = {.hidden_dim = 1536}, .shared = {.hidden_dim = 3072}}),
          tokens, 256, shared, limit);
  measure("S/2-8E2A, balance loss, capacity",
          TopKMoE<float, SwiGlu>({.model_dim = 384,
                                  .experts = 8,
                                  .top_k = 2,
                                  .expert = {.hidden_dim = 1536},
                                  .balance = {.expert_level = 0.01},
                                  .capacity = {.factor = 1.25}}),
          tokens, 256, glu(tokens * 2, 8, 384, 1536), limit);
  measure("expert choice, 8 experts",
          ExpertChoiceMoE<float, SwiGlu>(
              {.model_dim = 384, .experts = 8, .expert = {.hidden_dim = 1536}, .capacity = {.factor = 2}}),
          tokens, 256, glu(tokens * 2, 8, 384, 1536), limit);
  // Slots for every token, twice.
  const Index rows = tokens * 2;
  measure("Soft MoE, 8 experts of 64 slots",
          SoftMoE<float, Mlp>({.model_dim = 384, .experts = 8, .slots_per_expert = 64, .expert = {.hidden_dim = 1536}}), tokens,
          256, {4.0 * double(rows) * 384 * 1536 + 6.0 * tokens * 384 * 512, 2.0 * 8 * 384 * 1536 * sizeof(Element)}, limit);
}

}  // namespace

int main() {
  try {
    measure_all<float>("float");
    measure_all<moxie::BFloat16>("bfloat16");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_layers: %s\n", error.what());
    return 1;
  }
}

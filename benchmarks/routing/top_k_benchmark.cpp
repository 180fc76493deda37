// SPDX-License-Identifier: MIT
#include <benchmarks.hpp>
#include <moxie/exchange/combine.hpp>
#include <moxie/routing/top_k.hpp>
#include <string>

// What a sparse layer does besides its experts: logits, scores, choice, plan, combine.
namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using Router = moxie::TopKRouter<float>;

void add(Index dim, Index experts, Index top_k, Index tokens, const Exec& exec) {
  const std::string name =
      std::to_string(experts) + "E" + std::to_string(top_k) + "A-" + std::to_string(tokens) + "x" + std::to_string(dim);
  const auto add_step = [&](const std::string& part, auto choose) {
    benchmark::RegisterBenchmark((part + "/" + name).c_str(), [=](benchmark::State& state) {
      const Router router({.model_dim = dim, .experts = experts, .top_k = top_k});
      moxie::Parameters<float> p{moxie::Layout(router.layout())};
      router.initialize(p.view(), moxie::Rng(1));
      Matrix<float> x(tokens, dim), y(tokens, dim), h(tokens * top_k, dim);
      moxie::Rng(2).fill_normal(RowView<float>(x));
      h.setOnes();
      y.setZero();
      Router::Plan plan;
      Router::Tape tape;
      moxie::Workspace workspace;
      const auto route = [&] { router.route(p.view(), moxie::Tokens<float>(x), plan, tape, {workspace, exec}); };
      const auto combine = [&] { moxie::combine(plan, RowView<const float>(h), moxie::kernel::add_to<float>(y), exec); };
      route();
      const double flops = 2.0 * double(tokens) * double(dim);
      choose(route, combine, [&](auto step, double work) {
        moxie::bench::measure<float>(state, exec, {{work * flops, 0}}, step);
      });
    })->Unit(benchmark::kMillisecond);
  };
  add_step("route", [=](auto route, auto /*combine*/, auto measure) { measure(route, double(experts)); });
  add_step("combine", [=](auto /*route*/, auto combine, auto measure) { measure(combine, double(top_k)); });
}

const moxie::bench::Register registration([](const Exec& exec) {
  add(384, 8, 2, 4096, exec);
  add(384, 64, 2, 4096, exec);
  add(768, 64, 8, 2048, exec);
  add(256, 1024, 2, 4096, exec);
});

}  // namespace

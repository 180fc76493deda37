// SPDX-License-Identifier: MIT
#include <cases.hpp>
#include <string>

namespace {

using moxie::Exec;
using moxie::Keep;
using moxie::bench::Case;
using moxie::bench::Setup;

/// `make_step(setup)` makes what is measured.
template <class MakeStep>
void add(const std::string& pass, const Case& c, const Exec& exec, Keep keep, bool backward, MakeStep make_step) {
  benchmark::RegisterBenchmark((pass + "/" + c.name).c_str(),
                               [=](benchmark::State& state) {
                                 Setup<float> s(c, keep);
                                 auto step = make_step(s);
                                 step();  // makes the plan
                                 moxie::bench::measure<float>(state, exec, moxie::bench::work_of(c, s.tape.plan(), backward),
                                                              step);
                               })
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

void add_all(const Exec& exec) {
  for (const Case& c : moxie::bench::cases) {
    add("forward", c, exec, Keep::nothing, false,
        [=](Setup<float>& s) { return [=, &s] { s.layer.forward(s.x, s.y, s.tape, exec); }; });
    add("forward_frozen", c, exec, Keep::nothing, false, [=](Setup<float>& s) {
      return [exec, &s, frozen = s.layer.freeze(exec)] { s.layer.forward(frozen, s.x, s.y, s.tape, exec); };
    });
    add("forward_backward", c, exec, Keep::activations, true, [=](Setup<float>& s) {
      return [=, &s] {
        s.layer.forward(s.x, s.y, s.tape, exec);
        s.layer.backward(s.x, s.dy, s.dx, s.grads, s.tape, exec);
      };
    });
  }
}

const moxie::bench::Register registration(add_all);

}  // namespace

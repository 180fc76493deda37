// SPDX-License-Identifier: MIT
#include <cases.hpp>
#include <string>

namespace {

using moxie::Exec;
using moxie::Keep;
using moxie::bench::Case;
using moxie::bench::Setup;

enum class Pass { forward, frozen, forward_backward };

template <class Element>
void add(const std::string& name, Pass pass, const Case& c, const Exec& exec) {
  benchmark::RegisterBenchmark((name + "/" + c.name).c_str(), [=](benchmark::State& state) {
    const bool backward = pass == Pass::forward_backward;
    Setup<Element> s(c, backward ? Keep::activations : Keep::nothing);
    s.layer.forward(s.x, s.y, s.tape, exec);  // makes the plan
    if (pass == Pass::frozen) {
      const auto frozen = s.layer.freeze(exec);
      moxie::bench::measure<Element>(state, exec, {moxie::bench::work_of<Element>(c, s.tape.plan(), false)},
                                     [&] { s.layer.forward(frozen, s.x, s.y, s.tape, exec); });
    } else {
      moxie::bench::measure<Element>(state, exec, {moxie::bench::work_of(c, s.tape.plan(), backward)}, [&] {
        s.layer.forward(s.x, s.y, s.tape, exec);
        if (backward) {
          s.layer.backward(s.x, s.dy, s.dx, s.grads, s.tape, exec);
        }
      });
    }
  })->Unit(benchmark::kMillisecond);
}

template <class Element>
void add_all(const std::string& suffix, const Exec& exec) {
  for (const Case& c : moxie::bench::cases) {
    add<Element>("forward" + suffix, Pass::forward, c, exec);
    add<Element>("forward_frozen" + suffix, Pass::frozen, c, exec);
    add<Element>("forward_backward" + suffix, Pass::forward_backward, c, exec);
  }
}

const moxie::bench::Register registration([](const Exec& exec) {
  add_all<float>("", exec);
  add_all<moxie::BFloat16>("_bf16", exec);
});

}  // namespace

// SPDX-License-Identifier: MIT
#pragma once

#include <cases.hpp>
#include <moxie/kernel/activation.hpp>
#include <string>

/// The same work as people write it without this library: for each expert gather its rows, call a library's product three
/// times, scatter what comes out. Routing is not counted: the plan is there.
namespace moxie::bench {

/// A row-major factor of a product, or its transpose.
struct Factor {
  RowView<const float> matrix;
  bool transposed = false;
};

/// The experts of a layer over a plan. `Gemm{}(a, b, beta, c)` computes C = A B + beta C with all threads.
template <class Gemm>
class PerExpert {
 public:
  PerExpert(const Case& c, const Setup<float>& setup, const Exec& exec) : case_(c), setup_(setup), exec_(exec) {
    const Index rows = plan().rows();
    for (Matrix<float>* m : {&x_, &h_, &dh_, &dx_}) {
      m->resize(rows, c.dim);
    }
    for (Matrix<float>* m : {&gate_, &up_, &hidden_, &dgate_, &dup_, &dhidden_}) {
      m->resize(rows, c.hidden);
    }
  }

  void forward(RowView<float> y) {
    gather(setup_.x, x_, false);
    for_each_expert([&](Index e, const std::string& name) {
      const auto p = setup_.layer.parameters().view();
      gemm_({part(x_, e)}, {p[name + "gate_proj.weight"], true}, 0, part(gate_, e));
      gemm_({part(x_, e)}, {p[name + "up_proj.weight"], true}, 0, part(up_, e));
      exec_.parallel_ranges(part(gate_, e).rows(), 16, [&](Index begin, Index end) {
        kernel::map((end - begin) * case_.hidden, part(hidden_, e).row(begin),
                    [](auto g, auto u) { return Silu::value(g) * u; }, part(gate_, e).row(begin), part(up_, e).row(begin));
      });
      gemm_({part(hidden_, e)}, {p[name + "down_proj.weight"], true}, 0, part(h_, e));
    });
    scatter(h_, y, true);
  }

  void backward(RowView<const float> dy, RowView<float> dx, Parameters<float>& grads) {
    gather(dy, dh_, true);
    for_each_expert([&](Index e, const std::string& name) {
      const auto p = setup_.layer.parameters().view();
      const auto d = grads.view();
      gemm_({part(dh_, e), true}, {part(hidden_, e)}, 1, d[name + "down_proj.weight"]);
      gemm_({part(dh_, e)}, {p[name + "down_proj.weight"]}, 0, part(dhidden_, e));
      exec_.parallel_ranges(part(gate_, e).rows(), 16, [&](Index begin, Index end) {
        kernel::map((end - begin) * case_.hidden, std::array{part(dgate_, e).row(begin), part(dup_, e).row(begin)},
                    [](auto v, auto g, auto u) {
                      return std::array{v * u * Silu::derivative(g), v * Silu::value(g)};
                    },
                    part(dhidden_, e).row(begin), part(gate_, e).row(begin), part(up_, e).row(begin));
      });
      gemm_({part(dgate_, e), true}, {part(x_, e)}, 1, d[name + "gate_proj.weight"]);
      gemm_({part(dup_, e), true}, {part(x_, e)}, 1, d[name + "up_proj.weight"]);
      gemm_({part(dgate_, e)}, {p[name + "gate_proj.weight"]}, 0, part(dx_, e));
      gemm_({part(dup_, e)}, {p[name + "up_proj.weight"]}, 1, part(dx_, e));
    });
    scatter(dx_, dx, false);
  }

 private:
  const SparsePlan<float>& plan() const { return setup_.tape.plan(); }

  template <class F>
  void for_each_expert(F&& f) const {
    for (Index e = 0; e < case_.experts; ++e) {
      if (plan().tokens_per_expert()[std::size_t(e)] > 0) {
        f(e, "experts." + std::to_string(e) + ".");
      }
    }
  }
  RowView<float> part(Matrix<float>& m, Index e) const {
    return RowView<float>(m).middle_rows(plan().expert_starts()[std::size_t(e)], plan().tokens_per_expert()[std::size_t(e)]);
  }
  void gather(RowView<const float> from, Matrix<float>& to, bool weighted) const {
    exec_.parallel_ranges(to.rows(), 64, [&](Index begin, Index end) {
      for (Index r = begin; r < end; ++r) {
        to.row(r) = (weighted ? plan().weight(r) : 1.0F) * from.middle_rows(plan().token(r), 1).eigen();
      }
    });
  }
  void scatter(const Matrix<float>& from, RowView<float> to, bool weighted) const {
    exec_.parallel_ranges(to.rows(), 64, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        to.middle_rows(t, 1).eigen().setZero();
        for (const Index r : plan().rows_of_token(t)) {
          to.middle_rows(t, 1).eigen() += (weighted ? plan().weight(r) : 1.0F) * from.row(r);
        }
      }
    });
  }

  Case case_;
  const Setup<float>& setup_;
  Exec exec_;
  Gemm gemm_;
  Matrix<float> x_, h_, dh_, dx_, gate_, up_, hidden_, dgate_, dup_, dhidden_;
};

/// Adds `forward/<case>/<peer>` and `forward_backward/<case>/<peer>`. Before it is timed, a peer's y must be the layer's.
template <class Gemm>
void add_peer(const std::string& peer, const Exec& exec) {
  for (const Case& c : cases) {
    for (const bool backward : {false, true}) {
      const std::string name = (backward ? "forward_backward/" : "forward/") + std::string(c.name) + "/" + peer;
      benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
        Setup<float> s(c, Keep::activations);
        s.layer.forward(s.x, s.y, s.tape, exec);
        PerExpert<Gemm> experts(c, s, exec);
        Matrix<float> y(c.tokens, c.dim);
        experts.forward(y);
        if (!((y - s.y).norm() <= 1e-5F * s.y.norm())) {
          state.SkipWithError("the results differ");
          return;
        }
        measure<float>(state, exec, {work_of(c, s.tape.plan(), backward)}, [&] {
          experts.forward(y);
          if (backward) {
            experts.backward(s.dy, s.dx, s.grads);
          }
        });
      })->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace moxie::bench

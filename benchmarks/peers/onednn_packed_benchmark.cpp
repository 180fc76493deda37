// SPDX-License-Identifier: MIT
#include <dnnl.hpp>
#include <peers/per_expert.hpp>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

using moxie::BFloat16;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::bench::Case;
using moxie::bench::Setup;

/// oneDNN's matmul with weights that it packed beforehand, in its own order: the rival of frozen weights.
template <class Element>
class PackedExperts {
 public:
  PackedExperts(const Case& c, const Setup<Element>& setup, const moxie::Exec& exec)
      : case_(c), setup_(setup), exec_(exec), engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    const Index rows = setup.tape.plan().rows();
    x_.resize(rows, c.dim);
    hidden_.resize(rows, c.hidden);
    gate_.resize(rows, c.hidden);
    up_.resize(rows, c.hidden);
    h_.resize(rows, c.dim);
    const auto p = setup.layer.parameters().view();
    for (Index e = 0; e < c.experts; ++e) {
      const Index n = count(e);
      if (n > 0) {
        const std::string name = "experts." + std::to_string(e) + ".";
        add(p[name + "gate_proj.weight"], part(x_, e), part(gate_, e));
        add(p[name + "up_proj.weight"], part(x_, e), part(up_, e));
        add(p[name + "down_proj.weight"], part(hidden_, e), part(h_, e));
      }
    }
  }

  void forward(RowView<float> y) {
    const auto& plan = setup_.tape.plan();
    exec_.parallel_ranges(x_.rows(), 64, [&](Index begin, Index end) {
      for (Index r = begin; r < end; ++r) {
        convert(case_.dim, setup_.x.row(plan.token(r)).data(), x_.row(r).data());
      }
    });
    std::size_t next = 0;
    for (Index e = 0; e < case_.experts; ++e) {
      if (count(e) == 0) {
        continue;
      }
      run(next++);
      run(next++);
      exec_.parallel_ranges(count(e), 16, [&](Index begin, Index end) {
        const auto row = [&](auto& m) { return part(m, e).row(begin); };
        using V = moxie::kernel::Batch<float>;
        const Index size = (end - begin) * case_.hidden;
        for (Index i = 0; i < size; i += Index{V::size}) {
          const V g = moxie::kernel::load<V>(row(gate_) + i, size - i);
          const V u = moxie::kernel::load<V>(row(up_) + i, size - i);
          moxie::kernel::store(moxie::Silu::value(g) * u, row(hidden_) + i, size - i);
        }
      });
      run(next++);
    }
    exec_.parallel_ranges(y.rows(), 64, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        y.middle_rows(t, 1).eigen().setZero();
        for (const Index r : plan.rows_of_token(t)) {
          y.middle_rows(t, 1).eigen() += plan.weight(r) * h_.row(r);
        }
      }
    });
  }

 private:
  static constexpr auto type_of(const float* /*p*/) { return dnnl::memory::data_type::f32; }
  static constexpr auto type_of(const BFloat16* /*p*/) { return dnnl::memory::data_type::bf16; }
  using Tag = dnnl::memory::format_tag;

  struct Product {
    dnnl::matmul primitive;
    std::unordered_map<int, dnnl::memory> arguments;
  };

  static void convert(Index n, const float* from, Element* to) {
    using V = moxie::kernel::Batch<float>;
    for (Index i = 0; i < n; i += Index{V::size}) {
      moxie::kernel::store(moxie::kernel::load<V>(from + i, n - i), to + i, n - i);
    }
  }
  Index count(Index e) const { return Index(setup_.tape.plan().tokens_per_expert()[std::size_t(e)]); }
  template <class T>
  RowView<T> part(Matrix<T>& m, Index e) const {
    return RowView<T>(m).middle_rows(setup_.tape.plan().expert_starts()[std::size_t(e)], count(e));
  }

  /// to = from weightᵀ.
  void add(RowView<const float> weight, RowView<Element> from, RowView<float> to) {
    const dnnl::memory::dims a = {from.rows(), from.cols()};
    const dnnl::memory::dims b = {from.cols(), to.cols()};
    const dnnl::memory::dims c = {to.rows(), to.cols()};
    const auto type = type_of(from.data());
    const dnnl::memory::desc source(a, type, Tag::ab);
    const dnnl::memory::desc target(c, dnnl::memory::data_type::f32, Tag::ab);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(source, dnnl::memory::desc(b, type, Tag::any), target),
                                                   engine_);
    dnnl::memory plain({b, dnnl::memory::data_type::f32, Tag::ba}, engine_, const_cast<float*>(weight.data()));
    dnnl::memory packed(description.weights_desc(), engine_);
    dnnl::reorder(plain, packed).execute(stream_, plain, packed);
    stream_.wait();
    products_.push_back({dnnl::matmul(description),
                         {{DNNL_ARG_SRC, {source, engine_, from.data()}},
                          {DNNL_ARG_WEIGHTS, packed},
                          {DNNL_ARG_DST, {target, engine_, to.data()}}}});
  }
  void run(std::size_t i) {
    products_[i].primitive.execute(stream_, products_[i].arguments);
    stream_.wait();
  }

  Case case_;
  const Setup<Element>& setup_;
  moxie::Exec exec_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  std::vector<Product> products_;
  Matrix<Element> x_, hidden_;
  Matrix<float> gate_, up_, h_;
};

template <class Element>
void add_peer(const std::string& pass, float tolerance, const moxie::Exec& exec) {
  for (const Case& c : moxie::bench::cases) {
    benchmark::RegisterBenchmark((pass + "/" + c.name + "/onednn").c_str(), [=](benchmark::State& state) {
      Setup<Element> s(c, moxie::Keep::nothing);
      s.layer.forward(s.x, s.y, s.tape, exec);
      PackedExperts<Element> experts(c, s, exec);
      Matrix<float> y(c.tokens, c.dim);
      experts.forward(y);
      if (!((y - s.y).norm() <= tolerance * s.y.norm())) {
        state.SkipWithError("the results differ");
        return;
      }
      moxie::bench::measure<Element>(state, exec, {moxie::bench::work_of<Element>(c, s.tape.plan(), false)},
                                     [&] { experts.forward(y); });
    })->Unit(benchmark::kMillisecond);
  }
}

const moxie::bench::Register registration([](const moxie::Exec& exec) {
  add_peer<float>("forward_frozen", 1e-5F, exec);
  add_peer<BFloat16>("forward_frozen_bf16", 1e-2F, exec);
});

}  // namespace

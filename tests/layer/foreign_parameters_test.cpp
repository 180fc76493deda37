// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/moxie.hpp>
#include <support.hpp>
#include <temporary_folder.hpp>

#if defined(__unix__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fstream>
#endif

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Parameters;
using moxie::ParameterTable;
using moxie::ParameterView;
using moxie::RowView;
using moxie::TensorInfo;
using moxie::test::contains;
using moxie::test::message_of;

constexpr Index dim = 6;
constexpr Index hidden = 5;
constexpr Index tokens = 14;

// What a layer computes with parameters, and gradients to add to.
template <class Layer>
struct Step {
  using S = typename Layer::Scalar;
  Matrix<S> y = Matrix<S>(tokens, dim);
  Matrix<S> dx = Matrix<S>(tokens, dim);

  Step(const Layer& layer, ParameterView<const S> p, ParameterView<S> grads) {
    const Matrix<S> x = moxie::test::random<S>(tokens, dim, 401);
    const Matrix<S> dy = moxie::test::random<S>(tokens, dim, 402);
    const Matrix<S> c = moxie::test::random<S>(2, dim, 403);
    moxie::Tokens<S> in(x, 7);
    in.condition = c;
    auto tape = layer.make_tape();
    layer.forward(p, in, y, tape, Exec{2});
    layer.backward(p, in, dy, {dx, grads}, tape, Exec{2});
  }
};

// Memory for every tensor of a layout by itself, rows three elements apart from each other; guarded by a number of its own.
template <class S>
struct Apart {
  std::vector<Matrix<S>> memory;

  explicit Apart(const moxie::Layout& layout) {
    for (const TensorInfo& t : layout.tensors()) {
      memory.push_back(Matrix<S>::Constant(t.rows, t.cols + 3, S(-77)));
    }
  }
  ParameterTable<S> table(const moxie::Layout& layout) {
    return ParameterTable<S>(
        layout, [&](const TensorInfo& t) { return RowView<S>(memory[std::size_t(layout.find(t.name))].leftCols(t.cols)); });
  }
  bool guards_are_untouched() const {
    return std::all_of(memory.begin(), memory.end(),
                       [](const Matrix<S>& m) { return (m.rightCols(3).array() == S(-77)).all(); });
  }
};

template <class S, class P, class Q>
void check_same(const P& p, const Q& q) {
  moxie::zip(
      [](const TensorInfo& t, RowView<const S> a, RowView<const S> b) {
        INFO(t.name);
        CHECK(moxie::test::same_bits<S>(a.eigen(), b.eigen()));
      },
      p, q);
}

// The same bits with tensors that the layer does not own, and with gradients of which some are not wanted.
template <class Layer>
void check_foreign(Layer layer) {
  using S = typename Layer::Scalar;
  moxie::test::randomize(layer.parameters(), 404);
  const moxie::Layout& layout = layer.layout();
  const Parameters<S>& own = layer.parameters();
  auto grads = own.zeros_like();
  moxie::test::randomize(grads, 405);
  const auto before = grads;
  const Step<Layer> expected(layer, own, grads);

  Apart<S> weights(layout);
  Apart<S> gradients(layout);
  const ParameterTable<S> p = weights.table(layout);
  const ParameterTable<S> g = gradients.table(layout);
  moxie::copy_tensors(own.view(), p.view());
  moxie::copy_tensors(before.view(), g.view());
  const Step<Layer> found(layer, p, g);
  CHECK(moxie::test::same_bits(found.y, expected.y));
  CHECK(moxie::test::same_bits(found.dx, expected.dx));
  check_same<S>(g, grads);
  CHECK(weights.guards_are_untouched());
  CHECK(gradients.guards_are_untouched());

  // One gradient is not wanted, then all but one, then all.
  for (Index i = 0; i <= 2 * layout.count(); ++i) {
    auto partial = before;
    const ParameterTable<S> table(layout, [&](const TensorInfo& t) {
      const Index position = layout.find(t.name);
      const bool wanted = i < layout.count() ? position != i : position == i - layout.count();
      return wanted ? partial[t.name] : RowView<S>();
    });
    CAPTURE(i);
    const Step<Layer> step(layer, own, table);
    CHECK(moxie::test::same_bits(step.y, expected.y));
    CHECK(moxie::test::same_bits(step.dx, expected.dx));
    moxie::zip(
        [&](const TensorInfo& t, RowView<S> wanted, RowView<const S> result, RowView<const S> all, RowView<const S> old) {
          INFO(t.name);
          CHECK(moxie::test::same_bits<S>(result.eigen(), (wanted.data() != nullptr ? all : old).eigen()));
        },
        table, std::as_const(partial), std::as_const(grads), before);
  }
}

template <class S>
moxie::SharedExpertMoEConfig<moxie::GluConfig<>> shared_config() {
  return {.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = hidden}, .shared = {.hidden_dim = 4}};
}

TEST_CASE("layer: bit-identical over tensors that it does not own, and whichever gradients are wanted") {
  check_foreign(moxie::SharedExpertMoE<float>(shared_config<float>()));
  check_foreign(moxie::SharedExpertMoE<double>(shared_config<double>()));
  check_foreign(moxie::SoftMoE<float>(
      {.model_dim = dim, .experts = 2, .slots_per_expert = 2, .expert = {.hidden_dim = hidden}, .normalize = true}));
  check_foreign(moxie::SoftMoE<float>(
      {.model_dim = dim, .experts = 2, .slots_per_expert = 2, .expert = {.hidden_dim = hidden}, .normalize = false}));
  check_foreign(moxie::ExpertChoiceMoE<float>({.model_dim = dim, .experts = 2, .expert = {.hidden_dim = hidden}}));
  check_foreign(moxie::TimestepMoE<float>({.model_dim = dim, .condition_dim = dim, .experts = 3, .top_k = 2, .expert = {}}));
}

TEST_CASE("layer: bit-identical over tensors that it does not own, with biases and limits of gated units") {
  check_foreign(moxie::TopKMoE<float, moxie::ClampedSwiGluExperts<float>>(
      {.model_dim = dim,
       .experts = 3,
       .top_k = 2,
       .expert = {.hidden_dim = hidden, .bias = true, .unit = {.limit = 7, .alpha = 1.702, .beta = 1}}}));
}

TEST_CASE("layer: bit-identical over tensors that it does not own, in bfloat16") {
  using Experts = moxie::SwiGluExperts<float, moxie::BFloat16>;
  check_foreign(moxie::TopKMoE<float, Experts>({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = hidden}}));
}

TEST_CASE("layer: reads and trains a fused gate_up tensor in place, halves one after the other or row by row") {
  using Layer = moxie::TopKMoE<float>;
  Layer layer({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = hidden}});
  moxie::test::randomize(layer.parameters(), 406);
  const moxie::Layout& layout = layer.layout();
  auto grads = layer.parameters().zeros_like();
  const Step<Layer> expected(layer, layer.parameters(), grads);
  for (const bool interleaved : {false, true}) {
    // (E,2H,D) as transformers keep it, and the rest as the layer does.
    Matrix<float> fused(3 * 2 * hidden, dim);
    Matrix<float> dfused = Matrix<float>::Zero(3 * 2 * hidden, dim);
    Parameters<float> rest = layer.parameters();
    Parameters<float> drest = layer.parameters().zeros_like();
    const auto table_of = [&](Matrix<float>& m, Parameters<float>& others) {
      return ParameterTable<float>(layout, [&](const TensorInfo& t) -> RowView<float> {
        const bool gate = contains(t.name, "gate_proj");
        if (!gate && !contains(t.name, "up_proj")) {
          return others[t.name];
        }
        const Index first = t.expert * 2 * hidden + (gate ? 0 : interleaved ? 1 : hidden);
        return {m.row(first).data(), hidden, dim, interleaved ? 2 * dim : dim};
      });
    };
    const ParameterTable<float> p = table_of(fused, rest);
    const ParameterTable<float> g = table_of(dfused, drest);
    moxie::copy_tensors(layer.parameters().view(), p.view());
    const Step<Layer> found(layer, p, g);
    CHECK(moxie::test::same_bits(found.y, expected.y));
    CHECK(moxie::test::same_bits(found.dx, expected.dx));
    check_same<float>(g, grads);
  }
}

#if defined(__unix__)
TEST_CASE("layer: runs on a read-only mapped file, frozen and not") {
  moxie::TopKMoE<float> layer({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = hidden}});
  moxie::test::randomize(layer.parameters(), 407);
  const moxie::test::TemporaryFolder folder;
  const auto path = folder / "weights";
  const auto flat = layer.parameters().flat();
  const auto bytes = std::size_t(flat.size()) * sizeof(float);
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(flat.data()), std::streamsize(bytes));
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  REQUIRE(file >= 0);
  void* const mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
  ::close(file);
  REQUIRE(mapped != MAP_FAILED);

  const ParameterTable<const float> p(layer.layout(), static_cast<const float*>(mapped));
  const Matrix<float> x = moxie::test::random<float>(tokens, dim, 408);
  Matrix<float> expected(tokens, dim);
  Matrix<float> y(tokens, dim);
  auto tape = layer.make_tape();
  layer.forward(x, expected, tape);
  layer.forward(p, x, y, tape);
  CHECK(moxie::test::same_bits(y, expected));
  const auto frozen = layer.freeze(p);
  y.setZero();
  layer.forward(frozen, x, y, tape);
  CHECK(moxie::test::same_bits(y, expected));
  ::munmap(mapped, bytes);
}
#endif

TEST_CASE("layer: an absent parameter, gradients over other tensors and halves at other distances are refused") {
  using Layer = moxie::TopKMoE<float>;
  Layer layer({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = hidden}});
  moxie::test::randomize(layer.parameters(), 409);
  const moxie::Layout& layout = layer.layout();
  Parameters<float>& own = layer.parameters();
  auto grads = own.zeros_like();
  const auto message = [&](ParameterView<const float> p, ParameterView<float> g) {
    return message_of<moxie::ValueError>([&] { Step<Layer>(layer, p, g); });
  };
  const ParameterTable<const float> absent(layout, [&](const TensorInfo& t) {
    return t.name == "experts.1.down_proj.weight" ? RowView<const float>() : std::as_const(own)[t.name];
  });
  CHECK(message(absent, grads) == "TopKMoE::forward: a parameter is absent");
  const ParameterTable<float> crossed(layout, [&](const TensorInfo& t) {
    return t.name == "experts.1.up_proj.weight" ? own["experts.0.gate_proj.weight"] : grads[t.name];
  });
  CHECK(contains(message(own, crossed), "gradients overlap"));
  Matrix<float> wide(hidden, dim + 1);
  const ParameterTable<const float> other(layout, [&](const TensorInfo& t) {
    return t.name == "experts.1.up_proj.weight" ? RowView<const float>(wide.leftCols(dim)) : std::as_const(own)[t.name];
  });
  CHECK(contains(message(other, grads), "not at equal distances"));
  CHECK((grads.flat() == 0).all());
}

TEST_CASE("layer: a moved-from one has no tensors, and refuses to run") {
  using Layer = moxie::TopKMoE<float>;
  Layer a({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = hidden}});
  const Layer b = std::move(a);
  const Matrix<float> x = moxie::test::random<float>(tokens, dim, 410);
  Matrix<float> y = moxie::test::untouched<float>(tokens, dim);
  auto tape = b.make_tape();
  // NOLINTBEGIN(bugprone-use-after-move): that is the claim
  CHECK(a.layout().count() == 0);
  CHECK(a.parameters().count() == 0);
  CHECK_THROWS_AS(a.forward(x, y, tape), moxie::ShapeError);
  CHECK_THROWS_AS(a.forward(b.parameters(), x, y, tape), moxie::ShapeError);
  CHECK_THROWS_AS(a.forward(Layer::Frozen{}, x, y, tape), moxie::ValueError);
  CHECK_THROWS_AS(a.freeze(), moxie::ShapeError);
  CHECK_THROWS_AS(b.forward(Layer::Frozen{}, x, y, tape), moxie::ValueError);
  // NOLINTEND(bugprone-use-after-move)
  CHECK(moxie::test::is_untouched(y));
  b.forward(x, y, tape);
}

}  // namespace

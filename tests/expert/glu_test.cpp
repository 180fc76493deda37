// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <expert/bank_checks.hpp>
#include <moxie/expert/glu.hpp>

namespace {

using moxie::BankNames;
using moxie::Index;
using moxie::RowView;
namespace reference = moxie::test::reference;
using namespace moxie::test::bank;  // NOLINT(google-build-using-namespace)

constexpr Index hidden = 7;

TEST_CASE_TEMPLATE("GLU experts: rows are (silu(x Wgᵀ) ⊙ x Wuᵀ) Wdᵀ of their expert", S, float, double) {
  check_forward(
      moxie::SwiGluExperts<S>(experts, dim, {hidden}),
      [](const auto& p, const std::string& name, const reference::Vector& x) { return reference::swiglu(p, name, x); });
}

// (act(x Wgᵀ) ⊙ x Wuᵀ) Wdᵀ.
auto glu(double (*activation)(double)) {
  return [activation](const auto& p, const std::string& name, const reference::Vector& x) {
    const reference::Vector gate = reference::tensor(p, name + "gate_proj.weight") * x;
    const reference::Vector up = reference::tensor(p, name + "up_proj.weight") * x;
    return reference::Vector(reference::tensor(p, name + "down_proj.weight") * gate.unaryExpr(activation).cwiseProduct(up));
  };
}

TEST_CASE_TEMPLATE("GLU experts: GEGLU and ReGLU are the same with another activation", S, float, double) {
  check_forward(moxie::GegluTanhExperts<S>(experts, dim, {hidden}), glu(&reference::gelu_tanh));
  check_forward(moxie::GegluErfExperts<S>(experts, dim, {hidden}), glu(&reference::gelu_erf));
  check_forward(moxie::ReGluExperts<S>(experts, dim, {hidden}), glu([](double x) { return x > 0 ? x : 0; }));
}

TEST_CASE("GLU experts: backward matches central differences, and adds to gradients") {
  check_backward(moxie::SwiGluExperts<double>(experts, dim, {hidden}));
  check_backward(moxie::GegluTanhExperts<double>(experts, dim, {hidden}));
  check_backward(moxie::GegluErfExperts<double>(experts, dim, {hidden}));
  check_backward(moxie::ReGluExperts<double>(experts, dim, {hidden}));
}

TEST_CASE_TEMPLATE("GLU experts: keep the laws of banks", S, float, double) {
  check_laws(moxie::SwiGluExperts<S>(3, dim, {hidden}));
  check_laws(moxie::SwiGluExperts<S>(1, 1, {1}));
  check_laws(moxie::SwiGluExperts<S>(2, 33, {70}));
  check_laws(moxie::GegluTanhExperts<S>(3, dim, {hidden}));
  check_laws(moxie::GegluErfExperts<S>(3, dim, {hidden}));
  check_laws(moxie::ReGluExperts<S>(3, dim, {hidden}));
}

TEST_CASE_TEMPLATE("GLU experts: many rows give what few give", S, float, double) {
  check_many_rows(moxie::SwiGluExperts<S>(2, 32, {80}));
  check_many_rows(moxie::SwiGluExperts<S>(2, 37, {43}));  // lines that tiles do not fill
}

TEST_CASE("GLU experts: of BFloat16 elements are close, and keep the laws of banks") {
  using moxie::BFloat16;
  for (const auto& [width, wide] : {std::pair<Index, Index>{dim, hidden}, {33, 70}, {64, 32}}) {
    check_bfloat16(moxie::SwiGluExperts<float, BFloat16>(experts, width, {wide}),
                   moxie::SwiGluExperts<double>(experts, width, {wide}));
  }
  check_bfloat16(moxie::GegluTanhExperts<float, BFloat16>(experts, dim, {hidden}),
                 moxie::GegluTanhExperts<double>(experts, dim, {hidden}));
  check_laws(moxie::SwiGluExperts<float, BFloat16>(3, dim, {hidden}));
  check_laws(moxie::SwiGluExperts<float, BFloat16>(2, 33, {70}));
}

TEST_CASE("GLU experts: tensors are named and shaped as in the reference") {
  const moxie::SwiGluExperts<float> bank(2, dim, {hidden});
  CHECK(bank.layout().tensors().size() == 6);
  const auto& up = bank.layout().tensors()[std::size_t(bank.layout().find("experts.1.up_proj.weight"))];
  CHECK(up.shape == std::vector<Index>{hidden, dim});
  const auto& down = bank.layout().tensors()[std::size_t(bank.layout().find("experts.0.down_proj.weight"))];
  CHECK(down.shape == std::vector<Index>{dim, hidden});
  CHECK(moxie::SwiGluExperts<float>(1, dim, {hidden}, BankNames{"shared_experts", false})
            .layout()
            .find("shared_experts.gate_proj.weight") == 0);
}

TEST_CASE("GLU experts: start uniform on ±√(6 / (in + out)), each tensor otherwise") {
  const moxie::SwiGluExperts<double> bank(2, 30, {24});
  moxie::Parameters<double> p{moxie::Layout(bank.layout())};
  bank.initialize(p.view(), moxie::Rng(5));
  const double bound = std::sqrt(6.0 / 54);
  moxie::zip(
      [&](const moxie::TensorInfo&, RowView<double> w) {
        CHECK(w.eigen().cwiseAbs().maxCoeff() <= bound);
        CHECK(w.eigen().cwiseAbs().maxCoeff() > 0.95 * bound);
      },
      p);
  CHECK(p["experts.0.gate_proj.weight"].eigen() != p["experts.1.gate_proj.weight"].eigen());
  CHECK(p["experts.0.gate_proj.weight"].eigen() != p["experts.0.up_proj.weight"].eigen());
}

using Clamped = moxie::ClampedSwiGlu;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// unit(x Wgᵀ + bg, x Wuᵀ + bu) Wdᵀ + bd, one hidden unit after the other.
auto gated(double (*unit)(double, double), bool bias) {
  return [unit, bias](const auto& p, const std::string& name, const reference::Vector& x) {
    const auto projection = [&](const std::string& which, const reference::Vector& in) {
      const auto w = p[name + which + ".weight"];
      reference::Vector out(w.rows());
      for (Index i = 0; i < w.rows(); ++i) {
        out[i] = bias ? p[name + which + ".bias"](0, i) : 0;
        for (Index j = 0; j < w.cols(); ++j) {
          out[i] += w(i, j) * in[j];
        }
      }
      return out;
    };
    const reference::Vector gate = projection("gate_proj", x);
    const reference::Vector up = projection("up_proj", x);
    reference::Vector middle(gate.size());
    for (Index i = 0; i < gate.size(); ++i) {
      middle[i] = unit(gate[i], up[i]);
    }
    return projection("down_proj", middle);
  };
}

// Limits that about half of the random projections meet, none within a step of central differences, and limits that none meets.
template <class S>
void for_each_unit(const auto& f) {
  for (const bool bias : {false, true}) {
    f(moxie::SwiGluExperts<S>(experts, dim, {.hidden_dim = hidden, .bias = bias}),
      gated([](double g, double u) { return g * sigmoid(g) * u; }, bias));
    f(moxie::ClampedSwiGluExperts<S>(experts, dim,
                                     {.hidden_dim = hidden, .bias = bias, .unit = {.limit = 0.4, .alpha = 1.702, .beta = 1}}),
      gated(
          [](double g, double u) {
            const double most = std::min(g, 0.4);
            return (std::clamp(u, -0.4, 0.4) + 1) * most * sigmoid(1.702 * most);
          },
          bias));
    f(moxie::ClampedSwiGluExperts<S>(experts, dim,
                                     {.hidden_dim = hidden, .bias = bias, .unit = {.limit = 1000, .alpha = 1.702, .beta = 1}}),
      gated([](double g, double u) { return (u + 1) * g * sigmoid(1.702 * g); }, bias));
    f(moxie::ClampedSwiGluExperts<S>(experts, dim, {.hidden_dim = hidden, .bias = bias, .unit = {.limit = 0.3}}),
      gated(
          [](double g, double u) {
            const double most = std::min(g, 0.3);
            return most * sigmoid(most) * std::clamp(u, -0.3, 0.3);
          },
          bias));
    f(moxie::SwiGluClampedAfterExperts<S>(experts, dim, {.hidden_dim = hidden, .bias = bias, .unit = {.limit = 0.25}}),
      gated([](double g, double u) { return std::min(g * sigmoid(g), 0.25) * std::clamp(u, -0.25, 0.25); }, bias));
    f(moxie::SoftCappedSwiGluExperts<S>(experts, dim,
                                        {.hidden_dim = hidden, .bias = bias, .unit = {.gate_cap = 0.7, .up_cap = 0.9}}),
      gated([](double g, double u) { return 0.7 * std::tanh(g / 0.7) * sigmoid(g) * 0.9 * std::tanh(u / 0.9); }, bias));
  }
}

// How many gates lie above a limit, and how many ups beyond it, of the rows that these tests draw.
std::pair<Index, Index> beyond(double limit) {
  const moxie::ClampedSwiGluExperts<double> bank(experts, dim, {.hidden_dim = hidden, .bias = true});
  const auto p = random_parameters(bank);
  const moxie::Matrix<double> x = moxie::test::random<double>(tokens, dim, 903);
  std::pair<Index, Index> count(0, 0);
  for (Index e = 0; e < experts; ++e) {
    for (Index r = starts[e]; r < starts[e + 1]; ++r) {
      const std::string name = "experts." + std::to_string(e) + ".";
      const auto of = [&](const std::string& which) -> moxie::Matrix<double> {
        return x.row(gather[r]) * p[name + which + ".weight"].eigen().transpose() + p[name + which + ".bias"].eigen();
      };
      count.first += (of("gate_proj").array() > limit).count();
      count.second += (of("up_proj").array().abs() > limit).count();
    }
  }
  return count;
}

TEST_CASE_TEMPLATE("GLU experts: gated units and biases give rows of a naive loop", S, float, double) {
  for_each_unit<S>([](const auto& bank, const auto& expected) { check_forward(bank, expected); });
}

TEST_CASE("GLU experts: limits of these tests are met and not met") {
  for (const double limit : {0.25, 0.4}) {
    const auto [gates, ups] = beyond(limit);
    CHECK(gates > rows * hidden / 5);
    CHECK(gates < rows * hidden * 4 / 5);
    CHECK(ups > rows * hidden / 5);
    CHECK(ups < rows * hidden);
  }
  CHECK(beyond(1000) == std::pair<Index, Index>(0, 0));
}

TEST_CASE("GLU experts: backward of gated units and biases matches central differences") {
  for_each_unit<double>([](const auto& bank, const auto& /*expected*/) { check_backward(bank); });
}

TEST_CASE_TEMPLATE("GLU experts: gated units and biases keep the laws of banks, frozen weights among them", S, float, double) {
  for_each_unit<S>([](const auto& bank, const auto& /*expected*/) { check_laws(bank); });
  check_laws(moxie::ClampedSwiGluExperts<S>(2, 33, {.hidden_dim = 70, .bias = true, .unit = {.limit = 2}}));
}

TEST_CASE("GLU experts: with biases, many rows give what few give") {
  check_many_rows(moxie::ClampedSwiGluExperts<float>(2, 32, {.hidden_dim = 80, .bias = true, .unit = {.limit = 2, .beta = 1}}));
}

TEST_CASE("GLU experts: gated units and biases of BFloat16 elements are close, and the same bits with frozen weights") {
  using moxie::BFloat16;
  for (const auto& [width, wide] : {std::pair<Index, Index>{dim, hidden}, {33, 70}, {64, 32}}) {
    // No limit is near: beside one, rounding decides whether there is a derivative.
    const Clamped unit{.limit = 1000, .alpha = 1.702, .beta = 1};
    check_bfloat16(moxie::ClampedSwiGluExperts<float, BFloat16>(experts, width, {wide, true, unit}),
                   moxie::ClampedSwiGluExperts<double>(experts, width, {wide, true, unit}));
    check_bfloat16(moxie::SwiGluExperts<float, BFloat16>(experts, width, {wide, true}),
                   moxie::SwiGluExperts<double>(experts, width, {wide, true}));
    check_bfloat16(moxie::SoftCappedSwiGluExperts<float, BFloat16>(experts, width, {wide, true, {.gate_cap = 4, .up_cap = 25}}),
                   moxie::SoftCappedSwiGluExperts<double>(experts, width, {wide, true, {.gate_cap = 4, .up_cap = 25}}));
  }
  check_laws(
      moxie::ClampedSwiGluExperts<float, BFloat16>(3, dim, {.hidden_dim = hidden, .bias = true, .unit = {.limit = 0.4}}));
}

// Of a bank and of another one over the same parameters: h, drows and gradients.
template <class A, class B>
void check_same_bits(const A& a, const B& b) {
  using S = typename A::Scalar;
  const auto p = random_parameters(a);
  const moxie::Matrix<S> x = moxie::test::random<S>(tokens, dim, 910);
  const moxie::Matrix<S> dh = moxie::test::random<S>(rows, dim, 911);
  const auto run = [&](const auto& bank) {
    struct Result {
      moxie::Matrix<S> h, drows;
      moxie::Parameters<S> grads;
    } out{moxie::Matrix<S>(rows, dim), moxie::Matrix<S>(rows, dim), p.zeros_like()};
    moxie::Workspace workspace;
    typename std::decay_t<decltype(bank)>::Tape kept;
    const moxie::GroupedRows<S> in{starts, x, gather};
    bank.forward(p.view(), in, out.h, &kept, workspace);
    bank.backward(p.view(), in, dh, {out.drows, out.grads}, kept, workspace);
    return out;
  };
  const auto of_a = run(a);
  const auto of_b = run(b);
  CHECK(moxie::test::same_bits(of_a.h, of_b.h));
  CHECK(moxie::test::same_bits(of_a.drows, of_b.drows));
  CHECK((of_a.grads.flat() == of_b.grads.flat()).all());
}

TEST_CASE_TEMPLATE("GLU experts: `Gated` of an activation is the activation, bit for bit", S, float, double) {
  static_assert(std::is_same_v<typename moxie::GluExperts<S, moxie::Gated<moxie::Silu>>::Config, moxie::GluConfig<>>);
  check_same_bits(moxie::SwiGluExperts<S>(experts, dim, {.hidden_dim = hidden, .bias = true}),
                  moxie::GluExperts<S, moxie::Gated<moxie::Silu>>(experts, dim, {.hidden_dim = hidden, .bias = true}));
}

TEST_CASE("GLU experts: biases come after the weights of their expert, and start at zero") {
  const moxie::SwiGluExperts<double> bank(2, dim, {.hidden_dim = hidden, .bias = true});
  const auto& tensors = bank.layout().tensors();
  REQUIRE(tensors.size() == 12);
  const char* names[] = {"gate_proj.weight", "up_proj.weight", "down_proj.weight",
                         "gate_proj.bias",   "up_proj.bias",   "down_proj.bias"};
  for (std::size_t i = 0; i < 12; ++i) {
    CHECK(tensors[i].name == "experts." + std::to_string(i / 6) + "." + names[i % 6]);
    CHECK((tensors[i].role == moxie::Role::bias) == (i % 6 >= 3));
    CHECK(tensors[i].expert == Index(i / 6));
  }
  CHECK(tensors[3].shape == std::vector<Index>{hidden});
  CHECK(tensors[5].shape == std::vector<Index>{dim});

  const moxie::SwiGluExperts<double> plain(2, dim, {.hidden_dim = hidden});
  auto p = random_parameters(bank);
  auto q = random_parameters(plain);
  bank.initialize(p.view(), moxie::Rng(5));
  plain.initialize(q.view(), moxie::Rng(5));
  for (const moxie::TensorInfo& t : tensors) {
    INFO(t.name);
    if (t.role == moxie::Role::bias) {
      CHECK((p[t.name].eigen().array() == 0).all());
    } else {
      CHECK(p[t.name].eigen() == q[t.name].eigen());
    }
  }
}

TEST_CASE("GLU experts: gradients of biases that are absent are skipped") {
  const moxie::ClampedSwiGluExperts<double> bank(experts, dim,
                                                 {.hidden_dim = hidden, .bias = true, .unit = {.limit = 0.4, .beta = 1}});
  const moxie::Layout& layout = bank.layout();
  const auto p = random_parameters(bank);
  const moxie::Matrix<double> x = moxie::test::random<double>(tokens, dim, 910);
  const moxie::Matrix<double> dh = moxie::test::random<double>(rows, dim, 911);
  moxie::Matrix<double> h(rows, dim), drows(rows, dim);
  moxie::Workspace workspace;
  moxie::ClampedSwiGluExperts<double>::Tape kept;
  const moxie::GroupedRows<double> in{starts, x, gather};
  bank.forward(p.view(), in, h, &kept, workspace);
  auto all = p.zeros_like();
  bank.backward(p.view(), in, dh, {drows, all}, kept, workspace);
  for (Index absent = 0; absent < layout.count(); ++absent) {
    CAPTURE(absent);
    auto grads = p.zeros_like();
    const moxie::ParameterTable<double> table(
        layout, [&](const moxie::TensorInfo& t) { return layout.find(t.name) == absent ? RowView<double>() : grads[t.name]; });
    bank.backward(p.view(), in, dh, {drows, table}, kept, workspace);
    for (const moxie::TensorInfo& t : layout.tensors()) {
      if (layout.find(t.name) == absent) {
        CHECK((grads[t.name].eigen().array() == 0).all());
      } else {
        CHECK(grads[t.name].eigen() == all[t.name].eigen());
      }
    }
  }
}

TEST_CASE("GLU experts: options of a gated unit that make no function are refused") {
  CHECK_THROWS_WITH_AS(moxie::ClampedSwiGluExperts<float>(2, 4, {.hidden_dim = 4, .unit = {.limit = 0}}),
                       "GluExperts: the limit of a gated unit must be above 0", moxie::ValueError);
  CHECK_THROWS_AS(moxie::ClampedSwiGluExperts<float>(2, 4, {.hidden_dim = 4, .unit = {.limit = 1e-60}}), moxie::ValueError);
  CHECK_NOTHROW(moxie::ClampedSwiGluExperts<double>(2, 4, {.hidden_dim = 4, .unit = {.limit = 1e-60}}));
  CHECK_THROWS_AS(moxie::SwiGluClampedAfterExperts<float>(2, 4, {.hidden_dim = 4, .unit = {.limit = -1}}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::SoftCappedSwiGluExperts<float>(2, 4, {.hidden_dim = 4}), moxie::ValueError);
}

TEST_CASE("GLU experts: sizes that make no bank are refused") {
  CHECK_THROWS_AS(moxie::SwiGluExperts<float>(0, 4, {4}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::SwiGluExperts<float>(2, 0, {4}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::SwiGluExperts<float>(2, 4, {0}), moxie::ValueError);
}

}  // namespace

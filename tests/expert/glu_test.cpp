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

TEST_CASE("GLU experts: sizes that make no bank are refused") {
  CHECK_THROWS_AS(moxie::SwiGluExperts<float>(0, 4, {4}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::SwiGluExperts<float>(2, 0, {4}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::SwiGluExperts<float>(2, 4, {0}), moxie::ValueError);
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <expert/bank_checks.hpp>
#include <moxie/expert/mlp.hpp>

namespace {

using moxie::Index;
namespace reference = moxie::test::reference;
using namespace moxie::test::bank;  // NOLINT(google-build-using-namespace)

constexpr Index hidden = 7;

TEST_CASE_TEMPLATE("MLP experts: rows are act(x W1ᵀ + b1) W2ᵀ + b2 of their expert", S, float, double) {
  check_forward(moxie::GeluTanhExperts<S>(experts, dim, {hidden}),
                [](const auto& p, const std::string& name, const reference::Vector& x) {
                  return reference::mlp(p, name, x, &reference::gelu_tanh);
                });
  check_forward(moxie::GeluErfExperts<S>(experts, dim, {hidden}),
                [](const auto& p, const std::string& name, const reference::Vector& x) {
                  return reference::mlp(p, name, x, &reference::gelu_erf);
                });
  check_forward(moxie::ReluSquaredExperts<S>(experts, dim, {hidden}),
                [](const auto& p, const std::string& name, const reference::Vector& x) {
                  return reference::mlp(p, name, x, [](double a) { return a > 0 ? a * a : 0; });
                });
}

TEST_CASE("MLP experts: backward matches central differences, and adds to gradients") {
  check_backward(moxie::GeluTanhExperts<double>(experts, dim, {hidden}));
  check_backward(moxie::GeluErfExperts<double>(experts, dim, {hidden}));
  check_backward(moxie::ReluSquaredExperts<double>(experts, dim, {hidden}));
}

TEST_CASE_TEMPLATE("MLP experts: keep the laws of banks", S, float, double) {
  check_laws(moxie::GeluTanhExperts<S>(3, dim, {hidden}));
  check_laws(moxie::GeluErfExperts<S>(1, 1, {1}));
  check_laws(moxie::GeluErfExperts<S>(2, 33, {70}));
  check_laws(moxie::ReluSquaredExperts<S>(3, dim, {hidden}));
}

TEST_CASE_TEMPLATE("MLP experts: many rows give what few give", S, float, double) {
  check_many_rows(moxie::GeluTanhExperts<S>(2, 32, {80}));
  check_many_rows(moxie::GeluErfExperts<S>(2, 37, {43}));  // lines that tiles do not fill
}

TEST_CASE("MLP experts: of BFloat16 elements are close, and keep the laws of banks") {
  using moxie::BFloat16;
  for (const auto& [width, wide] : {std::pair<Index, Index>{dim, hidden}, {33, 71}, {64, 32}}) {
    check_bfloat16(moxie::GeluTanhExperts<float, BFloat16>(experts, width, {wide}),
                   moxie::GeluTanhExperts<double>(experts, width, {wide}));
  }
  check_laws(moxie::GeluTanhExperts<float, BFloat16>(3, dim, {hidden}));
  check_laws(moxie::GeluTanhExperts<float, BFloat16>(2, 33, {71}));
}

TEST_CASE("MLP experts: tensors are named and shaped as said") {
  const moxie::GeluTanhExperts<float> bank(2, dim, {hidden});
  const auto shape = [&](const std::string& name) {
    return bank.layout().tensors()[std::size_t(bank.layout().find(name))].shape;
  };
  CHECK(bank.layout().tensors().size() == 8);
  CHECK(shape("experts.1.fc1.weight") == std::vector<Index>{hidden, dim});
  CHECK(shape("experts.1.fc1.bias") == std::vector<Index>{hidden});
  CHECK(shape("experts.0.fc2.weight") == std::vector<Index>{dim, hidden});
  CHECK(shape("experts.0.fc2.bias") == std::vector<Index>{dim});
}

TEST_CASE("MLP experts: start with uniform weights and biases of zero, whatever was there") {
  const moxie::GeluTanhExperts<double> bank(2, 30, {24});
  moxie::Parameters<double> p = random_parameters(bank);
  bank.initialize(p.view(), moxie::Rng(6));
  const double bound = std::sqrt(6.0 / 54);
  for (const char* name : {"experts.0.fc1.weight", "experts.1.fc2.weight"}) {
    CHECK(p[name].eigen().cwiseAbs().maxCoeff() <= bound);
    CHECK(p[name].eigen().cwiseAbs().maxCoeff() > 0.95 * bound);
  }
  CHECK((p["experts.0.fc1.bias"].eigen().array() == 0).all());
  CHECK((p["experts.1.fc2.bias"].eigen().array() == 0).all());
  CHECK(p["experts.0.fc1.weight"].eigen() != p["experts.1.fc1.weight"].eigen());
}

TEST_CASE("MLP experts: sizes that make no bank are refused") {
  CHECK_THROWS_AS(moxie::GeluTanhExperts<float>(0, 4, {4}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::GeluTanhExperts<float>(2, 0, {4}), moxie::ValueError);
  CHECK_THROWS_AS(moxie::GeluTanhExperts<float>(2, 4, {0}), moxie::ValueError);
}

}  // namespace

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/expert/config.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Layout;

TEST_CASE("config: banks name the tensors of their experts as the references do") {
  const Layout glu = moxie::glu_layout(2, 3, {.hidden_dim = 5});
  REQUIRE(glu.tensors().size() == 6);
  CHECK(glu.tensors()[3].name == "experts.1.gate_proj.weight");
  CHECK(glu.tensors()[3].shape == std::vector<Index>{5, 3});
  CHECK(glu.tensors()[4].name == "experts.1.up_proj.weight");
  CHECK(glu.tensors()[5].name == "experts.1.down_proj.weight");
  CHECK(glu.tensors()[5].shape == std::vector<Index>{3, 5});
  const Layout mlp = moxie::mlp_layout(1, 3, {.hidden_dim = 5}, {"shared_experts", false});
  REQUIRE(mlp.tensors().size() == 4);
  CHECK(mlp.tensors()[0].name == "shared_experts.fc1.weight");
  CHECK(mlp.tensors()[1].name == "shared_experts.fc1.bias");
  CHECK(mlp.tensors()[1].shape == std::vector<Index>{5});
  CHECK(mlp.tensors()[2].name == "shared_experts.fc2.weight");
  CHECK(mlp.tensors()[3].name == "shared_experts.fc2.bias");
}

TEST_CASE("config: banks without experts, width or hidden width are refused") {
  const auto message = [](Index experts, Index model_dim, Index hidden_dim) {
    return moxie::test::message_of<moxie::ValueError>([&] { moxie::glu_layout(experts, model_dim, {hidden_dim}); });
  };
  CHECK(message(0, 1, 1) == "GluExperts: experts is 0, expected at least 1");
  CHECK(message(1, 0, 1) == "GluExperts: model_dim is 0, expected at least 1");
  CHECK(message(1, 1, 0) == "GluExperts: hidden_dim is 0, expected at least 1");
  CHECK_THROWS_AS(moxie::mlp_layout(1, 1, {0}), moxie::ValueError);
}

}  // namespace

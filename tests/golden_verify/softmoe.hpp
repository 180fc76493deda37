// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/layer/soft_moe.hpp>

#include "vmoe_experts.hpp"

namespace golden {

/// Family `softmoe`: Soft MoE with normalized logits (vmoe), or plain ones (Algorithm 1 of the paper).
///
/// The reference keeps Φ as [D,E,P], `mu` or `phi`, and kernels as [E,in,out]: the transposes of the layer's.
template <class Scalar, template <class> class On = OnCpu>
void verify_softmoe(GoldenCase& golden) {
  const Index groups = golden.integer("groups");
  const Index length = golden.integer("group_size");
  const Index dim = golden.integer("dim");
  const Index hidden = golden.integer("mlp_hidden");
  const Index experts = golden.integer("num_experts", 1, 4096);
  const Index slots = golden.integer("num_slots");
  const bool normalize = golden.boolean("normalized");
  if (golden.file().metadata().count("noise_std") > 0 && golden.number("noise_std") != 0) {
    throw GoldenError("metadata 'noise_std' is not 0");
  }
  const Index tokens = groups * length;
  const std::string phi_name = normalize ? "Router.mu" : "Router.phi";

  const std::vector<Index> like_x{groups, length, dim};
  const std::vector<Index> weights{groups, length, experts, slots};
  for (const char* name : {"input/x", "input/dy", "output/y", "grad/x"}) {
    golden.require(name, like_x);
  }
  for (const std::string prefix : {"param/", "grad/param/"}) {
    golden.require(prefix + phi_name, {dim, experts, slots});
    if (normalize) {
      golden.require(prefix + "Router.scale", {});
    }
  }
  const VmoeExperts<Scalar> bank{experts, dim, hidden};
  bank.require(golden);
  golden.require("intermediate/slots", {experts, groups, slots, dim});
  golden.require("routing/dispatch_weights", weights);
  golden.require("routing/combine_weights", weights);
  golden.require("loss/aux", {});
  golden.require("loss/total", {});
  golden.allow("extra/output_y_bf16_dispatch", like_x);
  golden.leave_out("extra/output_y_bf16_dispatch", "the reference's rounding to bfloat16 on the way to the experts and back");
  GoldenCase::limit({groups, experts, slots, hidden});

  On<moxie::SoftMoE<Scalar>> layer({.model_dim = dim,
                                    .experts = experts,
                                    .slots_per_expert = slots,
                                    .expert = {.hidden_dim = hidden},
                                    .normalize = normalize});
  moxie::Parameters<Scalar>& p = layer.parameters();
  p["phi.weight"].eigen() = golden.matrix<Scalar>("param/" + phi_name, dim, experts * slots).transpose();
  if (normalize) {
    p["scale"].eigen() = golden.matrix<Scalar>("param/Router.scale", 1, 1);
  }
  bank.load(golden, p);

  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", tokens, dim);
  const Matrix<Scalar> dy = golden.matrix<Scalar>("input/dy", tokens, dim);
  const moxie::Tokens<Scalar> in(x, length);
  Matrix<Scalar> y = unwritten<Scalar>(tokens, dim);
  auto tape = layer.make_tape(tokens);
  layer.forward(in, y, tape);

  // Rows and columns of the plan, and the rows of the slots, are in the reference's order.
  moxie::Matrix<Scalar> slot_rows(tape.plan().rows(), in.x.cols());
  golden.compare("routing/dispatch_weights", values(tape.plan().dispatch()));
  golden.compare("routing/combine_weights", values(tape.plan().combine()));
  golden.compare("intermediate/slots", values(moxie::dispatch(tape.plan(), in.x, slot_rows, {}).rows));
  golden.compare("output/y", values(y));
  golden.compare("loss/aux", {tape.balance_loss()});
  golden.compare_total("loss/total", y, dy, tape.balance_loss());

  auto grads = layer.parameters().zeros_like();
  Matrix<Scalar> dx = unwritten<Scalar>(tokens, dim);
  layer.backward(in, dy, dx, grads, tape);
  golden.compare("grad/x", values(dx));
  golden.compare("grad/param/" + phi_name, values<Scalar>(grads["phi.weight"].eigen().transpose()));
  if (normalize) {
    golden.compare("grad/param/Router.scale", values(grads["scale"]));
  }
  bank.compare_gradients(golden, grads);
}

}  // namespace golden

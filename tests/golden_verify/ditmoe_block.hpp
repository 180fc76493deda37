// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/layer/shared_expert_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>

#include "golden_case.hpp"

namespace golden {

/// DiT-MoE's block, its SwiGLU experts and its balance loss: what the metadata says.
struct DitMoeBlock {
  explicit DitMoeBlock(const GoldenCase& golden)
      : batch(golden.integer("batch")),
        length(golden.integer("tokens")),
        dim(golden.integer("embed_dim")),
        experts(golden.integer("num_experts", 1, 4096)),
        top_k(golden.integer("top_k", 1, experts)),
        hidden(golden.integer("routed_intermediate")),
        shared(golden.integer("n_shared_experts", 0)),
        shared_hidden(shared == 0 ? 0 : golden.integer("shared_intermediate")),
        // The reference leaves a single weight as it is.
        normalize(golden.boolean("norm_topk_prob") && top_k > 1),
        alpha(golden.number("aux_loss_alpha")),
        per_sequence(golden.boolean("seq_aux")) {
    expect_width("routed_intermediate", hidden, golden.integer("mlp_ratio") * dim);
    expect_width("shared_intermediate", shared_hidden, shared * dim);
    const Index slices = golden.integer("pretraining_tp");
    used_hidden = sliced(hidden, slices);
    used_shared_hidden = shared == 0 ? 0 : sliced(shared_hidden, slices);
    expect_width("effective_routed_intermediate", golden.integer("effective_routed_intermediate"), used_hidden);
  }

  /// The reference cuts an intermediate into slices of equal width and drops the rest.
  static Index sliced(Index width, Index slices) {
    if (width < slices) {
      throw GoldenError("an intermediate of width " + std::to_string(width) + " does not divide into " +
                        std::to_string(slices) + " slices");
    }
    return width / slices * slices;
  }

  Index tokens() const { return batch * length; }

  moxie::TopKMoEConfig<moxie::GluConfig<>> routed_config() const {
    return {.model_dim = dim,
            .experts = experts,
            .top_k = top_k,
            .expert = {.hidden_dim = used_hidden},
            .normalize = normalize,
            .balance = {.expert_level = per_sequence ? 0 : alpha, .sequence_level = per_sequence ? alpha : 0}};
  }
  moxie::SharedExpertMoEConfig<moxie::GluConfig<>> config() const {
    const auto routed = routed_config();
    return {.model_dim = routed.model_dim,
            .experts = routed.experts,
            .top_k = routed.top_k,
            .expert = routed.expert,
            .shared = {.hidden_dim = used_shared_hidden},
            .normalize = routed.normalize,
            .balance = routed.balance};
  }

  void require(const GoldenCase& golden) const {
    const std::vector<Index> like_x{batch, length, dim};
    for (const char* name : {"input/x", "input/dy", "output/y", "output/y_eval", "intermediate/y_routed", "grad/x"}) {
      golden.require(name, like_x);
    }
    for (const std::string prefix : {"param/", "grad/param/"}) {
      golden.require(prefix + "gate.weight", {experts, dim});
      for (Index e = 0; e < experts; ++e) {
        require_expert(golden, prefix + "experts." + std::to_string(e) + ".", hidden);
      }
      if (shared > 0) {
        require_expert(golden, prefix + "shared_experts.", shared_hidden);
      }
    }
    golden.require("loss/total", {});
    golden.require("routing/expert_index", {tokens(), top_k});
    golden.require("routing/weight", {tokens(), top_k});
    golden.require("routing/weight_dense", {tokens(), experts});
    golden.require("routing/scores", {tokens(), experts});
    golden.require("routing/tokens_per_expert", {experts});
    // The reference has no loss to record without alpha, and no shared output without shared experts.
    const auto require_if = [&golden](bool needed, const char* name, const std::vector<Index>& shape) {
      needed ? golden.require(name, shape) : golden.allow(name, shape);
    };
    require_if(alpha != 0, "loss/aux", {});
    require_if(alpha != 0, "grad_aux/x", like_x);
    require_if(alpha != 0, "grad_aux/param/gate.weight", {experts, dim});
    require_if(shared > 0, "intermediate/y_shared", like_x);
    GoldenCase::limit({tokens(), top_k, used_hidden});
    GoldenCase::limit({tokens(), std::max<Index>(used_shared_hidden, 1)});
  }

  Index batch;
  Index length;
  Index dim;
  Index experts;
  Index top_k;
  Index hidden;
  Index shared;
  Index shared_hidden;
  bool normalize;
  double alpha;
  bool per_sequence;
  Index used_hidden = 0;
  Index used_shared_hidden = 0;

 private:
  static void expect_width(const std::string& name, Index stated, Index computed) {
    if (stated != computed) {
      throw GoldenError("metadata '" + name + "' is " + std::to_string(stated) + ", but by the others it is " +
                        std::to_string(computed));
    }
  }
  void require_expert(const GoldenCase& golden, const std::string& prefix, Index width) const {
    golden.require(prefix + "gate_proj.weight", {width, dim});
    golden.require(prefix + "up_proj.weight", {width, dim});
    golden.require(prefix + "down_proj.weight", {dim, width});
  }
};

/// Fills parameters from tensors of the same names, which may be larger: the leading rows and columns.
template <class Scalar>
void load_leading(GoldenCase& golden, moxie::ParameterView<Scalar> p) {
  for (const moxie::TensorInfo& t : p.layout().tensors()) {
    const std::vector<Index>& shape = golden.shape("param/" + t.name);
    const Matrix<Scalar> stored = golden.matrix<Scalar>("param/" + t.name, shape[0], shape[1]);
    p[t.name].eigen() = stored.topLeftCorner(t.rows, t.cols);
  }
}

/// Compares gradients with tensors of the same names, which may be larger: what the reference ignores has gradient zero.
template <class Scalar>
void compare_leading(GoldenCase& golden, const std::string& prefix, moxie::ParameterView<const Scalar> grads) {
  for (const moxie::TensorInfo& t : grads.layout().tensors()) {
    const std::vector<Index>& shape = golden.shape(prefix + t.name);
    Matrix<Scalar> whole = Matrix<Scalar>::Zero(shape[0], shape[1]);
    whole.topLeftCorner(t.rows, t.cols) = grads[t.name].eigen();
    golden.compare(prefix + t.name, values(whole));
  }
}

/// Whether all experts have the same number of tokens, in the batch or in every sequence: the balance loss is then constant.
template <class Scalar>
bool balanced(const moxie::SparsePlan<Scalar>& plan, Index sequences) {
  std::vector<std::int64_t> counts(std::size_t(sequences * plan.experts()));
  for (Index e = 0; e < plan.experts(); ++e) {
    for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e) + 1]; ++r) {
      ++counts[std::size_t(plan.token(r) / (plan.tokens() / sequences) * plan.experts() + e)];
    }
  }
  return std::all_of(counts.begin(), counts.end(), [&](std::int64_t n) { return n == counts.front(); });
}

/// Routing, output, losses and gradients of a layer that has the reference's parameters.
template <class Scalar, class Layer>
void compare_layer(GoldenCase& golden, const DitMoeBlock& block, Layer layer) {
  load_leading<Scalar>(golden, layer.parameters());
  const Index tokens = block.tokens();
  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", tokens, block.dim);
  const Matrix<Scalar> dy = golden.matrix<Scalar>("input/dy", tokens, block.dim);
  const moxie::Tokens<Scalar> in(x, block.length);
  Matrix<Scalar> y = unwritten<Scalar>(tokens, block.dim);
  auto tape = layer.make_tape(tokens);
  layer.forward(in, y, tape);

  const moxie::SparsePlan<Scalar>& plan = tape.plan();
  std::vector<std::int64_t> chosen(std::size_t(tokens * block.top_k), -1);
  std::vector<double> weight(chosen.size());
  Matrix<Scalar> weight_dense = Matrix<Scalar>::Zero(tokens, block.experts);
  for (Index e = 0; e < block.experts; ++e) {
    for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e) + 1]; ++r) {
      chosen[std::size_t(plan.pair(r))] = e;
      weight[std::size_t(plan.pair(r))] = double(plan.weight(r));
      weight_dense(plan.token(r), e) = plan.weight(r);
    }
  }
  golden.compare("routing/scores", values(tape.router().scores()));
  golden.compare_choices("routing/expert_index", "routing/weight", block.experts, chosen, weight);
  golden.compare("routing/weight_dense", values(weight_dense));
  golden.compare_exactly("routing/tokens_per_expert", plan.tokens_per_expert());

  golden.compare("output/y", values(y));
  golden.compare("output/y_eval", values(y));
  if (golden.contains("loss/aux")) {
    golden.compare("loss/aux", {tape.balance_loss()});
  }
  golden.compare_total("loss/total", y, dy, tape.balance_loss());

  auto grads = layer.parameters().zeros_like();
  Matrix<Scalar> dx = unwritten<Scalar>(tokens, block.dim);
  layer.backward(in, dy, dx, grads, tape);
  golden.compare("grad/x", values(dx));
  compare_leading<Scalar>(golden, "grad/param/", std::as_const(grads));

  // Of the balance loss alone.
  const Matrix<Scalar> zero = Matrix<Scalar>::Zero(tokens, block.dim);
  grads.set_zero();
  dx = unwritten<Scalar>(tokens, block.dim);
  layer.backward(in, zero, dx, grads, tape);
  const bool constant = block.alpha != 0 && balanced(plan, block.per_sequence ? block.batch : 1);
  const auto compare_aux = [&](const std::string& name, const std::vector<double>& actual, double terms) {
    if (golden.contains(name)) {
      constant ? golden.compare_cancelled(name, actual, terms) : golden.compare(name, actual);
    }
  };
  const RowView<const Scalar> gate = std::as_const(layer).parameters()["gate.weight"];
  compare_aux("grad_aux/x", values(dx), block.alpha / double(tokens) * double(gate.eigen().cwiseAbs().maxCoeff()));
  compare_aux("grad_aux/param/gate.weight", values(grads["gate.weight"]), block.alpha * double(x.cwiseAbs().maxCoeff()));
}

/// Family `ditmoe_block`: SparseMoeBlock of DiT-MoE.
template <class Scalar, template <class> class On = OnCpu>
void verify_ditmoe_block(GoldenCase& golden) {
  const DitMoeBlock block(golden);
  block.require(golden);
  const On<moxie::TopKMoE<Scalar>> routed(block.routed_config());
  if (block.shared > 0) {
    compare_layer<Scalar>(golden, block, On<moxie::SharedExpertMoE<Scalar>>(block.config()));
  } else {
    compare_layer<Scalar>(golden, block, routed);
  }

  // Both parts of the output.
  const Index tokens = block.tokens();
  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", tokens, block.dim);
  {
    auto layer = routed;
    load_leading<Scalar>(golden, layer.parameters());
    auto tape = layer.make_tape();
    Matrix<Scalar> y = unwritten<Scalar>(tokens, block.dim);
    layer.forward({x, block.length}, y, tape);
    golden.compare("intermediate/y_routed", values(y));
  }
  Matrix<Scalar> y = Matrix<Scalar>::Zero(tokens, block.dim);
  if (block.shared > 0) {
    const moxie::SwiGluExperts<Scalar> bank(1, block.dim, {.hidden_dim = block.used_shared_hidden}, {"shared_experts", false});
    moxie::Parameters<Scalar> p(bank.layout());
    load_leading<Scalar>(golden, p);
    moxie::Workspace workspace;
    const Index starts[]{0, tokens};
    y = unwritten<Scalar>(tokens, block.dim);
    bank.forward(p, {starts, x}, y, nullptr, workspace);
  }
  if (golden.contains("intermediate/y_shared")) {
    golden.compare("intermediate/y_shared", values(y));
  }
}

}  // namespace golden

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/layer/shared_expert_moe.hpp>
#include <moxie/loss/selection_bias.hpp>

#include "ditmoe_block.hpp"

namespace golden {

/// Family `deepseek_moe`: the block of DeepSeek-V3, with sigmoid scores, a selection bias, a limit on groups and shared
/// experts.
struct DeepSeekMoe {
  explicit DeepSeekMoe(const GoldenCase& golden)
      : batch(golden.integer("batch")),
        length(golden.integer("tokens")),
        dim(golden.integer("dim")),
        hidden(golden.integer("moe_intermediate")),
        shared_hidden(golden.integer("shared_intermediate")),
        experts(golden.integer("num_experts", 1, 4096)),
        top_k(golden.integer("top_k", 1, experts)),
        groups{.count = golden.integer("n_group", 1, experts), .chosen = golden.integer("topk_group", 1, experts)},
        scale(golden.number("routed_scaling_factor")),
        alpha(golden.number("balance_alpha")) {
    if (golden.integer("n_shared_experts") * hidden != shared_hidden) {
      throw GoldenError("metadata 'shared_intermediate' is not n_shared_experts times moe_intermediate");
    }
  }

  Index tokens() const { return batch * length; }
  moxie::SharedExpertMoEConfig<moxie::GluConfig<>> config(bool count_chosen) const {
    return {.model_dim = dim,
            .experts = experts,
            .top_k = top_k,
            .expert = {.hidden_dim = hidden},
            .shared = {.hidden_dim = shared_hidden},
            .normalize = true,
            .scale = scale,
            .balance = {.sequence_level = alpha, .count_chosen = count_chosen},
            .allow_constant_weights = true,
            .score = moxie::Score::sigmoid,
            .groups = groups,
            .selection_bias = true};
  }

  void require(const GoldenCase& golden) const {
    const std::vector<Index> like_x{batch, length, dim};
    for (const char* name : {"input/x", "input/dy", "output/y", "intermediate/y_routed", "intermediate/y_shared", "grad/x",
                             "grad_aux/x", "grad_aux_variant/x"}) {
      golden.require(name, like_x);
    }
    const auto require_expert = [&](const std::string& prefix, Index width) {
      golden.require(prefix + "gate_proj.weight", {width, dim});
      golden.require(prefix + "up_proj.weight", {width, dim});
      golden.require(prefix + "down_proj.weight", {dim, width});
    };
    for (const std::string prefix : {"param/", "grad/param/"}) {
      golden.require(prefix + "gate.weight", {experts, dim});
      for (Index e = 0; e < experts; ++e) {
        require_expert(prefix + "experts." + std::to_string(e) + ".", hidden);
      }
      require_expert(prefix + "shared_experts.", shared_hidden);
    }
    golden.require("grad_aux/param/gate.weight", {experts, dim});
    golden.require("grad_aux_variant/param/gate.weight", {experts, dim});
    golden.require("buffer/expert_bias", {experts});
    golden.require("output/expert_bias_updated", {experts});
    for (const char* name : {"loss/aux", "loss/aux_variant_biased_topk", "loss/total"}) {
      golden.require(name, {});
    }
    golden.require("loss/aux_per_sequence", {batch});
    golden.require("routing/P", {batch, experts});
    golden.require("routing/f", {batch, experts});
    golden.require("routing/expert_index", {tokens(), top_k});
    golden.require("routing/unbiased_topk_index", {tokens(), top_k});
    golden.require("routing/weight", {tokens(), top_k});
    golden.require("routing/scores", {tokens(), experts});
    golden.require("routing/tokens_per_expert", {experts});
    golden.allow("routing/group_scores", {tokens(), groups.count});
    GoldenCase::limit({tokens(), top_k, hidden});
    GoldenCase::limit({tokens(), shared_hidden});
  }

  Index batch;
  Index length;
  Index dim;
  Index hidden;
  Index shared_hidden;
  Index experts;
  Index top_k;
  moxie::ExpertGroups groups;
  double scale;
  double alpha;
};

template <class Scalar, template <class> class On = OnCpu>
void verify_deepseek_moe(GoldenCase& golden) {
  const DeepSeekMoe c(golden);
  c.require(golden);
  const Index tokens = c.tokens();
  using Layer = On<moxie::SharedExpertMoE<Scalar>>;
  Layer layer(c.config(false));
  const char* const bias_name = "gate.e_score_correction_bias";
  for (const moxie::TensorInfo& t : layer.layout().tensors()) {
    const std::string name = t.name == bias_name ? "buffer/expert_bias" : "param/" + t.name;
    layer.parameters()[t.name].eigen() = golden.matrix<Scalar>(name, t.rows, t.cols);
  }
  const Matrix<Scalar> bias = layer.parameters()[bias_name].eigen();
  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", tokens, c.dim);
  const Matrix<Scalar> dy = golden.matrix<Scalar>("input/dy", tokens, c.dim);
  const moxie::Tokens<Scalar> in(x, c.length);
  Matrix<Scalar> y = unwritten<Scalar>(tokens, c.dim);
  auto tape = layer.make_tape(tokens);
  layer.forward(in, y, tape);

  const RowView<const Scalar> scores = tape.router().scores();
  std::vector<double> weight(std::size_t(tokens * c.top_k));
  for (Index r = 0; r < tape.plan().rows(); ++r) {
    weight[std::size_t(tape.plan().pair(r))] = double(tape.plan().weight(r));
  }
  const auto choices = tape.router().choices();
  golden.compare("routing/scores", values(scores));
  golden.compare_choices("routing/expert_index", "routing/weight", c.experts, {choices.begin(), choices.end()}, weight);
  golden.compare_exactly("routing/tokens_per_expert", tape.plan().tokens_per_expert());
  std::vector<Index> unbiased(std::size_t(tokens * c.top_k));
  Matrix<Scalar> group_scores(tokens, c.groups.count);
  for (Index t = 0; t < tokens; ++t) {
    moxie::select_top_k(scores.row(t), c.experts, c.top_k, unbiased.data() + t * c.top_k);
    Matrix<Scalar> biased = scores.middle_rows(t, 1).eigen() + bias;
    std::vector<Index> group(std::size_t(c.groups.count)), chosen(std::size_t(c.top_k));
    moxie::select_top_k_in_groups(biased.data(), c.experts, c.top_k, c.groups, {&group_scores(t, 0), group.data()},
                                  chosen.data());
  }
  golden.compare_exactly("routing/unbiased_topk_index", {unbiased.begin(), unbiased.end()});
  if (golden.contains("routing/group_scores")) {
    golden.compare("routing/group_scores", values(group_scores));
  }

  golden.compare("output/y", values(y));
  golden.compare("loss/aux", {tape.balance_loss()});
  golden.compare_total("loss/total", y, dy, tape.balance_loss());

  // Each sequence alone: f, P and the loss of its own.
  std::vector<double> f, p, per_sequence;
  auto alone_config = c.config(false);
  alone_config.balance.expert_level = c.alpha;  // of one sequence the same, and it keeps f and P
  alone_config.balance.sequence_level = 0;
  const Layer alone(alone_config);
  const moxie::SharedExpertMoE<Scalar> keeps_totals(alone_config);
  for (Index b = 0; b < c.batch; ++b) {
    const Matrix<Scalar> part = x.middleRows(b * c.length, c.length);
    Matrix<Scalar> y_part(c.length, c.dim);
    auto part_tape = alone.make_tape();
    alone.forward(layer.parameters(), part, y_part, part_tape, {});
    per_sequence.push_back(part_tape.balance_loss());
    auto totals_tape = keeps_totals.make_tape();
    keeps_totals.forward(layer.parameters(), part, y_part, totals_tape, {});
    for (Index e = 0; e < c.experts; ++e) {
      f.push_back(totals_tape.router().balance_totals().frequency(std::size_t(e)));
      p.push_back(totals_tape.router().balance_totals().probability(std::size_t(e)));
    }
  }
  golden.compare("routing/f", f);
  golden.compare("routing/P", p);
  golden.compare("loss/aux_per_sequence", per_sequence);

  auto grads = layer.parameters().zeros_like();
  Matrix<Scalar> dx = unwritten<Scalar>(tokens, c.dim);
  layer.backward(in, dy, dx, grads, tape);
  golden.compare("grad/x", values(dx));
  for (const moxie::TensorInfo& t : layer.layout().tensors()) {
    if (t.name == bias_name) {
      if ((grads[t.name].eigen().array() != Scalar(0)).any()) {
        throw GoldenError("the selection bias has a gradient");
      }
    } else {
      golden.compare("grad/param/" + t.name, values(grads[t.name]));
    }
  }

  const Matrix<Scalar> zero = Matrix<Scalar>::Zero(tokens, c.dim);
  const auto losses = [&](const std::string& prefix, bool count_chosen) {
    Layer variant(c.config(count_chosen));
    variant.parameters() = layer.parameters();
    auto variant_tape = variant.make_tape();
    variant.forward(in, y, variant_tape);
    grads.set_zero();
    dx = unwritten<Scalar>(tokens, c.dim);
    variant.backward(in, zero, dx, grads, variant_tape);
    golden.compare(prefix + "/x", values(dx));
    golden.compare(prefix + "/param/gate.weight", values(grads["gate.weight"]));
    return variant_tape.balance_loss();
  };
  losses("grad_aux", false);
  golden.compare("loss/aux_variant_biased_topk", {losses("grad_aux_variant", true)});

  moxie::update_selection_bias(layer.parameters()[bias_name], tape.plan().tokens_per_expert(),
                               golden.number("bias_update_speed"));
  golden.compare("output/expert_bias_updated", values(layer.parameters()[bias_name]));

  // Both parts of the output.
  const auto both = c.config(false);
  On<moxie::TopKMoE<Scalar>> routed({.model_dim = both.model_dim,
                                     .experts = both.experts,
                                     .top_k = both.top_k,
                                     .expert = both.expert,
                                     .normalize = both.normalize,
                                     .scale = both.scale,
                                     .allow_constant_weights = both.allow_constant_weights,
                                     .score = both.score,
                                     .groups = both.groups,
                                     .selection_bias = both.selection_bias});
  const moxie::SwiGluExperts<Scalar> bank(1, c.dim, {.hidden_dim = c.shared_hidden}, {"shared_experts", false});
  moxie::Parameters<Scalar> shared(bank.layout());
  for (const moxie::TensorInfo& t : routed.layout().tensors()) {
    const bool is_bias = t.name == bias_name;
    routed.parameters()[t.name].eigen() =
        golden.matrix<Scalar>(is_bias ? "buffer/expert_bias" : "param/" + t.name, t.rows, t.cols);
  }
  for (const moxie::TensorInfo& t : bank.layout().tensors()) {
    shared[t.name].eigen() = golden.matrix<Scalar>("param/" + t.name, t.rows, t.cols);
  }
  auto routed_tape = routed.make_tape();
  routed.forward(in, y, routed_tape);
  golden.compare("intermediate/y_routed", values(y));
  moxie::Workspace workspace;
  const Index starts[]{0, tokens};
  y = unwritten<Scalar>(tokens, c.dim);
  bank.forward(shared, {starts, x}, y, nullptr, workspace);
  golden.compare("intermediate/y_shared", values(y));
}

}  // namespace golden

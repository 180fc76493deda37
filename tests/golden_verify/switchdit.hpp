// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/layer/timestep_moe.hpp>
#include <moxie/loss/diffusion_prior.hpp>

#include "golden_case.hpp"

namespace golden {

/// The indices of a tensor, each in [0, count). Marks it as used.
inline std::vector<Index> read_indices(GoldenCase& golden, const std::string& name, Index count) {
  const std::vector<std::int64_t> elements = golden.read<std::int64_t>(name);
  for (const std::int64_t i : elements) {
    if (i < 0 || i >= count) {
      throw GoldenError(moxie::tensor_named(name) + " has the index " + std::to_string(i) + ", expected less than " +
                        std::to_string(count));
    }
  }
  return {elements.begin(), elements.end()};
}

/// Family `switchdit_taskmoe`: the layer and its mask, without the transformer around it.
///
/// The reference routes the table of all timesteps and picks the batch's; it keeps the experts as [E,in,out], the transposes of
/// the layer's; and it returns 1 + y. The recorded gradient is that of ⟨1 + y, dy⟩ + ⟨probs, dprobs⟩.
template <class Scalar>
void verify_switchdit_taskmoe(GoldenCase& golden) {
  const Index batch = golden.integer("batch");
  const Index length = golden.integer("tokens");
  const Index dim = golden.integer("hidden_size");
  const Index experts = golden.integer("num_experts", 1, 4096);
  const Index top_k = golden.integer("top_k", 1, experts);
  const Index timesteps = golden.integer("taskcount");
  const Index tokens = batch * length;

  const std::vector<Index> like_x{batch, length, dim};
  for (const char* name : {"input/x", "input/dy", "output/y", "grad/x"}) {
    golden.require(name, like_x);
  }
  golden.allow("extra/x_times_mask", like_x);
  for (const std::string prefix : {"param/", "grad/param/"}) {
    golden.require(prefix + "experts.w", {experts, dim, dim});
    golden.require(prefix + "experts.b", {experts, dim});
    golden.require(prefix + "f_gate.1.weight", {experts, dim});
    golden.require(prefix + "f_gate.1.bias", {experts});
  }
  golden.require("input/task_full", {timesteps, dim});
  golden.require("grad/task_full", {timesteps, dim});
  golden.require("input/active_task", {batch});
  golden.require("input/dprobs", {batch, experts});
  golden.require("output/probs", {batch, experts});
  golden.require("output/probs_full_quantized", {timesteps, experts});
  golden.require("routing/expert_index", {batch, top_k});
  golden.require("routing/weight", {batch, top_k});
  golden.require("routing/expert_size", {experts});
  golden.require("loss/total", {});
  GoldenCase::limit({tokens, top_k, dim});

  moxie::TimestepMoE<Scalar> layer({.model_dim = dim, .condition_dim = dim, .experts = experts, .top_k = top_k});
  moxie::Parameters<Scalar>& p = layer.parameters();
  p["gate.weight"].eigen() = golden.matrix<Scalar>("param/f_gate.1.weight", experts, dim);
  p["gate.bias"].eigen() = golden.matrix<Scalar>("param/f_gate.1.bias", 1, experts);
  const auto name_of = [](Index expert, const char* tensor) { return "experts." + std::to_string(expert) + "." + tensor; };
  const Matrix<Scalar> w = golden.matrix<Scalar>("param/experts.w", experts * dim, dim);
  const Matrix<Scalar> b = golden.matrix<Scalar>("param/experts.b", experts, dim);
  for (Index e = 0; e < experts; ++e) {
    p[name_of(e, "weight")].eigen() = w.middleRows(e * dim, dim).transpose();
    p[name_of(e, "bias")].eigen() = b.row(e);
  }

  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", tokens, dim);
  const Matrix<Scalar> dy = golden.matrix<Scalar>("input/dy", tokens, dim);
  const Matrix<Scalar> table = golden.matrix<Scalar>("input/task_full", timesteps, dim);
  const Matrix<Scalar> dprobs = golden.matrix<Scalar>("input/dprobs", batch, experts);
  const std::vector<Index> timestep = read_indices(golden, "input/active_task", timesteps);
  Matrix<Scalar> condition(batch, dim);
  for (Index i = 0; i < batch; ++i) {
    condition.row(i) = table.row(timestep[std::size_t(i)]);
  }
  moxie::Tokens<Scalar> in(x, length);
  in.condition = condition;
  Matrix<Scalar> y = unwritten<Scalar>(tokens, dim);
  auto tape = layer.make_tape(tokens);
  layer.forward(in, y, tape);

  const Matrix<Scalar> mask = (y.array() + Scalar(1)).matrix();
  golden.compare("output/y", values(mask));
  if (golden.contains("extra/x_times_mask")) {
    Matrix<Scalar> r = unwritten<Scalar>(tokens, dim);
    moxie::timestep_mask<Scalar>(x, y, r);
    golden.compare("extra/x_times_mask", values(r));
  }
  const RowView<const Scalar> probs = tape.router().scores();
  golden.compare("output/probs", values(probs));
  const double of_probs = inner_product<Scalar>(probs.eigen(), dprobs);
  golden.compare_total("loss/total", mask, dy, of_probs);

  // What the first token of each sequence got.
  const auto& plan = tape.plan();
  std::vector<std::int64_t> index;
  std::vector<double> weight;
  std::vector<std::int64_t> size(std::size_t(experts), 0);
  for (Index i = 0; i < batch; ++i) {
    for (const Index r : plan.rows_of_token(i * length)) {
      Index e = 0;
      while (r >= plan.expert_starts()[std::size_t(e) + 1]) {
        ++e;
      }
      index.push_back(e);
      weight.push_back(double(plan.weight(r)));
      size[std::size_t(e)] += plan.weight(r) > 0 ? 1 : 0;  // the reference counts probabilities above 0
    }
  }
  golden.compare_choices("routing/expert_index", "routing/weight", experts, index, weight);
  golden.compare_exactly("routing/expert_size", size);

  // All timesteps: as many sequences without tokens.
  const std::vector<Index> starts(std::size_t(timesteps + 1), 0);
  const Matrix<Scalar> none(0, dim);
  Matrix<Scalar> no_output(0, dim);
  moxie::Tokens<Scalar> all(none, starts);
  all.condition = table;
  auto all_tape = layer.make_tape();
  layer.forward(all, no_output, all_tape);
  Matrix<std::uint8_t> chosen(timesteps, experts);
  moxie::mark_chosen_units(all_tape.router().choices(), experts, 0, chosen);
  golden.compare("output/probs_full_quantized", values(chosen));

  auto grads = layer.parameters().zeros_like();
  Matrix<Scalar> dx = unwritten<Scalar>(tokens, dim);
  Matrix<Scalar> dcondition = unwritten<Scalar>(batch, dim);
  Matrix<Scalar> dlogits = dprobs;
  moxie::softmax_rows_backward(tape.router().scores(), moxie::RowView<Scalar>(dlogits), {});
  layer.backward(in, {dy, dlogits}, {dx, dcondition}, grads, tape);
  Matrix<Scalar> dtable = Matrix<Scalar>::Zero(timesteps, dim);
  for (Index i = 0; i < batch; ++i) {
    dtable.row(timestep[std::size_t(i)]) += dcondition.row(i);
  }
  golden.compare("grad/x", values(dx));
  golden.compare("grad/task_full", values(dtable));
  golden.compare("grad/param/f_gate.1.weight", values(grads["gate.weight"]));
  golden.compare("grad/param/f_gate.1.bias", values(grads["gate.bias"]));
  Matrix<Scalar> dw(experts * dim, dim);
  Matrix<Scalar> db(experts, dim);
  for (Index e = 0; e < experts; ++e) {
    dw.middleRows(e * dim, dim) = grads[name_of(e, "weight")].eigen().transpose();
    db.row(e) = grads[name_of(e, "bias")].eigen();
  }
  golden.compare("grad/param/experts.w", values(dw));
  golden.compare("grad/param/experts.b", values(db));
}

/// The prior's mapping, compared with the recorded one.
inline Matrix<std::uint8_t> prior_mapping(GoldenCase& golden, Index timesteps, Index units, Index top_k, Index experts,
                                          double exponent) {
  golden.require("output/unit_mapping", {timesteps, units});
  const Matrix<std::uint8_t> mapping = moxie::unit_mapping(timesteps, units, double(top_k) / double(experts), exponent);
  golden.compare("output/unit_mapping", values(mapping));
  return mapping;
}

/// The mapping's rows at the timesteps of a batch.
inline void compare_active_mask(GoldenCase& golden, const Matrix<std::uint8_t>& mapping, const std::vector<Index>& timestep) {
  Matrix<std::uint8_t> active(Index(timestep.size()), mapping.cols());
  for (Index i = 0; i < active.rows(); ++i) {
    active.row(i) = mapping.row(timestep[std::size_t(i)]);
  }
  golden.require("output/active_mask", {active.rows(), active.cols()});
  golden.compare("output/active_mask", values(active));
}

/// Compares the costs of the recorded choices; returns the recorded matching.
///
/// Many matchings have the least cost, and the reference draws one: ours has to reach that cost. `rand_*_idx` are the
/// reference's permutations of gate and prior units, in which `prior_idx` is the matching.
inline std::vector<Index> compare_matching(GoldenCase& golden, const std::string& choices,
                                           const Matrix<std::uint8_t>& mapping) {
  const Index units = mapping.cols();
  golden.require(choices, {mapping.rows(), units});
  for (const char* name : {"routing/cost", "routing/cost_permuted"}) {
    golden.require(name, {units, units});
  }
  for (const char* name : {"routing/prior_for_gate", "routing/prior_idx", "routing/rand_gate_idx", "routing/rand_prior_idx"}) {
    golden.require(name, {units});
  }
  golden.require("routing/optimal_cost", {});
  GoldenCase::limit({units, units});
  const Matrix<double> quantized = golden.matrix<double>(choices, mapping.rows(), units);
  if (!(quantized.array() == 0 || quantized.array() == 1).all()) {
    throw GoldenError(choices + " is not 0 and 1");
  }
  const Matrix<std::uint8_t> chosen = quantized.cast<std::uint8_t>();
  const Matrix<double> cost = moxie::unit_costs(chosen, mapping);
  golden.compare("routing/cost", values(cost));
  golden.compare("routing/optimal_cost", {moxie::match_units(chosen, mapping).cost});

  const std::vector<Index> pair = read_indices(golden, "routing/prior_for_gate", units);
  const std::vector<Index> gate_order = read_indices(golden, "routing/rand_gate_idx", units);
  const std::vector<Index> prior_order = read_indices(golden, "routing/rand_prior_idx", units);
  Matrix<double> permuted(units, units);
  std::vector<std::int64_t> place(std::size_t(units), -1);  // of a prior unit in the reference's order
  std::vector<std::int64_t> pair_of_places(std::size_t(units), -1);
  double recorded = 0;
  for (Index i = 0; i < units; ++i) {
    place[std::size_t(prior_order[std::size_t(i)])] = i;
    recorded += cost(i, pair[std::size_t(i)]);
    for (Index j = 0; j < units; ++j) {
      permuted(i, j) = cost(gate_order[std::size_t(i)], prior_order[std::size_t(j)]);
    }
  }
  for (std::size_t i = 0; i < pair_of_places.size(); ++i) {
    pair_of_places[i] = place[std::size_t(pair[std::size_t(gate_order[i])])];
  }
  golden.compare("routing/cost_permuted", values(permuted));
  golden.compare_exactly("routing/prior_idx", pair_of_places);
  if (recorded != golden.read<double>("routing/optimal_cost").front()) {
    throw GoldenError("routing/prior_for_gate has another cost than routing/optimal_cost");
  }
  return pair;
}

/// Family `switchdit_prior`: the mapping, the matching and the loss, this one with the recorded matching.
template <class Scalar>
void verify_switchdit_prior(GoldenCase& golden) {
  const Index blocks = golden.integer("depth");
  const Index experts = golden.integer("num_experts", 1, 4096);
  const Index top_k = golden.integer("top_k", 1, experts);
  const Index timesteps = golden.integer("taskcount");
  const Index units = blocks * experts;
  if (golden.integer("units") != units) {
    throw GoldenError("metadata 'units' is not depth times num_experts");
  }
  const std::vector<Index>& shape = golden.shape("input/probs");
  const Index batch = shape.empty() ? 0 : shape.front();
  for (const char* name : {"input/probs", "output/active_mask", "grad/probs"}) {
    golden.require(name, {batch, units});
  }
  golden.require("input/active_task", {batch});
  golden.require("loss/jsd_per_sample", {batch});
  golden.require("loss/aux", {});
  GoldenCase::limit({timesteps, units});

  const Matrix<std::uint8_t> mapping = prior_mapping(golden, timesteps, units, top_k, experts, golden.number("alpha"));
  const std::vector<Index> timestep = read_indices(golden, "input/active_task", timesteps);
  compare_active_mask(golden, mapping, timestep);
  const std::vector<Index> pair = compare_matching(golden, "input/probs_full_quantized", mapping);

  const Matrix<Scalar> probs = golden.matrix<Scalar>("input/probs", batch, units);
  const moxie::DiffusionPrior prior{
      .blocks = blocks, .mapping = mapping, .prior_of_unit = pair, .epsilon = golden.number("epsilon")};
  golden.compare("loss/aux", {moxie::diffusion_prior_loss<Scalar>(probs, timestep, prior)});
  std::vector<double> each;
  for (Index i = 0; i < batch; ++i) {
    each.push_back(
        moxie::diffusion_prior_loss<Scalar>(probs.middleRows(i, 1), std::span(timestep).subspan(std::size_t(i), 1), prior));
  }
  golden.compare("loss/jsd_per_sample", each);
  Matrix<Scalar> dprobs = Matrix<Scalar>::Zero(batch, units);
  moxie::diffusion_prior_loss_backward<Scalar>(probs, timestep, prior, 1, dprobs);
  golden.compare("grad/probs", values(dprobs));
}

}  // namespace golden

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>

#include "vmoe_experts.hpp"

namespace golden {

/// What vmoe's metadata says of the capacity.
inline moxie::Capacity capacity_of(const GoldenCase& golden) {
  const std::string& rounding = golden.text("capacity_ceil_or_round");
  if (rounding != "ceil" && rounding != "round") {
    throw GoldenError("metadata 'capacity_ceil_or_round' is '" + moxie::printable(rounding) + "', expected ceil or round");
  }
  const std::string& multiple = golden.text("capacity_multiple_of");
  return {.factor = golden.number("capacity_factor"),
          .rounding = rounding == "ceil" ? moxie::Rounding::ceil : moxie::Rounding::round,
          .multiple_of = multiple == "None" ? 1 : std::max<Index>(golden.integer("capacity_multiple_of", 0), 1)};
}

inline void expect_capacity(const GoldenCase& golden, Index computed) {
  if (golden.integer("capacity") != computed) {
    throw GoldenError("metadata 'capacity' is " + golden.text("capacity") + ", but by the others it is " +
                      std::to_string(computed));
  }
}

/// Family `topk_capacity`: NoisyTopExpertsPerItemRouter of vmoe.
template <class Scalar, template <class> class On = OnCpu>
struct TopKCapacity {
  explicit TopKCapacity(const GoldenCase& golden)
      : groups(golden.integer("groups")),
        length(golden.integer("group_size")),
        experts{golden.integer("num_experts", 1, 4096), golden.integer("dim"), golden.integer("mlp_hidden")},
        top_k(golden.integer("top_k", 1, experts.experts)),
        capacity(capacity_of(golden)),
        noise(golden.number("noise_std")),
        weights{.gshard = golden.number("gshard_loss_weight"),
                .importance = golden.number("importance_loss_weight"),
                .load = golden.number("load_loss_weight")} {
    capacity.priority = golden.boolean("batch_priority") ? moxie::Priority::weight : moxie::Priority::order;
    expect_capacity(golden, moxie::expert_capacity(length * top_k, experts.experts, capacity));
  }

  Index tokens() const { return groups * length; }
  using Layer = On<moxie::TopKMoE<Scalar, moxie::GeluTanhExperts<Scalar>>>;

  Layer layer(const moxie::Balance& balance) const {
    return Layer({.model_dim = experts.dim,
                  .experts = experts.experts,
                  .top_k = top_k,
                  .expert = {.hidden_dim = experts.hidden},
                  .balance = balance,
                  .capacity = capacity,
                  .noise = {.logits = noise}});
  }

  void require(const GoldenCase& golden) const {
    const std::vector<Index> like_x{groups, length, experts.dim};
    const std::vector<Index> like_z{groups, length, experts.experts};
    const std::vector<Index> pairs{groups, length, top_k};
    for (const char* name : {"input/x", "input/dy", "output/y", "output/y_deterministic", "grad/x"}) {
      golden.require(name, like_x);
    }
    golden.require("input/noise", like_z);
    golden.require("routing/gates", like_z);
    for (const char* name : {"routing/buffer_index", "routing/dropped", "routing/expert_index", "routing/weight"}) {
      golden.require(name, pairs);
    }
    golden.require("routing/tokens_per_expert_before_capacity", {groups, experts.experts});
    for (const char* name : {"loss/aux", "loss/aux_deterministic", "loss/total"}) {
      golden.require(name, {});
    }
    golden.require("loss/aux_per_group", {groups});
    for (const std::string loss : {"gshard", "importance", "load"}) {
      golden.require("loss/" + loss + "_loss_per_group", {groups});
      golden.require("grad_" + loss + "_loss/x", like_x);
      golden.require("grad_" + loss + "_loss/param/Router.dense.kernel", {experts.dim, experts.experts});
    }
    golden.require("param/Router.dense.kernel", {experts.dim, experts.experts});
    golden.require("grad/param/Router.dense.kernel", {experts.dim, experts.experts});
    experts.require(golden);
    GoldenCase::limit({tokens(), top_k, experts.hidden});
  }

  Index groups;
  Index length;
  VmoeExperts<Scalar> experts;
  Index top_k;
  moxie::Capacity capacity;
  double noise;
  moxie::Balance weights;
};

template <class Scalar, template <class> class On = OnCpu>
void verify_topk_capacity(GoldenCase& golden) {
  const TopKCapacity<Scalar, On> c(golden);
  c.require(golden);
  const Index tokens = c.tokens();
  const Index experts = c.experts.experts;
  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", tokens, c.experts.dim);
  const Matrix<Scalar> dy = golden.matrix<Scalar>("input/dy", tokens, c.experts.dim);
  const Matrix<Scalar> noise = golden.matrix<Scalar>("input/noise", tokens, experts);
  const Matrix<Scalar> kernel = golden.matrix<Scalar>("param/Router.dense.kernel", c.experts.dim, experts);
  auto layer = c.layer(c.weights);
  c.experts.load(golden, layer.parameters());
  layer.parameters()["gate.weight"].eigen() = kernel.transpose();

  moxie::Tokens<Scalar> in(x, c.length);
  Matrix<Scalar> y = unwritten<Scalar>(tokens, c.experts.dim);
  auto tape = layer.make_tape(tokens);
  layer.forward(in, y, tape);
  golden.compare("output/y_deterministic", values(y));
  golden.compare("loss/aux_deterministic", {tape.balance_loss()});

  in.training = true;
  in.noise = noise;
  y = unwritten<Scalar>(tokens, c.experts.dim);
  layer.forward(in, y, tape);
  golden.compare("output/y", values(y));
  golden.compare("loss/aux", {tape.balance_loss()});
  golden.compare_total("loss/total", y, dy, tape.balance_loss());
  golden.compare("routing/gates", values(tape.router().scores()));
  const auto& places = tape.router().places();
  const auto& choices = tape.router().choices();
  std::vector<std::int64_t> dropped, counts(std::size_t(c.groups * experts));
  std::vector<double> weight;
  for (Index i = 0; i < tokens * c.top_k; ++i) {
    dropped.push_back(places[std::size_t(i)] >= golden.integer("capacity") ? 1 : 0);
    ++counts[std::size_t(i / (c.length * c.top_k) * experts + choices[std::size_t(i)])];
    weight.push_back(double(tape.router().scores()(i / c.top_k, choices[std::size_t(i)])));
  }
  // What the plan kept has to agree with the places.
  std::vector<std::int64_t> missing(dropped.size(), 1);
  for (Index r = 0; r < tape.plan().rows(); ++r) {
    missing[std::size_t(tape.plan().pair(r))] = 0;
    weight[std::size_t(tape.plan().pair(r))] = double(tape.plan().weight(r));
  }
  if (missing != dropped) {
    throw GoldenError("the plan has not dropped the pairs whose places are beyond the capacity");
  }
  golden.compare_exactly("routing/expert_index", {choices.begin(), choices.end()});
  golden.compare_exactly("routing/buffer_index", {places.begin(), places.end()});
  golden.compare_exactly("routing/dropped", dropped);
  golden.compare_exactly("routing/tokens_per_expert_before_capacity", counts);
  golden.compare("routing/weight", weight);

  auto grads = layer.parameters().zeros_like();
  Matrix<Scalar> dx = unwritten<Scalar>(tokens, c.experts.dim);
  layer.backward(in, dy, dx, grads, tape);
  golden.compare("grad/x", values(dx));
  golden.compare("grad/param/Router.dense.kernel", values<Scalar>(grads["gate.weight"].eigen().transpose()));
  c.experts.compare_gradients(golden, grads);

  // Each loss alone: its gradient over all groups, its value in each.
  const Matrix<Scalar> zero = Matrix<Scalar>::Zero(tokens, c.experts.dim);
  const auto alone = [&](const std::string& name, const moxie::Balance& balance) {
    auto one = c.layer(balance);
    one.parameters() = layer.parameters();
    auto one_tape = one.make_tape(tokens);
    one.forward(in, y, one_tape);
    grads.set_zero();
    dx = unwritten<Scalar>(tokens, c.experts.dim);
    one.backward(in, zero, dx, grads, one_tape);
    golden.compare("grad_" + name + "/x", values(dx));
    golden.compare("grad_" + name + "/param/Router.dense.kernel", values<Scalar>(grads["gate.weight"].eigen().transpose()));
  };
  alone("gshard_loss", {.gshard = 1});
  alone("importance_loss", {.importance = 1});
  alone("load_loss", {.load = 1});
  const auto per_group = [&](const std::string& name, const moxie::Balance& balance) {
    const auto one = c.layer(balance);
    std::vector<double> losses;
    for (Index g = 0; g < c.groups; ++g) {
      const Matrix<Scalar> part = x.middleRows(g * c.length, c.length);
      const Matrix<Scalar> noise_part = noise.middleRows(g * c.length, c.length);
      moxie::Tokens<Scalar> group(part);
      group.training = true;
      group.noise = noise_part;
      Matrix<Scalar> y_part(c.length, c.experts.dim);
      auto one_tape = one.make_tape();
      one.forward(layer.parameters(), group, y_part, one_tape, {});
      losses.push_back(one_tape.balance_loss());
    }
    golden.compare(name, losses);
  };
  per_group("loss/aux_per_group", c.weights);
  per_group("loss/gshard_loss_per_group", {.gshard = 1});
  per_group("loss/importance_loss_per_group", {.importance = 1});
  per_group("loss/load_loss_per_group", {.load = 1});
}

/// Family `expert_choice`: NoisyTopItemsPerExpertRouter of vmoe.
template <class Scalar, template <class> class On = OnCpu>
void verify_expert_choice(GoldenCase& golden) {
  const Index groups = golden.integer("groups");
  const Index length = golden.integer("group_size");
  const VmoeExperts<Scalar> bank{golden.integer("num_experts", 1, 4096), golden.integer("dim"), golden.integer("mlp_hidden")};
  const Index experts = bank.experts;
  const Index tokens = groups * length;
  On<moxie::ExpertChoiceMoE<Scalar, moxie::GeluTanhExperts<Scalar>>> layer({.model_dim = bank.dim,
                                                                            .experts = experts,
                                                                            .expert = {.hidden_dim = bank.hidden},
                                                                            .capacity = capacity_of(golden),
                                                                            .noise = {.logits = golden.number("noise_std")}});
  const Index capacity = layer.router().capacity(length);
  expect_capacity(golden, capacity);
  const std::vector<Index> like_x{groups, length, bank.dim};
  for (const char* name : {"input/x", "input/dy", "output/y", "grad/x"}) {
    golden.require(name, like_x);
  }
  golden.require("input/noise", {groups, length, experts});
  golden.require("routing/gates", {groups, length, experts});
  golden.require("routing/item_index", {groups, experts, capacity});
  golden.require("routing/weight", {groups, experts, capacity});
  golden.require("routing/experts_per_item", {groups, length});
  golden.require("loss/aux", {});
  golden.require("loss/total", {});
  golden.require("param/Router.dense.kernel", {bank.dim, experts});
  golden.require("grad/param/Router.dense.kernel", {bank.dim, experts});
  bank.require(golden);
  GoldenCase::limit({tokens, experts, bank.hidden});

  bank.load(golden, layer.parameters());
  layer.parameters()["gate.weight"].eigen() = golden.matrix<Scalar>("param/Router.dense.kernel", bank.dim, experts).transpose();
  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", tokens, bank.dim);
  const Matrix<Scalar> dy = golden.matrix<Scalar>("input/dy", tokens, bank.dim);
  const Matrix<Scalar> noise = golden.matrix<Scalar>("input/noise", tokens, experts);
  moxie::Tokens<Scalar> in(x, length);
  in.training = true;
  in.noise = noise;
  Matrix<Scalar> y = unwritten<Scalar>(tokens, bank.dim);
  auto tape = layer.make_tape(tokens);
  layer.forward(in, y, tape);

  std::vector<std::int64_t> items, per_item(static_cast<std::size_t>(tokens));
  std::vector<double> weight(std::size_t(groups * experts * capacity));
  for (const Index t : tape.router().choices()) {
    items.push_back(t % length);
    ++per_item[std::size_t(t)];
  }
  for (Index r = 0; r < tape.plan().rows(); ++r) {
    weight[std::size_t(tape.plan().pair(r))] = double(tape.plan().weight(r));
  }
  golden.compare_exactly("routing/item_index", items);
  golden.compare_exactly("routing/experts_per_item", per_item);
  golden.compare("routing/weight", weight);
  golden.compare("routing/gates", values(tape.router().scores()));
  golden.compare("output/y", values(y));
  golden.compare("loss/aux", {tape.balance_loss()});
  golden.compare_total("loss/total", y, dy, tape.balance_loss());

  auto grads = layer.parameters().zeros_like();
  Matrix<Scalar> dx = unwritten<Scalar>(tokens, bank.dim);
  layer.backward(in, dy, dx, grads, tape);
  golden.compare("grad/x", values(dx));
  golden.compare("grad/param/Router.dense.kernel", values<Scalar>(grads["gate.weight"].eigen().transpose()));
  bank.compare_gradients(golden, grads);
}

/// Family `routing_ties`: selection and places from gates with equal numbers.
template <class Scalar>
void verify_routing_ties(GoldenCase& golden) {
  const Index length = golden.integer("group_size");
  const Index experts = golden.integer("num_experts", 1, 4096);
  const Index top_k = golden.integer("top_k", 1, experts);
  const Index capacity = golden.integer("capacity");
  golden.require("input/gates", {length, experts});
  for (const std::string mode : {"_bp0", "_bp1"}) {
    for (const std::string name : {"output/buffer_index", "output/expert_index", "output/weight"}) {
      golden.require(name + mode, {length, top_k});
    }
  }
  golden.require("output/item_index", {experts, std::min(capacity, length)});
  const Matrix<Scalar> gates = golden.matrix<Scalar>("input/gates", length, experts);
  std::vector<Index> chosen(std::size_t(length * top_k));
  std::vector<Scalar> weight;
  for (Index t = 0; t < length; ++t) {
    moxie::select_top_k(gates.row(t).data(), experts, top_k, chosen.data() + t * top_k);
    for (Index j = 0; j < top_k; ++j) {
      weight.push_back(gates(t, chosen[std::size_t(t * top_k + j)]));
    }
  }
  // The factor that makes this capacity.
  moxie::Capacity c{.factor = double(capacity) * double(experts) / double(length * top_k), .rounding = moxie::Rounding::round};
  for (const bool priority : {false, true}) {
    const std::string mode = priority ? "_bp1" : "_bp0";
    c.priority = priority ? moxie::Priority::weight : moxie::Priority::order;
    moxie::Places places;
    moxie::assign_places<Scalar>(moxie::Sequences().over(length), {experts, top_k, chosen, weight}, c, places);
    golden.compare_exactly("output/buffer_index" + mode, {places.place.begin(), places.place.end()});
    golden.compare_exactly("output/expert_index" + mode, {chosen.begin(), chosen.end()});
    golden.compare("output/weight" + mode, {weight.begin(), weight.end()});
  }
  std::vector<std::int64_t> items;
  std::vector<Index> tokens(static_cast<std::size_t>(length));
  for (Index e = 0; e < experts; ++e) {
    const Index taken = std::min(capacity, length);
    moxie::partial_sort_top_k([&](Index t) { return gates(t, e); }, length, taken, tokens.data());
    items.insert(items.end(), tokens.begin(), tokens.begin() + taken);
  }
  golden.compare_exactly("output/item_index", items);
}

/// Family `capacity_table`: vmoe's compute_capacity; -1 where it refuses.
template <class Scalar>
void verify_capacity_table(GoldenCase& golden) {
  const Index rows = golden.shape("output/capacity").empty() ? 0 : golden.shape("output/capacity").front();
  for (const char* name : {"input/capacity_factor", "input/mode", "input/multiple_of", "input/num_experts", "input/num_tokens",
                           "output/capacity"}) {
    golden.require(name, {rows});
  }
  const auto factor = golden.read<double>("input/capacity_factor");
  const auto mode = golden.read<std::int64_t>("input/mode");
  const auto multiple = golden.read<std::int64_t>("input/multiple_of");
  const auto experts = golden.read<std::int64_t>("input/num_experts");
  const auto tokens = golden.read<std::int64_t>("input/num_tokens");
  std::vector<std::int64_t> capacity;
  for (std::size_t i = 0; i < factor.size(); ++i) {
    if (experts[i] < 1 || tokens[i] < 0 || multiple[i] < 0 || mode[i] < 0 || mode[i] > 1) {
      throw GoldenError("row " + std::to_string(i) + " of the table is no capacity");
    }
    try {
      capacity.push_back(moxie::expert_capacity(tokens[i], experts[i],
                                                {.factor = factor[i],
                                                 .rounding = mode[i] == 0 ? moxie::Rounding::ceil : moxie::Rounding::round,
                                                 .multiple_of = std::max<Index>(multiple[i], 1)}));
    } catch (const moxie::ValueError&) {
      capacity.push_back(-1);
    }
  }
  golden.compare_exactly("output/capacity", capacity);
}

}  // namespace golden

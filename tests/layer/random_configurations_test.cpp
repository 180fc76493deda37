// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstdlib>
#include <naive_layer.hpp>
#include <sstream>
#include <support.hpp>

/// 20,000 layers drawn at random, each compared with the naive one: outputs, losses, counts, and every gradient; and each again
/// with what a call may say (gate_x, chosen experts, a capacity factor, groups, scales) and with biases and limits of gated
/// units.
///
/// A failure prints its seed. `MOXIE_SEED=n moxie_tests --test-case='random configurations*'` runs that one again, or `n-m` all
/// from n to m - 1, which several processes may share; MOXIE_CONFIGURATIONS sets how many are drawn.
namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::Sequences;
using moxie::Tokens;
using moxie::test::Var;
namespace naive = moxie::test::naive;

/// Numbers of one configuration, one after the other.
struct Draw {
  moxie::Rng rng;
  std::uint64_t next = 0;

  Index below(Index n) { return rng.below(n, next++); }
  Index between(Index least, Index most) { return least + below(most - least + 1); }
  double uniform(double from, double to) { return from + (to - from) * rng.uniform(next++); }
  bool one_in(Index n) { return below(n) == 0; }
  std::uint64_t bits() { return rng.bits(next++); }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[below(Index(choices.size()))];
  }
};

/// What the batch holds, in all rows, and the Tokens that view it.
struct Data {
  Matrix<double> x, condition, noise, gate_x, weight;
  Matrix<Index> chosen;
  std::vector<Index> starts;
  std::vector<std::uint8_t> mask;
  std::vector<std::int64_t> ids;
  Tokens<double> in;
};

struct Sizes {
  Index dim, experts, hidden, condition_dim;
};

/// Options of gated linear units.
struct Gating {
  enum class Kind { plain, clamped, clamped_after, soft_capped };
  Kind kind = Kind::plain;
  bool bias = false;
  double limit = 0, alpha = 1, beta = 0;
};
Gating draw_gating(Draw& draw) {
  using enum Gating::Kind;
  return {.kind = draw.of({plain, clamped, clamped_after, soft_capped}),
          .bias = draw.one_in(2),
          .limit = draw.of({0.2, 1.0, 100.0}),
          .alpha = draw.of({1.0, 1.702}),
          .beta = draw.of({0.0, 1.0})};
}

std::vector<Index> draw_lengths(Draw& draw) {
  if (draw.one_in(40)) {
    return draw.one_in(2) ? std::vector<Index>{} : std::vector<Index>{0, 0};
  }
  const bool equal = draw.one_in(2);
  std::vector<Index> lengths(std::size_t(draw.between(1, 3)), draw.between(1, 5));
  for (Index& n : lengths) {
    n = equal ? n : draw.between(0, 5);
  }
  return lengths;
}

void draw_data(Draw& draw, const Sizes& sizes, const std::vector<Index>& lengths, bool masks, Data& data) {
  data.starts = {0};
  for (const Index n : lengths) {
    data.starts.push_back(data.starts.back() + n);
  }
  const Index tokens = data.starts.back();
  data.x = moxie::test::random<double>(tokens, sizes.dim, draw.bits());
  if (draw.one_in(10) && tokens > 0) {
    data.x.rowwise() = Eigen::RowVectorXd(data.x.row(0));  // all tokens are one: every choice a tie
  }
  data.condition = moxie::test::random<double>(Index(lengths.size()), sizes.condition_dim, draw.bits());
  for (Index t = 0; t < tokens; ++t) {
    data.ids.push_back(std::int64_t(draw.bits() % 50) - 25);
  }
  const bool equal = std::adjacent_find(lengths.begin(), lengths.end(), std::not_equal_to<>()) == lengths.end();
  const Index length = equal && !lengths.empty() ? lengths[0] : 0;
  data.in = length > 0 && draw.one_in(2) ? Tokens<double>(data.x, length) : Tokens<double>(data.x, data.starts);
  if (masks && !draw.one_in(3)) {
    const Index kept_in_ten = draw.of<Index>({0, 5, 8, 10});
    for (Index t = 0; t < tokens; ++t) {
      data.mask.push_back(draw.below(10) < kept_in_ten ? 1 : 0);
      if (data.mask.back() == 0) {
        data.x.row(t).setConstant(std::numeric_limits<double>::quiet_NaN());
      }
    }
    data.in.mask = data.mask;
  }
  data.in.condition = data.condition;
  data.in.ids = data.ids;
  data.in.training = draw.one_in(2);
  data.in.rng = moxie::Rng(draw.bits());
  if (draw.one_in(2)) {
    data.noise = moxie::test::random<double>(tokens, sizes.experts, draw.bits());
    data.in.noise = data.noise;
  }
}

/// The rows that are not masked, as variables. `rows` says where they come from.
naive::Batch batch_of(const Data& data, std::vector<Index>& rows) {
  naive::Batch batch;
  const auto variables = [](const auto& row) {
    naive::Row out;
    for (Index i = 0; i < row.size(); ++i) {
      out.push_back(Var::variable(row(i)));
    }
    return out;
  };
  for (std::size_t b = 0; b + 1 < data.starts.size(); ++b) {
    batch.sequences.emplace_back();
    batch.condition.push_back(variables(data.condition.row(Index(b))));
    for (Index t = data.starts[b]; t < data.starts[b + 1]; ++t) {
      if (data.mask.empty() || data.mask[std::size_t(t)] != 0) {
        batch.sequences.back().push_back(batch.tokens());
        batch.x.push_back(variables(data.x.row(t)));
        batch.ids.push_back(data.ids[std::size_t(t)]);
        if (data.noise.size() > 0) {
          batch.noise.push_back(variables(data.noise.row(t)));
        }
        if (data.in.has_gate_x()) {
          batch.gate_x.push_back(variables(data.gate_x.row(t)));
        }
        if (data.in.has_weight()) {
          batch.weight.push_back(variables(data.weight.row(t)));
        }
        if (data.in.has_chosen()) {
          batch.chosen.emplace_back(data.chosen.row(t).begin(), data.chosen.row(t).end());
        }
        rows.push_back(t);
      }
    }
  }
  batch.training = data.in.training;
  batch.rng = *data.in.rng;
  batch.top_k = data.in.top_k;
  batch.first = data.in.first;
  batch.capacity_factor = data.in.capacity_factor;
  return batch;
}

/// Collects the worst difference of tensors, relative to the largest number of each (or a millionth of the largest of all).
/// Where terms cancel, so that a gradient is nearly 0, what rounding leaves of its terms is no difference.
struct Comparison {
  struct Tensor {
    std::string name;
    double difference, largest;
    double terms = 0;  // the largest sum of absolute values of the terms of a number
  };
  std::vector<Tensor> tensors;

  template <class Expected>
  void add(const std::string& name, const Matrix<double>& found, Expected&& expected, double terms = 0) {
    Tensor tensor{name, 0, 0, terms};
    for (Index i = 0; i < found.rows(); ++i) {
      for (Index j = 0; j < found.cols(); ++j) {
        const double e = expected(i, j);
        const double d = std::abs(found(i, j) - e);
        tensor.difference = d <= tensor.difference ? tensor.difference : d;  // NaN is the worst
        tensor.largest = std::max(tensor.largest, std::abs(e));
        if (std::isnan(d)) {
          tensors.push_back({name, d, 1});
          return;
        }
      }
    }
    tensors.push_back(tensor);
  }
  static constexpr double rounding = std::numeric_limits<double>::epsilon();

  /// What is wrong, or nothing.
  std::string worst(double tolerance) const {
    double scale = 1e-6;
    for (const Tensor& t : tensors) {
      scale = std::max(scale, 1e-6 * t.largest);
    }
    std::string text;
    for (const Tensor& t : tensors) {
      const double error = t.difference / std::max(t.largest, scale);
      if (!(error <= tolerance || t.difference <= rounding * t.terms)) {
        std::ostringstream number;
        number << t.name << ": relative error " << error << "; ";
        text += number.str();
      }
    }
    return text;
  }
};

/// What differs between the layer and the naive one; nothing if they agree.
template <class Router, class Bank>
std::string difference(Draw& draw, const typename Router::Config& config, const typename Bank::Config& expert,
                       const naive::ExpertFunction& f, bool shared, const Sizes& sizes, const Data& data) {
  std::optional<Bank> shared_bank;
  if (shared) {
    shared_bank.emplace(1, sizes.dim, expert, moxie::BankNames{"shared_experts", false});
  }
  moxie::Moe<Router, Bank> layer(Router(config), Bank(sizes.experts, sizes.dim, expert), shared_bank);
  moxie::test::randomize(layer.parameters(), draw.bits());
  if (draw.one_in(15) && layer.layout().find("gate.weight") >= 0) {
    layer.parameters()["gate.weight"].eigen().setZero();  // all logits are equal
  }

  Var::restart();
  std::vector<Index> rows;
  const naive::Batch batch = batch_of(data, rows);
  naive::Weights weights;
  moxie::zip(
      [&](const moxie::TensorInfo& info, moxie::RowView<double> w) {
        naive::Rows& tensor = weights.tensors[info.name];
        for (Index i = 0; i < w.rows(); ++i) {
          tensor.emplace_back();
          for (Index j = 0; j < w.cols(); ++j) {
            tensor.back().push_back(Var::variable(w(i, j)));
          }
        }
      },
      layer.parameters());
  const naive::Output expected = naive::layer(config, f, shared, weights, batch);

  const Index tokens = data.x.rows();
  const moxie::Exec exec{.threads = int(draw.between(1, 2))};
  Matrix<double> dy = moxie::test::random<double>(tokens, sizes.dim, draw.bits());
  Matrix<double> y = moxie::test::untouched<double>(tokens, sizes.dim);
  Matrix<double> dx = y;
  Matrix<double> dcondition = moxie::test::untouched<double>(data.condition.rows(), data.condition.cols());
  Matrix<double> dgate_x = moxie::test::untouched<double>(data.gate_x.rows(), data.gate_x.cols());
  Matrix<double> dweight = moxie::test::untouched<double>(data.weight.rows(), data.weight.cols());
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape();
  layer.forward(data.in, y, tape, exec);
  moxie::TokensGradient<double> din(dx, dcondition);
  din.gate_x = dgate_x;
  din.weight = dweight;
  layer.backward(data.in, dy, din, grads, tape, exec);

  Var total = expected.loss;
  for (std::size_t t = 0; t < rows.size(); ++t) {
    for (Index d = 0; d < sizes.dim; ++d) {
      total += expected.y[t][std::size_t(d)] * dy(rows[t], d);
    }
  }
  const std::vector<double> gradients = total.gradients();
  const std::vector<double> magnitudes = total.magnitudes();
  const auto terms_of = [&](const naive::Rows& rows_of_tensor) {
    double most = 0;
    for (const naive::Row& row : rows_of_tensor) {
      for (const Var& v : row) {
        most = std::max(most, v.of(magnitudes));
      }
    }
    return most;
  };
  std::vector<Index> place(std::size_t(tokens), -1);
  for (std::size_t t = 0; t < rows.size(); ++t) {
    place[std::size_t(rows[t])] = Index(t);
  }
  const auto by_row = [&](auto&& value) {
    return [&place, value](Index t, Index d) {
      const Index i = place[std::size_t(t)];
      return i < 0 ? 0.0 : value(std::size_t(i), std::size_t(d));
    };
  };
  Comparison comparison;
  comparison.add("y", y, by_row([&](std::size_t t, std::size_t d) { return expected.y[t][d].value(); }));
  comparison.add("dx", dx, by_row([&](std::size_t t, std::size_t d) { return batch.x[t][d].of(gradients); }),
                 terms_of(batch.x));
  comparison.add("dgate_x", dgate_x, by_row([&](std::size_t t, std::size_t d) { return batch.gate_x[t][d].of(gradients); }),
                 terms_of(batch.gate_x));
  comparison.add("dweight", dweight, by_row([&](std::size_t t, std::size_t k) { return batch.weight[t][k].of(gradients); }),
                 terms_of(batch.weight));
  comparison.add(
      "dcondition", dcondition, [&](Index b, Index c) { return batch.condition[std::size_t(b)][std::size_t(c)].of(gradients); },
      terms_of(batch.condition));
  comparison.add("loss", Matrix<double>::Constant(1, 1, tape.balance_loss()),
                 [&](Index, Index) { return expected.loss.value(); });
  moxie::zip(
      [&](const moxie::TensorInfo& info, moxie::RowView<double> g) {
        const naive::Rows& w = weights[info.name];
        comparison.add(
            info.name, g.eigen(), [&](Index i, Index j) { return w[std::size_t(i)][std::size_t(j)].of(gradients); },
            terms_of(w));
      },
      grads);
  std::string text = comparison.worst(1e-9);
  if (tape.plan().rows() != expected.rows) {
    text += std::to_string(tape.plan().rows()) + " rows, expected " + std::to_string(expected.rows) + "; ";
  }
  if constexpr (requires { tape.plan().dropped(); }) {
    if (tape.plan().dropped() != expected.dropped) {
      text += std::to_string(tape.plan().dropped()) + " dropped, expected " + std::to_string(expected.dropped) + "; ";
    }
  }
  return text;
}

Var at_most(const Var& v, double limit) { return v.value() > limit ? Var(limit) : v; }
Var within(const Var& v, double limit) { return v.value() < -limit ? Var(-limit) : at_most(v, limit); }

/// Other units than act(g) u with one router only: they know nothing of routers.
template <class Router>
std::string with_gated_units(Draw& draw, const typename Router::Config& config, bool shared, const Sizes& sizes,
                             const Data& data, const Gating& gating) {
  if constexpr (std::is_same_v<Router, moxie::TopKRouter<double>>) {
    const double limit = gating.limit;
    switch (gating.kind) {
      case Gating::Kind::clamped:
        return difference<Router, moxie::ClampedSwiGluExperts<double>>(
            draw, config, {sizes.hidden, gating.bias, {.limit = limit, .alpha = gating.alpha, .beta = gating.beta}},
            naive::glu([gating](const Var& g, const Var& u) {
              const Var most = at_most(g, gating.limit);
              return (within(u, gating.limit) + gating.beta) * most * naive::sigmoid(gating.alpha * most);
            }),
            shared, sizes, data);
      case Gating::Kind::clamped_after:
        return difference<Router, moxie::SwiGluClampedAfterExperts<double>>(
            draw, config, {sizes.hidden, gating.bias, {.limit = limit}},
            naive::glu([limit](const Var& g, const Var& u) { return at_most(naive::silu(g), limit) * within(u, limit); }),
            shared, sizes, data);
      case Gating::Kind::soft_capped:
        return difference<Router, moxie::SoftCappedSwiGluExperts<double>>(
            draw, config, {sizes.hidden, gating.bias, {.gate_cap = limit, .up_cap = 2 * limit}},
            naive::glu([limit](const Var& g, const Var& u) {
              return limit * tanh(g / limit) * naive::sigmoid(g) * (2 * limit * tanh(u / (2 * limit)));
            }),
            shared, sizes, data);
      case Gating::Kind::plain:
        break;
    }
  }
  return difference<Router, moxie::SwiGluExperts<double>>(
      draw, config, {sizes.hidden, gating.bias}, naive::glu([](const Var& g, const Var& u) { return naive::silu(g) * u; }),
      shared, sizes, data);
}

template <class Router>
std::string with_any_experts(Draw& draw, const typename Router::Config& config, bool shared, const Sizes& sizes,
                             const Data& data, const Gating& gating) {
  switch (draw.below(4)) {
    case 0:
      return with_gated_units<Router>(draw, config, shared, sizes, data, gating);
    case 1:
      return difference<Router, moxie::GeluTanhExperts<double>>(draw, config, {sizes.hidden}, naive::mlp(naive::gelu_tanh),
                                                                shared, sizes, data);
    case 2:
      return difference<Router, moxie::GeluErfExperts<double>>(draw, config, {sizes.hidden}, naive::mlp(naive::gelu_erf),
                                                               shared, sizes, data);
    default:
      return difference<Router, moxie::LinearExperts<double>>(draw, config, {}, naive::affine, shared, sizes, data);
  }
}

moxie::Capacity draw_capacity(Draw& draw) {
  return {.factor = draw.of({0.3, 0.5, 1.0, 1.25, 2.0, 8.0}),
          .rounding = draw.of({moxie::Rounding::ceil, moxie::Rounding::round}),
          .multiple_of = draw.of<Index>({1, 1, 2, 4}),
          .priority = draw.of({moxie::Priority::order, moxie::Priority::weight})};
}

moxie::GateNoise draw_noise(Draw& draw) { return {.logits = draw.of({0.0, 0.0, 1.0}), .jitter = draw.of({0.0, 0.0, 0.2})}; }

moxie::TopKRouterConfig draw_top_k(Draw& draw, const Sizes& sizes) {
  moxie::TopKRouterConfig c{.model_dim = sizes.dim, .experts = sizes.experts};
  c.score = draw.of({moxie::Score::softmax, moxie::Score::softmax, moxie::Score::sigmoid});
  c.order =
      c.score == moxie::Score::softmax && draw.one_in(3) ? moxie::TopKOrder::top_k_softmax : moxie::TopKOrder::softmax_top_k;
  c.normalize = draw.one_in(2);
  c.scale = draw.of({1.0, 2.5});
  c.allow_constant_weights = true;
  c.selection_bias = draw.one_in(3);
  Index reachable = sizes.experts;
  if (draw.one_in(3)) {
    do {
      c.groups.count = draw.between(1, sizes.experts);
    } while (sizes.experts % c.groups.count != 0);
    c.groups.chosen = draw.between(1, c.groups.count);
    c.groups.score = draw.of({moxie::GroupScore::top_2_sum, moxie::GroupScore::largest});
    reachable = sizes.experts / c.groups.count * c.groups.chosen;
  }
  c.top_k = draw.between(1, std::min<Index>(reachable, 4));
  if (draw.one_in(3)) {
    c.capacity = draw_capacity(draw);
  }
  c.noise = draw_noise(draw);
  const auto weight = [&] { return draw.one_in(3) ? draw.uniform(0, 1) : 0.0; };
  c.balance = {.expert_level = weight(),
               .sequence_level = weight(),
               .device_level = weight(),
               .gshard = weight(),
               .importance = weight(),
               .load = weight(),
               .z = weight(),
               .mean_entropy = weight(),
               .token_entropy = weight(),
               .devices = 1,
               .count_chosen = draw.one_in(2)};
  c.balance.load *= c.noise.logits > 0 ? 1 : 0;  // a loss of the noise, refused without any
  do {
    c.balance.devices = draw.between(1, sizes.experts);
  } while (sizes.experts % c.balance.devices != 0);
  return c;
}

/// Whether a group would get a capacity below 1, which has to be refused.
bool refused(moxie::Capacity capacity, Index experts, Index k, const Data& data) {
  capacity.factor = data.in.capacity_factor != 0 ? data.in.capacity_factor : capacity.factor;
  if (capacity.factor == 0 || std::isinf(capacity.factor)) {
    return false;
  }
  std::vector<Index> sizes(1, 0);
  for (std::size_t b = 0; b + 1 < data.starts.size(); ++b) {
    for (Index t = data.starts[b]; t < data.starts[b + 1]; ++t) {
      sizes.back() += data.mask.empty() || data.mask[std::size_t(t)] != 0 ? 1 : 0;
    }
    if (capacity.group == moxie::Grouping::sequence) {
      sizes.push_back(0);
    }
  }
  return std::any_of(sizes.begin(), sizes.end(), [&](Index n) { return n > 0 && naive::room(n * k, experts, capacity) < 1; });
}

/// Options of a call and of the later routers, drawn from a stream of their own.
struct Extension {
  bool on = false;
  Draw draw;

  bool one_in(Index n) { return on && draw.one_in(n); }
  double scale() { return one_in(2) ? draw.of({-0.5, 3.0}) : 1.0; }
  moxie::Grouping grouping() { return one_in(2) ? moxie::Grouping::call : moxie::Grouping::sequence; }
  Index gate_dim() { return one_in(2) ? draw.between(1, 4) : 0; }
  void capacity_factor(Data& data) {
    if (one_in(3)) {
      data.in.capacity_factor = draw.of({0.5, 1.5, std::numeric_limits<double>::infinity()});
    }
  }
  /// Rows that a masked token has are not numbers.
  void gate_x(Data& data, Index dim) {
    data.in.first = one_in(2) ? draw.below(1000) : 0;
    if (dim > 0) {
      data.gate_x = moxie::test::random<double>(data.x.rows(), dim, draw.bits());
      for (Index t = 0; t < Index(data.mask.size()); ++t) {
        if (data.mask[std::size_t(t)] == 0) {
          data.gate_x.row(t).setConstant(std::numeric_limits<double>::quiet_NaN());
        }
      }
      data.in.gate_x = data.gate_x;
    }
  }
  /// K different experts of each token, some of them none.
  void chosen(Data& data, Index experts, Index k) {
    data.chosen.resize(data.x.rows(), k);
    for (Index t = 0; t < data.x.rows(); ++t) {
      const Index first = draw.below(experts);
      for (Index j = 0; j < k; ++j) {
        data.chosen(t, j) = draw.one_in(4) ? -1 : (first + j) % experts;
      }
    }
    data.in.chosen = data.chosen;
  }
};

std::string run(std::uint64_t seed, bool extended = false) {
  Draw draw{moxie::Rng(seed)};
  Extension extension{extended, Draw{moxie::Rng(seed).split(1)}};
  const Sizes sizes{draw.between(1, 5), draw.of<Index>({1, 2, 3, 4, 5, 6, 8}), draw.between(1, 5), draw.between(1, 4)};
  const bool shared = draw.one_in(3);
  Draw gating_draw{moxie::Rng(seed).split(2)};
  const Gating gating = extended ? draw_gating(gating_draw) : Gating();
  Data data;
  const Index drawn = draw.below(8);
  const Index kind = extension.one_in(9) ? 8 : drawn;
  std::string text;
  bool expect_refusal = false;
  try {
    if (kind <= 2) {
      moxie::TopKRouterConfig config = draw_top_k(draw, sizes);
      config.capacity.group = extension.grouping();
      config.gate_dim = extension.gate_dim();
      draw_data(draw, sizes, draw_lengths(draw), true, data);
      extension.capacity_factor(data);
      extension.gate_x(data, config.gate_dim);
      if (extension.one_in(2)) {
        extension.chosen(data, sizes.experts, extension.draw.between(1, std::min<Index>(sizes.experts, 4)));
      }
      if (draw.one_in(5) && !data.in.has_chosen()) {
        data.in.top_k = draw.between(1, config.top_k);
      }
      const Index k = data.in.has_chosen() ? data.in.chosen.cols() : data.in.top_k > 0 ? data.in.top_k : config.top_k;
      expect_refusal = refused(config.capacity, sizes.experts, k, data);
      text = with_any_experts<moxie::TopKRouter<double>>(draw, config, shared, sizes, data, gating);
    } else if (kind == 3) {
      moxie::ExpertChoiceRouterConfig config{
          .model_dim = sizes.dim, .experts = sizes.experts, .capacity = draw_capacity(draw), .noise = draw_noise(draw)};
      config.capacity.priority = moxie::Priority::order;
      config.capacity.group = extension.grouping();
      config.scale = extension.scale();
      config.gate_dim = extension.gate_dim();
      draw_data(draw, sizes, draw_lengths(draw), true, data);
      extension.capacity_factor(data);
      extension.gate_x(data, config.gate_dim);
      expect_refusal = refused(config.capacity, sizes.experts, 1, data);
      text = with_any_experts<moxie::ExpertChoiceRouter<double>>(draw, config, shared, sizes, data, gating);
    } else if (kind == 4) {
      draw_data(draw, sizes, draw_lengths(draw), true, data);
      const moxie::HashRouterConfig config{.experts = sizes.experts, .seed = draw.bits(), .scale = extension.scale()};
      text = with_any_experts<moxie::HashRouter<double>>(draw, config, shared, sizes, data, gating);
    } else if (kind == 5) {
      draw_data(draw, sizes, draw_lengths(draw), true, data);
      const Index k = draw.between(1, sizes.experts);
      text = with_any_experts<moxie::TimestepRouter<double>>(
          draw, {.condition_dim = sizes.condition_dim, .experts = sizes.experts, .top_k = k, .scale = extension.scale()},
          shared, sizes, data, gating);
    } else if (kind == 6) {
      draw_data(draw, sizes, draw_lengths(draw), true, data);
      const bool of_tokens = draw.one_in(2);
      const Index k = draw.between(1, sizes.experts);
      text = with_any_experts<moxie::ClusterRouter<double>>(draw,
                                                            {.feature_dim = of_tokens ? sizes.dim : sizes.condition_dim,
                                                             .experts = sizes.experts,
                                                             .top_k = k,
                                                             .temperature = draw.uniform(0.5, 3),
                                                             .of_tokens = of_tokens,
                                                             .scale = extension.scale()},
                                                            shared, sizes, data, gating);
    } else if (kind == 8) {
      draw_data(draw, sizes, draw_lengths(draw), true, data);
      const Index k = extension.draw.between(1, std::min<Index>(sizes.experts, 4));
      extension.chosen(data, sizes.experts, k);
      data.weight = moxie::test::random<double>(data.x.rows(), k, extension.draw.bits());
      data.in.weight = data.weight;
      text = with_any_experts<moxie::GivenRouter<double>>(draw, {.experts = sizes.experts}, shared, sizes, data, gating);
    } else {
      moxie::SoftRouterConfig config{
          .model_dim = sizes.dim,
          .experts = sizes.experts,
          .slots_per_expert = draw.between(1, 2),
          .normalize = draw.one_in(2),
          .dispatch =
              draw.of({moxie::Mixing::learned, moxie::Mixing::learned, moxie::Mixing::uniform, moxie::Mixing::identity}),
          .combine =
              draw.of({moxie::Mixing::learned, moxie::Mixing::learned, moxie::Mixing::uniform, moxie::Mixing::identity})};
      const bool identity = config.dispatch == moxie::Mixing::identity || config.combine == moxie::Mixing::identity;
      const std::vector<Index> as_slots(std::size_t(draw.between(1, 2)), config.experts * config.slots_per_expert);
      draw_data(draw, sizes, identity ? as_slots : draw_lengths(draw), !identity, data);
      config.scale = extension.scale();
      if (config.learned()) {
        config.gate_dim = extension.gate_dim();
        extension.gate_x(data, config.gate_dim);
      }
      text = with_any_experts<moxie::SoftRouter<double>>(draw, config, false, sizes, data, gating);
    }
  } catch (const std::exception& error) {
    return expect_refusal ? "" : std::string("threw: ") + error.what();
  }
  return expect_refusal ? "a capacity of 0 was not refused" : text;
}

/// [first, last) of `n` or `n-m`, else of how many.
std::pair<std::uint64_t, std::uint64_t> seeds(const char* range, const char* count) {
  if (range == nullptr) {
    return {0, count != nullptr ? std::strtoull(count, nullptr, 10) : 20000};
  }
  char* end = nullptr;
  const std::uint64_t first = std::strtoull(range, &end, 10);
  return {first, *end == '-' ? std::strtoull(end + 1, nullptr, 10) : first + 1};
}

TEST_CASE("random configurations: a range of seeds can be chosen") {
  using Range = std::pair<std::uint64_t, std::uint64_t>;
  CHECK(seeds(nullptr, nullptr) == Range(0, 20000));
  CHECK(seeds(nullptr, "7") == Range(0, 7));
  CHECK(seeds("22036", "7") == Range(22036, 22037));
  CHECK(seeds("20000-100000", nullptr) == Range(20000, 100000));
}

TEST_CASE("random configurations: seeds that have found faults, of the reference too") {
  for (const std::uint64_t seed : {22036U, 129221U, 226545U, 258157U, 725064U}) {
    CAPTURE(seed);
    CHECK(run(seed) == "");
  }
}

TEST_CASE("random configurations: layer and backward are those of the naive one") {
  const auto [first, last] = seeds(std::getenv("MOXIE_SEED"), std::getenv("MOXIE_CONFIGURATIONS"));
  int failures = 0;
  for (std::uint64_t seed = first; seed < last && failures < 5; ++seed) {
    for (const bool extended : {false, true}) {
      const std::string text = run(seed, extended);
      if (!text.empty()) {
        ++failures;
        FAIL_CHECK("MOXIE_SEED=" << seed << (extended ? " with options of a call: " : ": ") << text);
      }
    }
  }
  CHECK(failures == 0);
}

}  // namespace

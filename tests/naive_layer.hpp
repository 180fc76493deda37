// SPDX-License-Identifier: MIT
#pragma once

#include <functional>
#include <map>
#include <moxie/expert/linear.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/routing/cluster.hpp>
#include <moxie/routing/expert_choice.hpp>
#include <moxie/routing/given.hpp>
#include <moxie/routing/hash.hpp>
#include <moxie/routing/timestep.hpp>
#include <numeric>
#include <reverse_mode.hpp>
#include <string>

/// Every router, loss and expert as the papers print it: one token, one expert, one number at a time, in double, for reading.
/// There is no backward: `Var` records what is computed. Nothing here is shared with the library but options, names and random
/// numbers.
namespace moxie::test::naive {

using Row = std::vector<Var>;
using Rows = std::vector<Row>;

/// Named tensors, as rows.
struct Weights {
  std::map<std::string, Rows> tensors;

  const Rows& operator[](const std::string& name) const { return tensors.at(name); }
  bool has(const std::string& name) const { return tensors.count(name) != 0; }
};

/// A batch without masked tokens: rows, and the tokens of every sequence.
struct Batch {
  Rows x;
  Rows condition;
  std::vector<std::int64_t> ids;
  std::vector<std::vector<Index>> sequences;
  bool training = false;
  Rng rng{0};
  Rows noise, gate_x, weight;
  std::vector<std::vector<Index>> chosen;
  std::int64_t first = 0;
  Index top_k = 0;
  double capacity_factor = 0;

  Index tokens() const { return Index(x.size()); }
};

inline Var dot(const Row& a, const Row& b) {
  Var sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}
inline Row softmax(const Row& z) {
  double largest = z[0].value();
  for (const Var& v : z) {
    largest = std::max(largest, v.value());
  }
  Row out;
  Var sum = 0;
  for (const Var& v : z) {
    out.push_back(exp(v - largest));
    sum += out.back();
  }
  for (Var& v : out) {
    v = v / sum;
  }
  return out;
}
inline Var sigmoid(const Var& v) { return 1.0 / (1.0 + exp(-v)); }
inline Var silu(const Var& v) { return v * sigmoid(v); }
inline Var gelu_erf(const Var& v) { return 0.5 * v * (1.0 + erf(v / std::sqrt(2.0))); }
inline Var gelu_tanh(const Var& v) {
  return 0.5 * v * (1.0 + tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
}

/// Indices 0 ... n-1 by decreasing value, ties to the lower.
inline std::vector<Index> by_value(Index n, const std::function<double(Index)>& value) {
  std::vector<Index> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return value(a) > value(b); });
  return order;
}
inline std::vector<Index> largest(const Row& row, Index k) {
  auto order = by_value(Index(row.size()), [&](Index i) { return row[std::size_t(i)].value(); });
  order.resize(std::size_t(k));
  return order;
}

/// What a sparse router says: token `token` to expert `expert` with this weight.
struct Assignment {
  Index token, expert;
  Var weight;
};
struct Routing {
  std::vector<Assignment> assignments;
  Index dropped = 0;
  Var loss = 0;
};

inline Rows gate_logits(const Rows& gate, const Batch& in, const GateNoise& noise) {
  Rows z;
  for (std::size_t t = 0; t < in.x.size(); ++t) {
    Row x = in.gate_x.empty() ? in.x[t] : in.gate_x[t];
    for (std::size_t d = 0; in.training && noise.jitter > 0 && d < x.size(); ++d) {
      x[d] = x[d] * (1 + noise.jitter * (2 * in.rng.split(0).uniform((std::size_t(in.first) + t) * x.size() + d) - 1));
    }
    z.emplace_back();
    for (const Row& w : gate) {
      z.back().push_back(dot(x, w));
    }
  }
  return z;
}
inline Rows with_noise(Rows z, const Batch& in, const GateNoise& noise) {
  for (std::size_t t = 0; in.training && noise.logits > 0 && t < z.size(); ++t) {
    const std::size_t experts = z[t].size();
    for (std::size_t e = 0; e < experts; ++e) {
      const Var n = in.noise.empty() ? Var(in.rng.split(1).normal((std::size_t(in.first) + t) * experts + e)) : in.noise[t][e];
      z[t][e] = z[t][e] + noise.logits / double(experts) * n;
    }
  }
  return z;
}

inline Var squared_variation(const Row& v) {
  const double n = double(v.size());
  Var mean = 0, variance = 0;
  for (const Var& x : v) {
    mean += x / n;
  }
  if (mean.value() == 0) {
    return 0;
  }
  for (const Var& x : v) {
    variance += (x - mean) * (x - mean) / n;
  }
  return variance / (mean * mean);
}

/// All balance losses of a batch. p: probabilities of the logits that select; clean: without noise; best: the K largest noisy
/// logits.
inline Var balance(const Balance& w, const Batch& in, Index k, const Rows& p, const Rows& clean, const Rows& z,
                   const Rows& noisy, const std::vector<std::vector<Index>>& best,
                   const std::vector<std::vector<Index>>& chosen, double deviation) {
  if (in.x.empty()) {
    return 0;
  }
  const auto experts = Index(z[0].size());
  const auto& counted = w.count_chosen ? chosen : best;
  const auto frequency = [&](const std::vector<Index>& tokens, const auto& of, Index first, Index expert) {
    double count = 0;
    for (const Index t : tokens) {
      for (Index j = 0; j < first; ++j) {
        count += of[std::size_t(t)][std::size_t(j)] == expert ? 1 : 0;
      }
    }
    return double(experts) * count / (double(first) * double(tokens.size()));
  };
  const auto mean_probability = [&](const std::vector<Index>& tokens, Index expert) {
    Var sum = 0;
    for (const Index t : tokens) {
      sum += p[std::size_t(t)][std::size_t(expert)];
    }
    return sum / double(tokens.size());
  };
  std::vector<Index> all(in.x.size());
  std::iota(all.begin(), all.end(), Index{0});

  Var loss = 0;
  const Index device_size = experts / w.devices;
  for (Index i = 0; i < experts; ++i) {
    if (w.expert_level > 0) {
      loss += w.expert_level * frequency(all, counted, k, i) * mean_probability(all, i);
    }
    if (w.mean_entropy > 0) {
      loss += w.mean_entropy * mean_probability(all, i) * log(mean_probability(all, i));
    }
    for (Index j = 0; w.device_level > 0 && j < experts; ++j) {
      if (i / device_size == j / device_size) {
        loss += w.device_level * frequency(all, counted, k, i) / double(device_size) * mean_probability(all, j);
      }
    }
  }
  const double n = double(in.x.size());
  for (const Index t : all) {
    if (w.z > 0) {
      const double shift = z[std::size_t(t)][0].value();
      Var sum = 0;
      for (const Var& v : z[std::size_t(t)]) {
        sum += exp(v - shift);
      }
      const Var value = shift + log(sum);
      loss += w.z / n * value * value;
    }
    for (Index i = 0; w.token_entropy > 0 && i < experts; ++i) {
      const Var& v = p[std::size_t(t)][std::size_t(i)];
      loss += -w.token_entropy / n * v * log(v);
    }
  }
  double nonempty = 0;
  for (const auto& s : in.sequences) {
    nonempty += s.empty() ? 0 : 1;
  }
  for (const auto& s : in.sequences) {
    if (s.empty()) {
      continue;
    }
    Row importance(static_cast<std::size_t>(experts)), load(static_cast<std::size_t>(experts));
    for (Index i = 0; i < experts; ++i) {
      if (w.sequence_level > 0) {
        loss += w.sequence_level / nonempty * frequency(s, counted, k, i) * mean_probability(s, i);
      }
      if (w.gshard > 0) {
        loss += w.gshard / nonempty * frequency(s, best, 1, i) * mean_probability(s, i);
      }
      for (const Index t : s) {
        const auto row = std::size_t(t);
        importance[std::size_t(i)] += clean[row][std::size_t(i)];
        if (deviation > 0) {
          const Var& threshold = noisy[row][std::size_t(best[row][std::size_t(k - 1)])];
          load[std::size_t(i)] +=
              0.5 * (1.0 + erf((z[row][std::size_t(i)] - threshold) / (deviation * std::sqrt(2.0)))) / double(s.size());
        }
      }
    }
    loss += w.importance / nonempty * squared_variation(importance) + w.load / nonempty * squared_variation(load);
  }
  return loss;
}

/// ⌈n cf / E⌉ or the nearest, up to a multiple.
inline Index room(Index n, Index experts, const Capacity& c) {
  const double exact = double(n) * c.factor / double(experts);
  Index whole = Index(std::floor(exact));
  const double rest = exact - double(whole);
  if (c.rounding == Rounding::ceil ? rest > 0 : rest > 0.5 || (rest == 0.5 && whole % 2 == 1)) {
    ++whole;
  }
  while (whole % c.multiple_of != 0) {
    ++whole;
  }
  return whole;
}

/// The groups of tokens that have a capacity together, and its factor in this call.
inline std::vector<std::vector<Index>> groups_of(const Batch& in, const Capacity& c) {
  std::vector<std::vector<Index>> groups = in.sequences;
  if (c.group == Grouping::call) {
    groups.assign(1, std::vector<Index>(in.x.size()));
    std::iota(groups[0].begin(), groups[0].end(), Index{0});
  }
  return groups;
}
inline Capacity capacity_of(const Batch& in, Capacity c) {
  c.factor = in.capacity_factor != 0 ? in.capacity_factor : c.factor;
  return c;
}

inline Routing route(const TopKRouterConfig& c, const Weights& p, const Batch& in) {
  Routing out;
  const Index k = !in.chosen.empty() ? Index(in.chosen[0].size()) : in.top_k > 0 ? in.top_k : c.top_k;
  const Rows z = gate_logits(p["gate.weight"], in, c.noise);
  const Rows noisy = with_noise(z, in, c.noise);
  const auto scores_of = [&](const Row& logits) {
    Row s = softmax(logits);
    for (std::size_t e = 0; c.score == Score::sigmoid && e < s.size(); ++e) {
      s[e] = sigmoid(logits[e]);
    }
    return s;
  };
  const auto probabilities_of = [&](const Row& s) {
    Var sum = 0;
    for (const Var& v : s) {
      sum += v;
    }
    Row out_row = s;
    for (Var& v : out_row) {
      v = c.score == Score::sigmoid ? v / sum : v;
    }
    return out_row;
  };
  Rows probabilities, clean;
  std::vector<std::vector<Index>> best, chosen;
  Rows weight;
  for (std::size_t t = 0; t < in.x.size(); ++t) {
    const Row s = scores_of(noisy[t]);
    probabilities.push_back(probabilities_of(s));
    clean.push_back(probabilities_of(scores_of(z[t])));
    best.push_back(largest(noisy[t], k));
    chosen.push_back(best.back());
    if (!in.chosen.empty()) {
      chosen.back() = in.chosen[t];
    } else if (c.selection_bias || c.groups.chosen < c.groups.count) {
      std::vector<double> biased;
      for (std::size_t e = 0; e < s.size(); ++e) {
        biased.push_back(s[e].value() + (c.selection_bias ? p["gate.e_score_correction_bias"][0][e].value() : 0));
      }
      const Index size = c.experts / c.groups.count;
      const auto groups = by_value(c.groups.count, [&](Index g) {
        std::vector<double> in_group(biased.begin() + g * size, biased.begin() + (g + 1) * size);
        std::sort(in_group.rbegin(), in_group.rend());
        return in_group[0] + (c.groups.score == GroupScore::top_2_sum && size > 1 ? in_group[1] : 0);
      });
      chosen.back() = by_value(c.experts, [&](Index e) {
        const bool allowed =
            std::find(groups.begin(), groups.begin() + c.groups.chosen, e / size) != groups.begin() + c.groups.chosen;
        return allowed ? biased[std::size_t(e)] : -1e300;
      });
      chosen.back().resize(std::size_t(k));
    }
    Var sum = 0;
    for (const Index e : chosen.back()) {
      sum += e < 0 ? Var(0) : s[std::size_t(e)];
    }
    weight.emplace_back();
    const bool normalize = c.normalize || c.order == TopKOrder::top_k_softmax;
    for (const Index e : chosen.back()) {
      if (e < 0) {
        weight.back().emplace_back(0);
        continue;
      }
      weight.back().push_back(c.scale * (normalize ? s[std::size_t(e)] / sum : s[std::size_t(e)]));
    }
  }
  const Capacity capacity = capacity_of(in, c.capacity);
  for (const auto& sequence : groups_of(in, c.capacity)) {
    std::vector<Index> order = sequence;
    if (c.capacity.priority == Priority::weight) {
      std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
        const auto top = [&](Index t) {
          double m = weight[std::size_t(t)][0].value();
          for (const Var& v : weight[std::size_t(t)]) {
            m = std::max(m, v.value());
          }
          return m;
        };
        return top(a) > top(b);
      });
    }
    std::vector<Index> taken(static_cast<std::size_t>(c.experts), 0);
    for (Index j = 0; j < k; ++j) {
      for (const Index t : order) {
        const Index e = chosen[std::size_t(t)][std::size_t(j)];
        if (e < 0) {
          ++out.dropped;
          continue;
        }
        const Index place = taken[std::size_t(e)]++;
        const bool limited = capacity.factor > 0 && !std::isinf(capacity.factor);
        if (limited && place >= room(Index(sequence.size()) * k, c.experts, capacity)) {
          ++out.dropped;
        } else {
          out.assignments.push_back({t, e, weight[std::size_t(t)][std::size_t(j)]});
        }
      }
    }
  }
  const bool noise = in.training && c.noise.logits > 0;
  out.loss =
      balance(c.balance, in, k, probabilities, clean, z, noisy, best, chosen, noise ? c.noise.logits / double(c.experts) : 0);
  return out;
}

inline Routing route(const ExpertChoiceRouterConfig& c, const Weights& p, const Batch& in) {
  Routing out;
  Rows s = with_noise(gate_logits(p["gate.weight"], in, c.noise), in, c.noise);
  for (Row& row : s) {
    row = softmax(row);
  }
  const Capacity capacity = capacity_of(in, c.capacity);
  for (const auto& sequence : groups_of(in, c.capacity)) {
    const auto length = Index(sequence.size());
    const Index taken =
        std::isinf(capacity.factor) ? length : std::min(length, length == 0 ? 0 : room(length, c.experts, capacity));
    for (Index e = 0; e < c.experts && length > 0; ++e) {
      const auto order =
          by_value(length, [&](Index i) { return s[std::size_t(sequence[std::size_t(i)])][std::size_t(e)].value(); });
      for (Index i = 0; i < taken; ++i) {
        const Index t = sequence[std::size_t(order[std::size_t(i)])];
        out.assignments.push_back({t, e, c.scale * s[std::size_t(t)][std::size_t(e)]});
      }
    }
  }
  return out;
}

inline Routing route(const GivenRouterConfig& /*c*/, const Weights& /*p*/, const Batch& in) {
  Routing out;
  for (Index t = 0; t < in.tokens(); ++t) {
    for (std::size_t j = 0; j < in.chosen[std::size_t(t)].size(); ++j) {
      if (const Index e = in.chosen[std::size_t(t)][j]; e >= 0) {
        out.assignments.push_back({t, e, in.weight[std::size_t(t)][j]});
      } else {
        ++out.dropped;
      }
    }
  }
  return out;
}

inline Routing route(const HashRouterConfig& c, const Weights& /*p*/, const Batch& in) {
  Routing out;
  for (Index t = 0; t < in.tokens(); ++t) {
    const auto hash = Rng(c.seed).bits(static_cast<std::uint64_t>(in.ids[std::size_t(t)]));
    out.assignments.push_back({t, Index(hash % std::uint64_t(c.experts)), c.scale});
  }
  return out;
}

inline Routing route(const TimestepRouterConfig& c, const Weights& p, const Batch& in) {
  Routing out;
  for (std::size_t b = 0; b < in.sequences.size(); ++b) {
    Row activated = in.condition[b];
    for (Var& v : activated) {
      v = silu(v);
    }
    Row z;
    for (std::size_t e = 0; e < std::size_t(c.experts); ++e) {
      z.push_back(dot(activated, p["gate.weight"][e]) + p["gate.bias"][0][e]);
    }
    const Row s = softmax(z);
    for (const Index t : in.sequences[b]) {
      for (const Index e : largest(z, in.top_k > 0 ? in.top_k : c.top_k)) {
        out.assignments.push_back({t, e, c.scale * s[std::size_t(e)]});
      }
    }
  }
  return out;
}

inline Routing route(const ClusterRouterConfig& c, const Weights& p, const Batch& in) {
  Routing out;
  for (std::size_t b = 0; b < in.sequences.size(); ++b) {
    for (const Index t : in.sequences[b]) {
      const Row& feature = c.of_tokens ? in.x[std::size_t(t)] : in.condition[b];
      Row z;
      for (const Row& centroid : p["centroids"]) {
        double distance = 0;
        for (std::size_t f = 0; f < feature.size(); ++f) {
          distance += std::pow(feature[f].value() - centroid[f].value(), 2);
        }
        z.push_back(-distance / c.temperature);
      }
      const auto chosen = largest(z, in.top_k > 0 ? in.top_k : c.top_k);
      Row of_chosen;
      for (const Index e : chosen) {
        of_chosen.push_back(z[std::size_t(e)]);
      }
      const Row w = softmax(of_chosen);
      for (std::size_t j = 0; j < chosen.size(); ++j) {
        out.assignments.push_back({t, chosen[j], c.scale * w[j]});
      }
    }
  }
  return out;
}

/// f_e of one row, by the bank's tensors of that prefix.
using ExpertFunction = std::function<Row(const Weights&, const std::string& prefix, const Row&)>;

inline Row linear(const Rows& weight, const Row& x) {
  Row out;
  for (const Row& w : weight) {
    out.push_back(dot(w, x));
  }
  return out;
}
inline Row plus(Row a, const Row& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    a[i] += b[i];
  }
  return a;
}
/// unit(x Wgᵀ + bg, x Wuᵀ + bu) Wdᵀ + bd, biases where there are tensors of them.
inline ExpertFunction glu(std::function<Var(const Var& gate, const Var& up)> unit) {
  return [unit = std::move(unit)](const Weights& p, const std::string& prefix, const Row& x) {
    const auto projection = [&](const std::string& name, const Row& in) {
      const Row out = linear(p[prefix + name + ".weight"], in);
      return p.has(prefix + name + ".bias") ? plus(out, p[prefix + name + ".bias"][0]) : out;
    };
    Row hidden = projection("gate_proj", x);
    const Row up = projection("up_proj", x);
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      hidden[i] = unit(hidden[i], up[i]);
    }
    return projection("down_proj", hidden);
  };
}
inline ExpertFunction mlp(Var (*activation)(const Var&)) {
  return [activation](const Weights& p, const std::string& prefix, const Row& x) {
    Row hidden = plus(linear(p[prefix + "fc1.weight"], x), p[prefix + "fc1.bias"][0]);
    for (Var& v : hidden) {
      v = activation(v);
    }
    return plus(linear(p[prefix + "fc2.weight"], hidden), p[prefix + "fc2.bias"][0]);
  };
}
inline Row affine(const Weights& p, const std::string& prefix, const Row& x) {
  return plus(linear(p[prefix + "weight"], x), p[prefix + "bias"][0]);
}

struct Output {
  Rows y;
  Index rows = 0;
  Index dropped = 0;
  Var loss = 0;
};

/// y_t = Σ_{assignments of t} w f_e(x_t), and the shared expert's f(x_t).
template <class RouterConfig>
Output layer(const RouterConfig& config, const ExpertFunction& expert, bool shared, const Weights& p, const Batch& in) {
  Output out;
  out.y.assign(in.x.size(), Row(in.x.empty() ? 0 : in.x[0].size()));
  const Routing routing = route(config, p, in);
  for (const Assignment& a : routing.assignments) {
    const Row h = expert(p, "experts." + std::to_string(a.expert) + ".", in.x[std::size_t(a.token)]);
    for (std::size_t d = 0; d < h.size(); ++d) {
      out.y[std::size_t(a.token)][d] += a.weight * h[d];
    }
  }
  for (std::size_t t = 0; shared && t < in.x.size(); ++t) {
    out.y[t] = plus(out.y[t], expert(p, "shared_experts.", in.x[t]));
  }
  out.rows = Index(routing.assignments.size());
  out.dropped = routing.dropped;
  out.loss = routing.loss;
  return out;
}

/// Soft MoE, sequence by sequence.
inline Output layer(const SoftRouterConfig& c, const ExpertFunction& expert, bool /*shared*/, const Weights& p,
                    const Batch& in) {
  Output out;
  out.y.assign(in.x.size(), Row(in.x.empty() ? 0 : in.x[0].size()));
  const auto normalized = [&](const Row& v) {
    const Var norm = sqrt(dot(v, v) + 1e-6);
    Row u = v;
    for (Var& x : u) {
      x = x / norm;
    }
    return u;
  };
  const auto slots = std::size_t(c.experts * c.slots_per_expert);
  const bool learned = c.dispatch == Mixing::learned || c.combine == Mixing::learned;
  for (const auto& sequence : in.sequences) {
    out.rows += Index(slots);
    if (sequence.empty()) {
      continue;
    }
    Rows z(sequence.size(), Row(slots));  // (L,N)
    for (std::size_t i = 0; learned && i < sequence.size(); ++i) {
      const Row& x = (in.gate_x.empty() ? in.x : in.gate_x)[std::size_t(sequence[i])];
      for (std::size_t n = 0; n < slots; ++n) {
        const Row& phi = p["phi.weight"][n];
        z[i][n] = c.normalize ? dot(normalized(x), normalized(phi)) * p["scale"][0][0] : dot(x, phi);
      }
    }
    const auto weights = [&](Mixing mixing, bool over_tokens) {
      Rows w = z;
      for (std::size_t i = 0; i < w.size(); ++i) {
        for (std::size_t n = 0; n < slots; ++n) {
          w[i][n] = mixing == Mixing::identity ? (i == n ? 1.0 : 0.0) : 1.0 / double(over_tokens ? w.size() : slots);
        }
      }
      for (std::size_t i = 0; mixing == Mixing::learned && !over_tokens && i < w.size(); ++i) {
        w[i] = softmax(z[i]);
      }
      for (std::size_t n = 0; mixing == Mixing::learned && over_tokens && n < slots; ++n) {
        Row column;
        for (const Row& row : z) {
          column.push_back(row[n]);
        }
        column = softmax(column);
        for (std::size_t i = 0; i < w.size(); ++i) {
          w[i][n] = column[i];
        }
      }
      return w;
    };
    const Rows dispatch = weights(c.dispatch, true);
    const Rows combine = weights(c.combine, false);
    for (std::size_t n = 0; n < slots; ++n) {
      Row slot(in.x[0].size());
      for (std::size_t i = 0; i < sequence.size(); ++i) {
        for (std::size_t d = 0; d < slot.size(); ++d) {
          slot[d] += dispatch[i][n] * in.x[std::size_t(sequence[i])][d];
        }
      }
      const Row h = expert(p, "experts." + std::to_string(Index(n) / c.slots_per_expert) + ".", slot);
      for (std::size_t i = 0; i < sequence.size(); ++i) {
        for (std::size_t d = 0; d < h.size(); ++d) {
          out.y[std::size_t(sequence[i])][d] += c.scale * combine[i][n] * h[d];
        }
      }
    }
  }
  return out;
}

}  // namespace moxie::test::naive

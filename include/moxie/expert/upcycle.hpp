// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/expert/glu.hpp>
#include <moxie/expert/linear.hpp>
#include <moxie/expert/mlp.hpp>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// Options of `upcycle`.
struct UpcycleOptions {
  /// m: every copy of the dense hidden units is cut into m equal experts. 1: every expert is a whole copy.
  Index parts = 1;
  /// Σ of the weights with which a token's experts count: 1 where they are normalized, `scale` with a scale.
  double weight_sum = 1;
  /// Normal noise on every expert's tensors, in standard deviations of the dense tensor. 0: none.
  double noise = 0;
  Rng rng{0};  ///< draws the noise, for each expert and tensor from a stream of its own
};

namespace detail {

/// How upcycling treats one tensor of an expert.
struct UpcycledTensor {
  enum class Hidden { none, rows, cols };
  Hidden hidden;  // which of its axes are the hidden units
  bool output;    // whether the expert's output is linear in it
};

template <class Scalar, class Unit, class Element>
std::vector<UpcycledTensor> upcycled_tensors(const GluExperts<Scalar, Unit, Element>& bank) {
  using enum UpcycledTensor::Hidden;
  if (bank.has_bias()) {
    return {{rows, false}, {rows, false}, {cols, true}, {cols, false}, {cols, false}, {none, true}};
  }
  return {{rows, false}, {rows, false}, {cols, true}};
}
template <class Scalar, class Activation, class Element>
std::vector<UpcycledTensor> upcycled_tensors(const MlpExperts<Scalar, Activation, Element>& /*bank*/) {
  using enum UpcycledTensor::Hidden;
  return {{rows, false}, {cols, false}, {cols, true}, {none, true}};
}
template <class Scalar, class Element>
std::vector<UpcycledTensor> upcycled_tensors(const LinearExperts<Scalar, Element>& bank) {
  const auto each = bank.layout().tensors().size() / std::size_t(bank.experts());
  return std::vector<UpcycledTensor>(each, {UpcycledTensor::Hidden::none, true});
}

template <class Bank_>
concept Upcyclable = requires(const Bank_& bank) {
  upcycled_tensors(bank);
};

/// The tensor of that name and shape. Throws ShapeError if the block has none.
template <class T>
RowView<T> upcycling_tensor(ParameterView<T> block, const TensorInfo& info) {
  const Index i = block.layout().find(info.name);
  if (i < 0) {
    throw ShapeError("upcycle: there is no tensor '" + info.name + "' in the block of parameters");
  }
  expect_shape("upcycle", info.name, block[i], info.rows, info.cols);
  return block[i];
}

/// √ of the mean of (w - mean)².
template <class Scalar>
double standard_deviation(RowView<const Scalar> w) {
  const auto mean_of = [&](const auto& f) {
    double sum = 0;
    for (Index i = 0; i < w.rows(); ++i) {
      for (Index j = 0; j < w.cols(); ++j) {
        sum += f(double(w(i, j)));
      }
    }
    return sum / double(w.size());
  };
  const double mean = mean_of([](double v) { return v; });
  return std::sqrt(mean_of([&](double v) { return (v - mean) * (v - mean); }));
}

/// A tensor of the dense feed-forward, and what experts get of it.
template <class Scalar>
struct UpcyclingSource {
  RowView<const Scalar> w;
  UpcycledTensor kind;
  double deviation = 0;  // of the noise
  double factor = 1;
};

inline void expect_upcycling(const UpcycleOptions& options, Index dense_experts, Index experts) {
  const Index parts = options.parts;
  expect_value(dense_experts == 1, "upcycle", "the dense feed-forward has to be a bank of one expert");
  expect_at_least("upcycle", "parts", parts, 1);
  expect_value(experts % parts == 0, "upcycle",
               std::to_string(experts) + " experts are no multiple of " + std::to_string(parts) + " parts");
  expect_value(std::isfinite(options.weight_sum) && options.weight_sum > 0, "upcycle",
               "weight_sum must be finite and positive");
  expect_value(std::isfinite(options.noise) && options.noise >= 0, "upcycle", "noise must be finite and not negative");
}

/// All tensors of the dense feed-forward. Throws ValueError for hidden units that cannot be cut.
template <class Bank_, class Scalar>
std::vector<UpcyclingSource<Scalar>> upcycling_sources(const Bank_& dense, ParameterView<const Scalar> weights,
                                                       const UpcycleOptions& options) {
  using Hidden = UpcycledTensor::Hidden;
  const std::vector<UpcycledTensor> kinds = upcycled_tensors(dense);
  const bool cuts = kinds.front().hidden != Hidden::none;
  expect_value(options.parts == 1 || cuts, "upcycle", "linear experts have no hidden units to cut into parts");
  std::vector<UpcyclingSource<Scalar>> sources;
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const UpcycledTensor& kind = kinds[i];
    const RowView<const Scalar> w = upcycling_tensor(weights, dense.layout().tensors()[i]);
    const Index units = kind.hidden == Hidden::rows ? w.rows() : w.cols();
    expect_value(kind.hidden == Hidden::none || units % options.parts == 0, "upcycle",
                 "hidden_dim " + std::to_string(units) + " is no multiple of " + std::to_string(options.parts) + " parts");
    const double parts = kind.hidden == Hidden::none ? 1 : double(options.parts);
    sources.push_back(
        {w, kind, options.noise > 0 ? options.noise * standard_deviation(w) : 0, kind.output ? parts / options.weight_sum : 1});
  }
  return sources;
}

/// Expert number `expert`'s part of a source, with its noise.
template <class Scalar>
void upcycle_tensor(const UpcyclingSource<Scalar>& source, RowView<Scalar> w, Index part, const Rng& rng) {
  using Hidden = UpcycledTensor::Hidden;
  const Index row = source.kind.hidden == Hidden::rows ? part * w.rows() : 0;
  const Index col = source.kind.hidden == Hidden::cols ? part * w.cols() : 0;
  for (Index r = 0; r < w.rows(); ++r) {
    for (Index c = 0; c < w.cols(); ++c) {
      const double noise = source.deviation > 0 ? source.deviation * rng.normal(std::uint64_t(r * w.cols() + c)) : 0;
      w(r, c) = Scalar(source.factor * (double(source.w(row + r, col + c)) + noise));
    }
  }
}

}  // namespace detail

/// Sparse upcycling: overwrites the weights of a bank of E experts with those of a dense feed-forward, which is a bank of one
/// expert. With m = `parts` there are E/m copies; expert c·m + s gets the s-th of m equal parts of the hidden units of copy c:
///
///     input side (gate_proj, up_proj, fc1)               the part's rows
///     output projection (down_proj.weight, fc2.weight)   the part's columns, times m / weight_sum
///     output bias (down_proj.bias, fc2.bias)             1 / weight_sum
///
/// so that a layer computes what the dense feed-forward computes wherever a token chooses complete copies, the m experts of a
/// copy with equal weights; `tie_gate` makes top-k choose so. With `noise`, every tensor w of an expert is drawn around the
/// dense one, w + noise · std(w) N(0,1), before it is multiplied.
///
/// Copies: Komatsuzaki et al. 2022, "Sparse upcycling"; DiT-MoE starts from a dense DiT so. Parts: He et al. 2024, "Upcycling
/// large language models into mixture of experts", virtual groups. For `GluExperts`, `MlpExperts` (dense hidden_dim m·H) and,
/// with m = 1, `LinearExperts`.
///
/// `dense_weights` and `weights` are blocks that have the tensors of `dense` and `bank` under the same names: a bank's own
/// block, or a layer's (`layer.experts()` with `layer.parameters()`). Throws ValueError if `dense` is not one expert, E or the
/// dense hidden_dim is no multiple of m, the experts have no hidden units to cut, the gated units have other options,
/// weight_sum is not positive, noise is negative (or either is not finite), or the weights overlap; ShapeError if the widths do
/// not fit (hidden_dim of the dense one is not m·H, another model_dim, a bias that only one has) or a block lacks a tensor. All
/// before anything is written. Cost: one pass over the weights, in one thread.
template <Bank Bank_>
void upcycle(const Bank_& dense, ParameterView<const std::type_identity_t<typename Bank_::Scalar>> dense_weights,
             const Bank_& bank, ParameterView<std::type_identity_t<typename Bank_::Scalar>> weights,
             const UpcycleOptions& options = {}) {
  static_assert(detail::Upcyclable<Bank_>, "upcycle: the bank has to be GluExperts, MlpExperts or LinearExperts");
  using Scalar = typename Bank_::Scalar;
  using Hidden = detail::UpcycledTensor::Hidden;
  detail::expect_upcycling(options, dense.experts(), bank.experts());
  if constexpr (requires(const typename Bank_::Config& config) { config.unit; }) {
    detail::expect_value(dense.unit() == bank.unit(), "upcycle",
                         "the gated unit of the experts has other options than that of the dense feed-forward");
  }
  const std::vector<TensorInfo>& infos = bank.layout().tensors();
  const auto sources = detail::upcycling_sources<Bank_, Scalar>(dense, dense_weights, options);
  if (infos.size() != sources.size() * std::size_t(bank.experts())) {
    throw ShapeError("upcycle: the experts have other tensors than the dense feed-forward (a bias)");
  }
  const Index parts = options.parts;
  std::vector<RowView<Scalar>> targets;
  for (std::size_t i = 0; i < infos.size(); ++i) {
    const auto& source = sources[i % sources.size()];
    const RowView<Scalar> w = detail::upcycling_tensor(weights, infos[i]);
    detail::expect_shape("upcycle", infos[i].name, w, source.w.rows() / (source.kind.hidden == Hidden::rows ? parts : 1),
                         source.w.cols() / (source.kind.hidden == Hidden::cols ? parts : 1));
    for (const auto& other : sources) {
      detail::expect_value(!detail::overlaps(other.w, w), "upcycle", "the weights overlap the dense ones");
    }
    targets.push_back(w);
  }
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const std::size_t tensor = i % sources.size();
    const Index expert = Index(i / sources.size());
    detail::upcycle_tensor(sources[tensor], targets[i], expert % parts, options.rng.split(std::uint64_t(expert)).split(tensor));
  }
}

/// Makes the rows of a gate (E,D) equal inside each copy of m = `parts` experts: rows c·m + s become row c·m. Their logits then
/// tie, the lower index goes first, and top-k with K a multiple of m chooses K/m complete copies with equal weights inside each
/// (He et al. 2024, virtual groups), unless noise on the logits or a capacity comes between.
///
/// `tie_gate(layer.parameters()["gate.weight"], parts)`, after `initialize`. Throws ValueError, with nothing written, if parts
/// is below 1 or E no multiple of it. Cost: ED numbers copied.
template <class Scalar>
void tie_gate(RowView<Scalar> gate, Index parts) {
  detail::expect_at_least("tie_gate", "parts", parts, 1);
  detail::expect_value(gate.rows() % parts == 0, "tie_gate",
                       std::to_string(gate.rows()) + " rows are no multiple of " + std::to_string(parts) + " parts");
  for (Index r = 0; r < gate.rows(); ++r) {
    std::copy_n(gate.row(r - r % parts), gate.cols(), gate.row(r));
  }
}

}  // namespace moxie::inline MOXIE_NAMESPACE

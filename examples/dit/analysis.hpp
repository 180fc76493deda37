// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <moxie/routing/plan.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dit {

using moxie::Index;
using moxie::Matrix;

/// I(key; expert) in bits of a table of counts (keys, experts): how much the key of a token says about its expert.
///
///     I = Σ p(k,e) log₂ (p(k,e) / (p(k) p(e)))
///
/// 0 if they are independent, at most the entropy of either. Few counts look like dependence: (keys - 1)(experts - 1) / 2n ln 2
/// bits are expected of n independent ones (Miller 1955), with the keys and experts that occur; they are taken off, down to 0.
inline double mutual_information(const Matrix<double>& counts) {
  const double n = counts.sum();
  if (!(n > 0)) {
    return 0;
  }
  const Eigen::VectorXd of_key = counts.rowwise().sum();
  const Eigen::RowVectorXd of_expert = counts.colwise().sum();
  double bits = 0;
  for (Index k = 0; k < counts.rows(); ++k) {
    for (Index e = 0; e < counts.cols(); ++e) {
      const double c = counts(k, e);
      bits += c > 0 ? c / n * std::log2(c * n / (of_key(k) * of_expert(e))) : 0;
    }
  }
  const double cells = double((of_key.array() > 0).count() - 1) * double((of_expert.array() > 0).count() - 1);
  return std::max(0.0, bits - cells / (2 * n * std::log(2.0)));
}

/// Who chose whom while images were drawn: for every layer and stretch of the way from noise to image ("bin"), the tokens that
/// went to each expert, by the class of their image and by their position in it.
///
/// Sparse layers count assignments, soft ones the combine weights that a token gives an expert's slots.
class RoutingCounts {
 public:
  struct Shape {
    Index layers = 0;
    Index experts = 0;
    Index classes = 0;
    Index positions = 0;  ///< tokens of an image, row by row
    Index bins = 1;       ///< 0 is the stretch next to the image, the last one that next to the noise
  };
  static constexpr Index all = -1;

  /// Throws ValueError for sizes below 1.
  explicit RoutingCounts(const Shape& shape)
      : shape_((expect_sizes(shape), shape)),
        by_class_(std::size_t(shape.layers * shape.bins), Matrix<double>::Zero(shape.classes, shape.experts)),
        by_position_(std::size_t(shape.layers * shape.bins), Matrix<double>::Zero(shape.positions, shape.experts)) {}

  const Shape& shape() const { return shape_; }

  /// Counts a layer's plan over images with these labels. Images beyond them do not count: of a batch for guidance only the
  /// half that has a class does. Throws ShapeError for a plan of other experts, or tokens that are not whole images, ValueError
  /// for a layer, bin or label that there is not; nothing is counted then.
  template <class S>
  void add(Index layer, Index bin, const moxie::SparsePlan<S>& plan, std::span<const Index> labels) {
    expect(layer, bin, plan, labels);
    for (Index e = 0; e < plan.experts(); ++e) {
      for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e) + 1]; ++r) {
        count(layer, bin, plan.token(r), e, labels, 1);
      }
    }
  }
  template <class S>
  void add(Index layer, Index bin, const moxie::DensePlan<S>& plan, std::span<const Index> labels) {
    expect(layer, bin, plan, labels);
    for (Index t = 0; t < plan.tokens(); ++t) {
      for (Index n = 0; n < plan.slot_count(); ++n) {
        count(layer, bin, t, n / plan.slots_per_expert(), labels, double(plan.combine()(t, n)));
      }
    }
  }

  /// (classes, experts), of a layer in one bin or in all.
  Matrix<double> by_class(Index layer, Index bin = all) const { return sum(by_class_, layer, bin); }
  /// (positions, experts).
  Matrix<double> by_position(Index layer, Index bin = all) const { return sum(by_position_, layer, bin); }
  /// (bins, experts).
  Matrix<double> by_timestep(Index layer) const {
    Matrix<double> counts(shape_.bins, shape_.experts);
    for (Index bin = 0; bin < shape_.bins; ++bin) {
      counts.row(bin) = by_position(layer, bin).colwise().sum();
    }
    return counts;
  }
  /// Shares of the experts in each layer, (layers, experts).
  Matrix<double> load() const {
    Matrix<double> shares(shape_.layers, shape_.experts);
    for (Index layer = 0; layer < shape_.layers; ++layer) {
      const Eigen::RowVectorXd counts = by_position(layer).colwise().sum();
      shares.row(layer) = counts / std::max(counts.sum(), 1e-300);
    }
    return shares;
  }

 private:
  static void expect_sizes(const Shape& s) {
    for (const Index size : {s.layers, s.experts, s.classes, s.positions, s.bins}) {
      moxie::detail::expect_at_least("RoutingCounts", "each size", size, 1);
    }
  }
  template <class Plan>
  void expect(Index layer, Index bin, const Plan& plan, std::span<const Index> labels) const {
    constexpr std::string_view where = "RoutingCounts::add";
    moxie::detail::expect_value(layer >= 0 && layer < shape_.layers, where, "there is no such layer");
    moxie::detail::expect_value(bin >= 0 && bin < shape_.bins, where, "there is no such bin");
    for (const Index label : labels) {
      moxie::detail::expect_value(label >= 0 && label < shape_.classes, where, "a label is not a class");
    }
    if (plan.experts() != shape_.experts || plan.tokens() % shape_.positions != 0) {
      throw moxie::ShapeError("RoutingCounts::add: the plan has " + std::to_string(plan.experts()) + " experts and " +
                              std::to_string(plan.tokens()) + " tokens, expected " + std::to_string(shape_.experts) +
                              " and a multiple of " + std::to_string(shape_.positions));
    }
  }
  void count(Index layer, Index bin, Index token, Index expert, std::span<const Index> labels, double amount) {
    const Index image = token / shape_.positions;
    if (image < Index(labels.size())) {
      const auto at = std::size_t(layer * shape_.bins + bin);
      by_class_[at](labels[std::size_t(image)], expert) += amount;
      by_position_[at](token % shape_.positions, expert) += amount;
    }
  }
  Matrix<double> sum(const std::vector<Matrix<double>>& counts, Index layer, Index bin) const {
    if (bin != all) {
      return counts[std::size_t(layer * shape_.bins + bin)];
    }
    Matrix<double> total = counts[std::size_t(layer * shape_.bins)];
    for (Index b = 1; b < shape_.bins; ++b) {
      total += counts[std::size_t(layer * shape_.bins + b)];
    }
    return total;
  }

  Shape shape_;
  std::vector<Matrix<double>> by_class_;
  std::vector<Matrix<double>> by_position_;
};

}  // namespace dit

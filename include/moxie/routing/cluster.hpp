// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <moxie/core/cost.hpp>
#include <moxie/routing/config.hpp>
#include <moxie/routing/router.hpp>
#include <moxie/routing/score.hpp>
#include <moxie/routing/selection.hpp>
#include <numeric>
#include <tuple>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

struct ClusterRouterConfig {
  Index feature_dim = 0;  ///< F
  Index experts = 0;
  Index top_k = 1;
  double temperature = 1;  ///< τ
  /// True: the feature of a token is its own row of x. False: a sequence has one, its row of `Tokens::condition`.
  bool of_tokens = false;
  double scale = 1;  ///< γ, factor of all weights
};

/// Cluster routing: each expert belongs to a cluster of the data, and near clusters are mixed.
///
///     p(k | h) ∝ exp(-‖h - μ_k‖² / τ)
///     chosen = the K largest p, ties to the lower index;   w_k = γ p_k / Σ_chosen p
///
/// c-BTM (Gururangan et al. 2023), equation 2: h is a fixed feature of the sequence (or token), so there is no gradient to it,
/// and the centroids μ come from `balanced_k_means`, not from training. Parameter: `centroids` (E,F). Cost: 3BEF + O(TK).
template <class Scalar_>
class ClusterRouter {
 public:
  using Scalar = Scalar_;
  using Plan = SparsePlan<Scalar>;
  using Config = ClusterRouterConfig;

  class Tape {
   public:
    /// p (B,E), or (T,E) for features of tokens.
    RowView<const Scalar> scores() const { return scores_.view(features_, experts_); }
    double balance_loss() const { return 0; }

   private:
    friend class ClusterRouter;
    Index features_ = 0;
    Index experts_ = 0;
    Buffer<Scalar> scores_;
    Buffer<Index> expert_;
    Buffer<Scalar> weight_;
  };

  /// Throws ValueError for sizes below 1, K > E, and a temperature that is not above 0.
  explicit ClusterRouter(const Config& config) : config_(config) {
    constexpr std::string_view where = "ClusterRouter";
    detail::expect_at_least(where, "feature_dim", config.feature_dim, 1);
    detail::expect_experts(where, config.experts);
    detail::expect_at_least(where, "top_k", config.top_k, 1);
    detail::expect_value(config.top_k <= config.experts, where, "top_k is more than there are experts");
    detail::expect_value(config.temperature > 0 && std::isfinite(config.temperature), where, "the temperature must be above 0");
    detail::expect_in_scalar<Scalar>(where, "the temperature", config.temperature);
    detail::expect_scale<Scalar>(where, config.scale);
    centroids_ =
        layout_.add("centroids", {config.experts, config.feature_dim}, {.role = Role::state, .trained = Trained::elsewhere});
  }

  const Config& config() const { return config_; }
  const Layout& layout() const { return layout_; }
  Index experts() const { return config_.experts; }
  Index model_dim() const { return config_.of_tokens ? config_.feature_dim : -1; }
  /// R of a call: T·K.
  Index most_rows(const Sequences& sequences) const { return sequences.tokens() * config_.top_k; }
  /// Of the distances. There is no backward.
  Cost multiply_adds(Index tokens, Index sequences) const {
    return {double(config_.of_tokens ? tokens : sequences) * double(config_.feature_dim) * double(config_.experts), 0};
  }
  /// Standard normal: a placeholder, until `balanced_k_means` has fitted them.
  void initialize(ParameterView<Scalar> p, const Rng& rng) const { rng.fill_normal(p[centroids_]); }

  /// Throws ShapeError if the condition is not (B,F), ValueError naming the first token or sequence with a distance that is not
  /// finite, and for what only other routers read.
  void route(ParameterView<const Scalar> p, const Tokens<Scalar>& in, Plan& plan, Tape& tape, const Context& context) const {
    constexpr std::string_view where = "ClusterRouter::route";
    detail::expect_read(where, in, {.top_k = true});
    const Index experts = config_.experts;
    const Index k = in.top_k > 0 ? in.top_k : config_.top_k;
    const RowView<const Scalar> features = config_.of_tokens ? in.x : in.condition;
    detail::expect_value(k <= experts, where, "top_k is more than there are experts");
    detail::expect_shape(where, config_.of_tokens ? "x" : "condition", features,
                         config_.of_tokens ? in.count() : in.sequences.count(), config_.feature_dim);
    tape.features_ = features.rows();
    tape.experts_ = experts;
    const RowView<Scalar> s = tape.scores_.matrix(features.rows(), experts);
    detail::for_each_row(features.rows(), context.exec, [&](Index i) {
      for (Index e = 0; e < experts; ++e) {
        Scalar distance = 0;
        for (Index f = 0; f < config_.feature_dim; ++f) {
          const Scalar d = features(i, f) - p[centroids_](e, f);
          distance += d * d;
        }
        s(i, e) = -distance / Scalar(config_.temperature);
      }
    });
    detail::expect_finite_logits<Scalar>(
        where, s, [&](Index i) { return config_.of_tokens ? in.row(i) : i; }, context.exec,
        config_.of_tokens ? "token" : "sequence");
    tape.expert_.resize(in.count() * k);
    tape.weight_.resize(in.count() * k);
    // The K nearest of one feature, and its softmax over only these, for the tokens [begin, end).
    const auto assign = [&](Index feature, Index begin, Index end) {
      if (begin == end) {
        return;
      }
      Index* chosen = tape.expert_.data() + begin * k;
      Scalar* weight = tape.weight_.data() + begin * k;
      select_top_k(s.row(feature), experts, k, chosen);
      Scalar sum = 0;
      for (Index j = 0; j < k; ++j) {
        weight[j] = std::exp(s(feature, chosen[j]) - s(feature, chosen[0]));
        sum += weight[j];
      }
      for (Index j = 0; j < k; ++j) {
        weight[j] = Scalar(config_.scale) * (weight[j] / sum);
      }
      for (Index t = begin + 1; t < end; ++t) {
        std::copy_n(chosen, k, tape.expert_.data() + t * k);
        std::copy_n(weight, k, tape.weight_.data() + t * k);
      }
    };
    if (config_.of_tokens) {
      detail::for_each_row(in.count(), context.exec, [&](Index t) { assign(t, t, t + 1); });
    } else {
      in.sequences.for_each(assign);
    }
    softmax_rows(s, context.exec);
    plan.build(in.count(), experts, k, tape.expert_.span(), tape.weight_.span());
  }

  /// Nothing: features are fixed, and centroids are fitted.
  void backward(ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& /*in*/, const Plan& /*plan*/,
                const RouterGradient<Plan>& /*gradient*/, Tape& /*tape*/, const Context& /*context*/) const {}

 private:
  Config config_;
  Layout layout_;
  Index centroids_ = 0;
};

/// What `balanced_k_means` finds.
template <class Scalar>
struct BalancedClusters {
  Matrix<Scalar> centroids;       ///< (E,F)
  std::vector<Index> assignment;  ///< N: the cluster of each feature
  double distance = 0;            ///< mean squared distance to the centroid
  int iterations = 0;             ///< until nothing moved, or the limit
};

namespace detail {

/// The steps of `balanced_k_means`.
template <class Scalar>
class BalancedKMeans {
 public:
  BalancedKMeans(RowView<const Scalar> features, Index clusters)
      : features_(features),
        clusters_(clusters),
        centroids_(std::size_t(clusters * features.cols())),
        pairs_(std::size_t(features.rows() * clusters)) {}

  const std::vector<double>& centroids() const { return centroids_; }

  /// k-means++: each centroid is a feature, drawn by its squared distance to the nearest one before.
  void seed(const Rng& rng) {
    const Index n = features_.rows();
    std::vector<double> nearest(std::size_t(n), std::numeric_limits<double>::infinity());
    for (Index c = 0; c < clusters_; ++c) {
      Index chosen = rng.below(n, 0);
      if (c > 0) {
        const double total = std::accumulate(nearest.begin(), nearest.end(), 0.0);
        double left = rng.uniform(std::uint64_t(c)) * total;
        chosen = 0;
        while (chosen < n - 1 && (left -= nearest[std::size_t(chosen)]) >= 0) {
          ++chosen;
        }
      }
      std::copy_n(features_.row(chosen), features_.cols(), centroid(c));
      for (Index i = 0; i < n; ++i) {
        nearest[std::size_t(i)] = (std::min)(nearest[std::size_t(i)], distance(i, c));
      }
    }
  }

  /// Gives each feature its cluster, from the nearest pair to the farthest while clusters have
  /// capacity. Returns the mean distance.
  double assign(std::vector<Index>& assignment, std::vector<Index>& size) {
    const Index n = features_.rows();
    const Index room = (n + clusters_ - 1) / clusters_;
    for (Index i = 0; i < n; ++i) {
      for (Index c = 0; c < clusters_; ++c) {
        pairs_[std::size_t(i * clusters_ + c)] = {distance(i, c), i, c};
      }
    }
    std::sort(pairs_.begin(), pairs_.end(), [](const Pair& a, const Pair& b) {
      return std::tie(a.distance, a.feature, a.cluster) < std::tie(b.distance, b.feature, b.cluster);
    });
    assignment.assign(std::size_t(n), -1);
    size.assign(std::size_t(clusters_), 0);
    double total = 0;
    for (const Pair& pair : pairs_) {
      Index& own = assignment[std::size_t(pair.feature)];
      if (own < 0 && size[std::size_t(pair.cluster)] < room) {
        own = pair.cluster;
        ++size[std::size_t(pair.cluster)];
        total += pair.distance;
      }
    }
    return total / double(n);
  }

  /// Moves each centroid to the mean of its features; one without any stays.
  void move(const std::vector<Index>& assignment, const std::vector<Index>& size) {
    const Index dim = features_.cols();
    std::vector<double> sums(centroids_.size(), 0.0);
    for (Index i = 0; i < features_.rows(); ++i) {
      for (Index f = 0; f < dim; ++f) {
        sums[std::size_t(assignment[std::size_t(i)] * dim + f)] += double(features_(i, f));
      }
    }
    for (Index c = 0; c < clusters_; ++c) {
      for (Index f = 0; f < dim && size[std::size_t(c)] > 0; ++f) {
        centroid(c)[f] = sums[std::size_t(c * dim + f)] / double(size[std::size_t(c)]);
      }
    }
  }

 private:
  struct Pair {
    double distance;
    Index feature, cluster;
  };

  double* centroid(Index c) { return centroids_.data() + c * features_.cols(); }
  double distance(Index i, Index c) {
    double sum = 0;
    for (Index f = 0; f < features_.cols(); ++f) {
      const double d = double(features_(i, f)) - centroid(c)[f];
      sum += d * d;
    }
    return sum;
  }

  RowView<const Scalar> features_;
  Index clusters_;
  std::vector<double> centroids_;
  std::vector<Pair> pairs_;
};

}  // namespace detail

/// Clusters of equal size: k-means in which no cluster takes more than ⌈N/E⌉ features (c-BTM,
/// section 2.1).
///
/// Starts from k-means++ (Arthur and Vassilvitskii 2007) drawn with `rng`. Each iteration assigns
/// pairs (feature, cluster) from the nearest to the farthest while clusters have capacity, ties to
/// the lower feature, then the lower cluster, and moves each centroid to its mean. Greedy, not
/// optimal: c-BTM solves the assignment itself. Distances in double. O(iterations · N E (F + log
/// NE)).
///
/// Throws ValueError for fewer features than clusters, or one that is not finite.
template <class Scalar>
BalancedClusters<Scalar> balanced_k_means(RowView<const Scalar> features, Index clusters, const Rng& rng, int iterations = 50) {
  const Index n = features.rows();
  const Index dim = features.cols();
  detail::expect_at_least("balanced_k_means", "clusters", clusters, 1);
  detail::expect_value(n >= clusters, "balanced_k_means", "there are fewer features than clusters");
  for (Index i = 0; i < n; ++i) {
    detail::expect_value(kernel::all_finite(dim, features.row(i)), "balanced_k_means", "a feature is not finite");
  }
  detail::BalancedKMeans<Scalar> means(features, clusters);
  means.seed(rng);
  BalancedClusters<Scalar> result;
  std::vector<Index> assignment;
  std::vector<Index> size;
  for (bool moved = true; moved && result.iterations < (std::max)(iterations, 1); ++result.iterations) {
    result.distance = means.assign(assignment, size);
    moved = assignment != result.assignment;
    result.assignment = assignment;
    if (moved) {
      means.move(assignment, size);
    }
  }
  result.centroids.resize(clusters, dim);
  std::transform(means.centroids().begin(), means.centroids().end(), result.centroids.data(),
                 [](double v) { return Scalar(v); });
  return result;
}

}  // namespace moxie::inline MOXIE_NAMESPACE

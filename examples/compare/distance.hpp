// SPDX-License-Identifier: MIT
#pragma once

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <moxie/core/exec.hpp>
#include <moxie/core/matrix.hpp>
#include <vector>

/// How far the features of drawn images are from those of real ones. Rows are images.
namespace compare {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;

namespace detail {

struct Gaussian {
  Eigen::VectorXd mean;
  Eigen::MatrixXd covariance;
};

inline Gaussian gaussian_of(const Matrix<float>& features) {
  const Eigen::MatrixXd x = features.cast<double>();
  Gaussian g;
  g.mean = x.colwise().mean();
  const Eigen::MatrixXd centred = x.rowwise() - g.mean.transpose();
  // Lazily: Eigen's own threads would add in an order that depends on how many there are.
  g.covariance = centred.transpose().lazyProduct(centred) / double(std::max<Index>(x.rows() - 1, 1));
  return g;
}

/// The root of a symmetric matrix that has no negative eigenvalues but for rounding.
inline Eigen::MatrixXd root(const Eigen::MatrixXd& m) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(m);
  const Eigen::VectorXd roots = solver.eigenvalues().cwiseMax(0).cwiseSqrt();
  const Eigen::MatrixXd scaled = solver.eigenvectors() * roots.asDiagonal();
  return scaled.lazyProduct(solver.eigenvectors().transpose());
}

inline void expect_features(const char* where, const Matrix<float>& a, const Matrix<float>& b, Index least) {
  moxie::detail::expect_value(a.cols() == b.cols() && a.rows() >= least && b.rows() >= least, where,
                              "two sets of features of one width expected, at least " + std::to_string(least) + " in each");
  moxie::detail::expect_value(a.allFinite() && b.allFinite(), where, "a feature is not finite");
}

}  // namespace detail

/// Fréchet distance of two sets, taken as normally distributed: Heusel et al. 2017, with features of our own.
///
///     |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½)
///
/// It falls with the number of images: compare equal numbers. Throws ValueError for fewer than two, other widths, or features
/// that are not finite.
inline double frechet_distance(const Matrix<float>& a, const Matrix<float>& b) {
  detail::expect_features("frechet_distance", a, b, 2);
  const detail::Gaussian first = detail::gaussian_of(a);
  const detail::Gaussian second = detail::gaussian_of(b);
  const Eigen::MatrixXd half = detail::root(first.covariance);
  const Eigen::MatrixXd left = half.lazyProduct(second.covariance);
  const Eigen::MatrixXd product = left.lazyProduct(half);
  const double covariances = first.covariance.trace() + second.covariance.trace() - 2 * detail::root(product).trace();
  return (first.mean - second.mean).squaredNorm() + std::max(0.0, covariances);
}

/// Share of drawn images that are near a real one, and of real ones that are near a drawn one.
struct PrecisionRecall {
  double precision = 0;
  double recall = 0;
};

/// Near is within the distance of an image's k-th nearest neighbour of its own set: Kynkäänniemi et al. 2019. O(n² D). Throws
/// as `frechet_distance`, for k + 1 images.
inline PrecisionRecall precision_recall(const Matrix<float>& real, const Matrix<float>& drawn, Index k, const Exec& exec) {
  moxie::detail::expect_at_least("precision_recall", "k", k, 1);
  detail::expect_features("precision_recall", real, drawn, k + 1);
  const auto squared_distances = [](const Matrix<float>& from, Index i, const Matrix<float>& to) {
    return (to.rowwise() - from.row(i)).rowwise().squaredNorm().eval();
  };
  const auto radii = [&](const Matrix<float>& set) {
    std::vector<float> radius(std::size_t(set.rows()));
    exec.parallel_for(set.rows(), [&](Index i) {
      Eigen::VectorXf d = squared_distances(set, i, set);
      std::nth_element(d.begin(), d.begin() + k, d.end());  // the nearest is itself
      radius[std::size_t(i)] = d(k);
    });
    return radius;
  };
  const auto share_near = [&](const Matrix<float>& these, const Matrix<float>& those) {
    const std::vector<float> radius = radii(those);
    std::vector<int> near(std::size_t(these.rows()));
    exec.parallel_for(these.rows(), [&](Index i) {
      const Eigen::VectorXf d = squared_distances(these, i, those);
      for (Index j = 0; j < those.rows() && near[std::size_t(i)] == 0; ++j) {
        near[std::size_t(i)] = d(j) <= radius[std::size_t(j)] ? 1 : 0;
      }
    });
    return double(std::count(near.begin(), near.end(), 1)) / double(these.rows());
  };
  return {share_near(drawn, real), share_near(real, drawn)};
}

}  // namespace compare

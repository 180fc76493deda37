// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/mlp.hpp>

#include "golden_case.hpp"

namespace golden {

/// The MLP experts of vmoe, which keeps kernels as [E,in,out]: the transposes of the layer's.
template <class Scalar>
struct VmoeExperts {
  Index experts;
  Index dim;
  Index hidden;

  void require(const GoldenCase& golden) const {
    for (const std::string prefix : {"param/", "grad/param/"}) {
      golden.require(prefix + "Mlp.Dense_0.kernel", {experts, dim, hidden});
      golden.require(prefix + "Mlp.Dense_0.bias", {experts, hidden});
      golden.require(prefix + "Mlp.Dense_1.kernel", {experts, hidden, dim});
      golden.require(prefix + "Mlp.Dense_1.bias", {experts, dim});
    }
  }
  static std::string name_of(Index expert, const char* tensor) { return "experts." + std::to_string(expert) + "." + tensor; }

  void load(GoldenCase& golden, moxie::Parameters<Scalar>& p) const {
    const Matrix<Scalar> kernel0 = golden.matrix<Scalar>("param/Mlp.Dense_0.kernel", experts * dim, hidden);
    const Matrix<Scalar> kernel1 = golden.matrix<Scalar>("param/Mlp.Dense_1.kernel", experts * hidden, dim);
    const Matrix<Scalar> bias0 = golden.matrix<Scalar>("param/Mlp.Dense_0.bias", experts, hidden);
    const Matrix<Scalar> bias1 = golden.matrix<Scalar>("param/Mlp.Dense_1.bias", experts, dim);
    for (Index e = 0; e < experts; ++e) {
      p[name_of(e, "fc1.weight")].eigen() = kernel0.middleRows(e * dim, dim).transpose();
      p[name_of(e, "fc2.weight")].eigen() = kernel1.middleRows(e * hidden, hidden).transpose();
      p[name_of(e, "fc1.bias")].eigen() = bias0.row(e);
      p[name_of(e, "fc2.bias")].eigen() = bias1.row(e);
    }
  }
  void compare_gradients(GoldenCase& golden, const moxie::Parameters<Scalar>& grads) const {
    Matrix<Scalar> kernel0(experts * dim, hidden);
    Matrix<Scalar> kernel1(experts * hidden, dim);
    Matrix<Scalar> bias0(experts, hidden);
    Matrix<Scalar> bias1(experts, dim);
    for (Index e = 0; e < experts; ++e) {
      kernel0.middleRows(e * dim, dim) = grads[name_of(e, "fc1.weight")].eigen().transpose();
      kernel1.middleRows(e * hidden, hidden) = grads[name_of(e, "fc2.weight")].eigen().transpose();
      bias0.row(e) = grads[name_of(e, "fc1.bias")].eigen();
      bias1.row(e) = grads[name_of(e, "fc2.bias")].eigen();
    }
    golden.compare("grad/param/Mlp.Dense_0.kernel", values(kernel0));
    golden.compare("grad/param/Mlp.Dense_0.bias", values(bias0));
    golden.compare("grad/param/Mlp.Dense_1.kernel", values(kernel1));
    golden.compare("grad/param/Mlp.Dense_1.bias", values(bias1));
  }
};

}  // namespace golden

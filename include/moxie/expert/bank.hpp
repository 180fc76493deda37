// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <moxie/core/exec.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/core/workspace.hpp>
#include <moxie/exchange/grouped_rows.hpp>
#include <moxie/kernel/gemm.hpp>
#include <string>

namespace moxie {

/// E experts over one block of weights: what a layer calls, over all routed rows at once, so that products can be grouped and
/// fused.
///
/// * `Scalar`, `Tape`; `layout()`, `initialize(p, rng)`, `experts()`, `model_dim()`;
/// * `forward(p, rows, h, tape, exec)`: h (R,D) = expert of each row, overwritten;
/// * `backward(p, rows, dh, drows, dp, tape, workspace, exec)`: drows (R,D) overwritten, parameter gradients added to dp.
///
/// Rows are independent, R = 0 is legal, and an expert without rows adds exactly zero. `ExpertBank` makes one of a user's
/// expert.
template <class B>
concept Bank = std::copyable<B> &&
    requires(const B& bank, ParameterView<const typename B::Scalar> p, ParameterView<typename B::Scalar> dp,
             const GroupedRows<typename B::Scalar>& rows, RowView<const typename B::Scalar> dh, RowView<typename B::Scalar> h,
             typename B::Tape& tape, const typename B::Tape& done, Workspace& workspace, const Exec& exec) {
  { bank.layout() } -> std::convertible_to<const Layout&>;
  bank.initialize(dp, Rng(0));
  { bank.experts() } -> std::convertible_to<Index>;
  { bank.model_dim() } -> std::convertible_to<Index>;
  bank.forward(p, rows, h, tape, exec);
  bank.backward(p, rows, dh, h, dp, done, workspace, exec);
};

/// Options of the expert families with one hidden layer.
struct HiddenConfig {
  Index hidden_dim = 0;  ///< H
};

/// How the tensors of a bank are called: "experts.3." for E numbered experts, "shared_experts." for one that has no number.
struct BankNames {
  std::string base = "experts";
  bool numbered = true;

  std::string prefix(Index expert) const { return numbered ? base + "." + std::to_string(expert) + "." : base + "."; }
};

namespace detail {

/// One weight (or bias) tensor of each expert, at equal distances in the block.
struct BankTensor {
  Index first = 0;     // position in the layout
  Index distance = 0;  // positions from one expert's to the next one's

  template <class T>
  RowView<T> of(ParameterView<T> p, Index expert) const {
    return p[first + expert * distance];
  }
};

/// The tensor of each expert as a function of the expert, which is what the products below take.
template <class T>
auto of(ParameterView<T> p, BankTensor tensor) {
  return [p, tensor](Index expert) { return tensor.of(p, expert); };
}

/// The grouping of `rows` over other rows, which lie in order.
template <class Scalar>
GroupedRows<Scalar> regrouped(const GroupedRows<Scalar>& rows, RowView<const std::type_identity_t<Scalar>> contiguous) {
  return {rows.starts, contiguous, nullptr};
}

/// Uniform on ±√(6 / (in + out)) for a weight (out,in): Glorot and Bengio 2010, equation 16.
template <class Scalar>
void initialize_glorot(RowView<Scalar> weight, const Rng& rng) {
  const double bound = std::sqrt(6.0 / double(weight.rows() + weight.cols()));
  rng.fill_uniform(weight, -bound, bound);
}

/// h_e = rows_e W_eᵀ for every expert, or += : (R_e,in)(in,out) -> (R_e,out).
template <class Scalar, class WeightOf>
void multiply_rows(const GroupedRows<Scalar>& rows, WeightOf&& weight, RowView<std::type_identity_t<Scalar>> h, bool add,
                   const Exec& exec) {
  kernel::grouped_gemm<Scalar>(
      rows.experts(),
      [&](Index e) -> kernel::Product<Scalar> {
        const RowView<const Scalar> w = weight(e);
        const Index first = rows.begin(e);
        const bool gather = rows.index != nullptr;
        return {rows.count(e),
                w.rows(),
                w.cols(),
                {gather ? rows.rows.data() : rows.rows.row(first), rows.rows.stride(), gather ? rows.index + first : nullptr,
                 false},
                kernel::transposed<Scalar>(w),
                {h.row(first), h.stride(), nullptr, add}};
      },
      exec);
}

/// drows_e = dh_e W_e, or += : (R_e,out)(out,in) -> (R_e,in).
template <class Scalar, class WeightOf>
void multiply_rows_backward(const GroupedRows<Scalar>& rows, WeightOf&& weight, RowView<const std::type_identity_t<Scalar>> dh,
                            RowView<std::type_identity_t<Scalar>> drows, bool add, const Exec& exec) {
  kernel::grouped_gemm<Scalar>(
      rows.experts(),
      [&](Index e) -> kernel::Product<Scalar> {
        const RowView<const Scalar> w = weight(e);
        const Index first = rows.begin(e);
        return {rows.count(e),
                w.cols(),
                w.rows(),
                {dh.row(first), dh.stride(), nullptr, false},
                kernel::plain<Scalar>(w),
                {drows.row(first), drows.stride(), nullptr, add}};
      },
      exec);
}

/// dW_e += dh_eᵀ rows_e: (out,R_e)(R_e,in) -> (out,in). One task owns an element, rows in order.
template <class Scalar, class WeightOf>
void add_weight_gradient(const GroupedRows<Scalar>& rows, RowView<const std::type_identity_t<Scalar>> dh, WeightOf&& dweight,
                         const Exec& exec) {
  kernel::grouped_gemm<Scalar>(
      rows.experts(),
      [&](Index e) -> kernel::Product<Scalar> {
        const RowView<Scalar> dw = dweight(e);
        const Index first = rows.begin(e);
        const bool gather = rows.index != nullptr;
        if (rows.count(e) == 0) {
          return {};
        }
        return {dw.rows(),
                dw.cols(),
                rows.count(e),
                {dh.row(first), dh.stride(), nullptr, true},
                {gather ? rows.rows.data() : rows.rows.row(first), rows.rows.stride(), gather ? rows.index + first : nullptr,
                 false},
                {dw.data(), dw.stride(), nullptr, true}};
      },
      exec);
}

/// db_e += column sums of dh_e, in order of rows.
template <class Scalar, class BiasOf>
void add_bias_gradient(const GroupedRows<Scalar>& rows, RowView<const std::type_identity_t<Scalar>> dh, BiasOf&& dbias,
                       const Exec& exec) {
  exec.parallel_for(rows.experts(), [&](Index e) {
    const RowView<Scalar> db = dbias(e);
    for (Index r = rows.begin(e); r < rows.begin(e + 1); ++r) {
      db.eigen() += dh.middle_rows(r, 1).eigen();
    }
  });
}

/// Each row of h becomes the bias of its expert: what a product is then added to.
template <class Scalar, class BiasOf>
void set_rows_to_bias(const GroupedRows<Scalar>& rows, BiasOf&& bias, RowView<std::type_identity_t<Scalar>> h,
                      const Exec& exec) {
  exec.parallel_for(rows.experts(),
                    [&](Index e) { h.middle_rows(rows.begin(e), rows.count(e)).eigen().rowwise() = bias(e).eigen().row(0); });
}

}  // namespace detail
}  // namespace moxie

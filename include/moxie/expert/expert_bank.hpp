// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/expert/bank.hpp>
#include <utility>
#include <vector>

namespace moxie {

/// One expert of a user's own: a function of its rows and its parameters, with the adjoint. It keeps nothing between the calls;
/// `backward` gets the rows again and recomputes what it needs.
///
/// * `Scalar`, `Config`, a constructor from (model_dim, Config), `layout()` (names without a prefix), `initialize(p, rng)`;
/// * `forward(p, x, h)`: h (n,D) from x (n,D);
/// * `backward(p, x, dh, dx, dp)`: overwrites dx (n,D), adds to dp.
template <class X>
concept Expert = std::copyable<X> && std::constructible_from<X, Index, const typename X::Config&> &&
    requires(const X& expert, ParameterView<const typename X::Scalar> p, ParameterView<typename X::Scalar> dp,
             RowView<const typename X::Scalar> x, RowView<typename X::Scalar> h) {
  { expert.layout() } -> std::convertible_to<const Layout&>;
  expert.initialize(dp, Rng(0));
  expert.forward(p, x, h);
  expert.backward(p, x, x, h, dp);
};

/// A bank of E equal experts of a user's own, by looping: rows are gathered, experts run in parallel, each on one thread. What
/// an expert throws is thrown to the caller. Tensors: `experts.e.` + the expert's own names.
template <class Expert_>
class ExpertBank {
  static_assert(Expert<Expert_>, "ExpertBank: the type is not an Expert; the requirement that failed is named below");

 public:
  using Scalar = typename Expert_::Scalar;
  using Config = typename Expert_::Config;
  class Tape {
    friend class ExpertBank;
    Buffer<Scalar> rows_;
  };

  ExpertBank(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : model_dim_(model_dim), expert_(model_dim, config) {
    detail::expect_at_least("ExpertBank", "experts", experts, 1);
    detail::expect_at_least("ExpertBank", "model_dim", model_dim, 1);
    for (Index e = 0; e < experts; ++e) {
      offsets_.push_back(layout_.add_part(names.prefix(e), expert_.layout()));
    }
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return Index(offsets_.size()); }
  Index model_dim() const { return model_dim_; }

  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index e = 0; e < experts(); ++e) {
      expert_.initialize(of(p, e), rng.split(std::uint64_t(e)));
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape& tape,
               const Exec& exec) const {
    const RowView<Scalar> x = tape.rows_.matrix(rows.count(), model_dim_);
    exec.parallel_for(experts(), [&](Index e) {
      for (Index r = rows.begin(e); r < rows.begin(e + 1); ++r) {
        std::copy_n(rows.row(r), model_dim_, x.row(r));
      }
      if (rows.count(e) > 0) {
        expert_.forward(of(p, e), part(RowView<const Scalar>(x), rows, e), part(h, rows, e));
      }
    });
  }

  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<const Scalar> dh, RowView<Scalar> drows,
                ParameterView<Scalar> dp, const Tape& tape, Workspace& /*workspace*/, const Exec& exec) const {
    const RowView<const Scalar> x = tape.rows_.view(rows.count(), model_dim_);
    exec.parallel_for(experts(), [&](Index e) {
      if (rows.count(e) > 0) {
        expert_.backward(of(p, e), part(x, rows, e), part(dh, rows, e), part(drows, rows, e), of(dp, e));
      }
    });
  }

 private:
  template <class T>
  ParameterView<T> of(ParameterView<T> p, Index e) const {
    return p.block(offsets_[std::size_t(e)], expert_.layout());
  }
  template <class T>
  static RowView<T> part(RowView<T> m, const GroupedRows<Scalar>& rows, Index e) {
    return m.middle_rows(rows.begin(e), rows.count(e));
  }

  Index model_dim_;
  Expert_ expert_;
  Layout layout_;
  std::vector<Index> offsets_;
};

}  // namespace moxie

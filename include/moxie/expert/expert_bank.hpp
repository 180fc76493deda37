// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <moxie/expert/bank.hpp>
#include <utility>
#include <variant>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

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

/// A bank of experts of a user's own, by looping: rows are gathered, experts run in parallel, each on one thread. What an
/// expert throws is thrown to the caller. Tensors: `experts.e.` + the expert's own names.
///
/// The experts are E equal ones, or one for each config of a list, which may differ in width, or in kind with `OneOfExpert`.
/// Keeps 2RD numbers. Cost: what the experts cost, an expert on one thread.
template <class Expert_>
class ExpertBank {
  static_assert(Expert<Expert_>, "ExpertBank: the type is not an Expert; the requirement that failed is named below");

 public:
  using Scalar = typename Expert_::Scalar;
  using Config = typename Expert_::Config;
  /// The rows, gathered, and the outputs: an expert that is not the library's needs its h for the gradient of a weight.
  struct Tape {
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : x(resource), h(resource) {}
    KeptRows<Scalar> x;
    KeptRows<Scalar> h;
  };

  /// E equal experts. Throws ValueError without experts or width, and what the expert's constructor throws.
  ExpertBank(Index experts, Index model_dim, const Config& config, const BankNames& names = {})
      : ExpertBank(model_dim, equal(experts, config), names) {}

  /// Expert e is made of `configs[e]`. Throws ValueError without experts or width, for two experts under one name (several
  /// without a number), and what the experts' constructors throw.
  ExpertBank(Index model_dim, std::vector<Config> configs, const BankNames& names = {}) : model_dim_(model_dim) {
    detail::expect_at_least("ExpertBank", "experts", Index(configs.size()), 1);
    detail::expect_at_least("ExpertBank", "model_dim", model_dim, 1);
    experts_.reserve(configs.size());
    for (const Config& config : configs) {
      const Expert_& expert = experts_.emplace_back(model_dim, config);
      const auto e = Index(first_.size());
      first_.push_back(layout_.add_part(names.prefix(e), expert.layout(), names.numbered ? e : -1));
    }
  }

  const Layout& layout() const { return layout_; }
  Index experts() const { return Index(experts_.size()); }
  Index model_dim() const { return model_dim_; }
  /// Expert e, 0 to E-1.
  const Expert_& expert(Index e) const { return experts_[std::size_t(e)]; }

  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    for (Index e = 0; e < experts(); ++e) {
      expert(e).initialize(of(p, e), rng.split(std::uint64_t(e)));
    }
  }

  void forward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, RowView<Scalar> h, Tape* keep,
               const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const auto room = [&](KeptRows<Scalar>* kept) {
      return kept != nullptr ? kept->resize(rows.count(), model_dim_)
                             : context.workspace.matrix<Scalar>(rows.count(), model_dim_);
    };
    const RowView<Scalar> x = room(keep != nullptr ? &keep->x : nullptr);
    const RowView<Scalar> out = keep != nullptr ? room(&keep->h) : h;
    context.exec.parallel_for(experts(), [&](Index e) {
      for (Index r = rows.begin(e); r < rows.begin(e + 1); ++r) {
        std::copy_n(rows.row(r), model_dim_, x.row(r));
      }
      if (rows.count(e) > 0) {
        expert(e).forward(of(p, e), part(RowView<const Scalar>(x), rows, e), part(out, rows, e));
      }
      for (Index r = rows.begin(e); keep != nullptr && h.rows() != 0 && r < rows.begin(e + 1); ++r) {
        std::copy_n(out.row(r), model_dim_, h.row(r));
      }
    });
  }

  void backward(ParameterView<const Scalar> p, const GroupedRows<Scalar>& rows, const OutputGradient<Scalar>& dout,
                const BankGradient<Scalar>& into, Tape& tape, const Context& context) const {
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> dh = context.workspace.matrix<Scalar>(rows.count(), model_dim_);
    const RowView<const Scalar> x = tape.x.view();
    const RowView<const Scalar> h = tape.h.view();
    context.exec.parallel_for(experts(), [&](Index e) {
      for (Index r = rows.begin(e); r < rows.begin(e + 1); ++r) {
        const Scalar* const dy = dout.row(r);
        const Scalar weight = dout.factor(r);
        for (Index j = 0; j < model_dim_; ++j) {
          dh(r, j) = weight * dy[j];
        }
        if (dout.dweight != nullptr) {
          dout.dweight[r] = kernel::dot(model_dim_, h.row(r), dy);
        }
      }
      if (rows.count(e) > 0) {
        expert(e).backward(of(p, e), part(x, rows, e), part(RowView<const Scalar>(dh), rows, e), part(into.rows, rows, e),
                           of(into.parameters, e));
      }
    });
  }

 private:
  static std::vector<Config> equal(Index experts, const Config& config) {
    detail::expect_at_least("ExpertBank", "experts", experts, 1);
    return std::vector<Config>(std::size_t(experts), config);
  }
  template <class T>
  ParameterView<T> of(ParameterView<T> p, Index e) const {
    return p.part(first_[std::size_t(e)], expert(e).layout());
  }
  template <class T>
  static RowView<T> part(RowView<T> m, const GroupedRows<Scalar>& rows, Index e) {
    return m.middle_rows(rows.begin(e), rows.count(e));
  }

  Index model_dim_;
  std::vector<Expert_> experts_;
  Layout layout_;
  std::vector<Index> first_;  // the position of each expert's first tensor
};

struct NullConfig {
  bool operator==(const NullConfig&) const = default;
};

/// f(x) = 0: what a token gives to it is left out of its output. MoE++'s zero expert (Jin et al. 2024).
///
/// h (n,D) = 0, dx (n,D) = 0, no parameters. Throws nothing. Cost: nD numbers written.
template <class Scalar_>
class NullExpert {
 public:
  using Scalar = Scalar_;
  using Config = NullConfig;

  NullExpert(Index /*model_dim*/, const Config& /*config*/) {}
  const Layout& layout() const { return layout_; }
  void initialize(ParameterView<Scalar> /*p*/, const Rng& /*rng*/) const {}
  void forward(ParameterView<const Scalar> /*p*/, RowView<const Scalar> /*x*/, RowView<Scalar> h) const {
    detail::fill_rows(h, Scalar(0));
  }
  void backward(ParameterView<const Scalar> /*p*/, RowView<const Scalar> /*x*/, RowView<const Scalar> /*dh*/,
                RowView<Scalar> dx, ParameterView<Scalar> /*dp*/) const {
    detail::fill_rows(dx, Scalar(0));
  }

 private:
  Layout layout_;
};

struct IdentityConfig {
  bool operator==(const IdentityConfig&) const = default;
};

/// f(x) = x: the token itself. MoE++'s copy expert (Jin et al. 2024).
///
/// h (n,D) = x, dx (n,D) = dh, no parameters. Throws nothing. Cost: nD numbers copied.
template <class Scalar_>
class IdentityExpert {
 public:
  using Scalar = Scalar_;
  using Config = IdentityConfig;

  IdentityExpert(Index /*model_dim*/, const Config& /*config*/) {}
  const Layout& layout() const { return layout_; }
  void initialize(ParameterView<Scalar> /*p*/, const Rng& /*rng*/) const {}
  void forward(ParameterView<const Scalar> /*p*/, RowView<const Scalar> x, RowView<Scalar> h) const { detail::copy_rows(x, h); }
  void backward(ParameterView<const Scalar> /*p*/, RowView<const Scalar> /*x*/, RowView<const Scalar> dh, RowView<Scalar> dx,
                ParameterView<Scalar> /*dp*/) const {
    detail::copy_rows(dh, dx);
  }

 private:
  Layout layout_;
};

/// An expert that is one of several kinds, so that a bank can mix them:
///
///     ExpertBank<OneOfExpert<Mine<float>, NullExpert<float>>> bank(D, {MyConfig{8}, MyConfig{4}, NullConfig{}});
///
/// Its config is a `std::variant` of theirs, and it is of the kind that the config's alternative belongs to (by position, so
/// two kinds may have one type of config). Function, adjoint, tensors, what throws and cost are those of that kind.
template <Expert First, Expert... Rest>
class OneOfExpert {
  static_assert((std::is_same_v<typename First::Scalar, typename Rest::Scalar> && ...),
                "OneOfExpert: the kinds must have the same scalar");

 public:
  using Scalar = typename First::Scalar;
  using Config = std::variant<typename First::Config, typename Rest::Config...>;

  OneOfExpert(Index model_dim, const Config& config)
      : expert_(make(model_dim, config, std::index_sequence_for<First, Rest...>{})) {}

  /// The position of its kind among First, Rest...
  std::size_t kind() const { return expert_.index(); }
  const Layout& layout() const {
    return std::visit([](const auto& expert) -> const Layout& { return expert.layout(); }, expert_);
  }
  void initialize(ParameterView<Scalar> p, const Rng& rng) const {
    std::visit([&](const auto& expert) { expert.initialize(p, rng); }, expert_);
  }
  void forward(ParameterView<const Scalar> p, RowView<const Scalar> x, RowView<Scalar> h) const {
    std::visit([&](const auto& expert) { expert.forward(p, x, h); }, expert_);
  }
  void backward(ParameterView<const Scalar> p, RowView<const Scalar> x, RowView<const Scalar> dh, RowView<Scalar> dx,
                ParameterView<Scalar> dp) const {
    std::visit([&](const auto& expert) { expert.backward(p, x, dh, dx, dp); }, expert_);
  }

 private:
  using Kinds = std::variant<First, Rest...>;

  template <std::size_t... Kind>
  static Kinds make(Index model_dim, const Config& config, std::index_sequence<Kind...> /*kinds*/) {
    using Maker = Kinds (*)(Index, const Config&);
    constexpr std::array<Maker, sizeof...(Kind)> makers{
        [](Index dim, const Config& c) { return Kinds(std::in_place_index<Kind>, dim, std::get<Kind>(c)); }...};
    return makers.at(config.index())(model_dim, config);
  }

  Kinds expert_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

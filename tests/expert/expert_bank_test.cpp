// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <expert/bank_checks.hpp>
#include <moxie/expert/expert_bank.hpp>
#include <moxie/expert/glu.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/routing/soft.hpp>
#include <moxie/routing/top_k.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <stdexcept>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Moe;
using moxie::ParameterView;
using moxie::RowView;
using moxie::Tokens;

constexpr Index model_dim = 5;
constexpr Index tokens = 12;
const Exec one_thread{.threads = 1};

// An expert of a user's own: f(x) = a ⊙ x² + b.
template <class S>
class SquareExpert {
 public:
  using Scalar = S;
  struct Config {
    Index throws_at_rows = -1;  // to see what becomes of an exception
  };

  SquareExpert(Index dim, const Config& config) : config_(config) {
    layout_.add("a", {dim});
    layout_.add("b", {dim});
  }
  const moxie::Layout& layout() const { return layout_; }
  void initialize(ParameterView<S> p, const moxie::Rng& rng) const { rng.fill_normal(p["a"]); }
  void forward(ParameterView<const S> p, RowView<const S> x, RowView<S> h) const {
    if (x.rows() == config_.throws_at_rows) {
      throw std::runtime_error("this expert gave up");
    }
    for (Index r = 0; r < x.rows(); ++r) {
      for (Index j = 0; j < x.cols(); ++j) {
        h(r, j) = p["a"](0, j) * x(r, j) * x(r, j) + p["b"](0, j);
      }
    }
  }
  void backward(ParameterView<const S> p, RowView<const S> x, RowView<const S> dh, RowView<S> dx, ParameterView<S> dp) const {
    for (Index r = 0; r < x.rows(); ++r) {
      for (Index j = 0; j < x.cols(); ++j) {
        dx(r, j) = 2 * dh(r, j) * p["a"](0, j) * x(r, j);
        dp["a"](0, j) += dh(r, j) * x(r, j) * x(r, j);
        dp["b"](0, j) += dh(r, j);
      }
    }
  }

 private:
  Config config_;
  moxie::Layout layout_;
};

// An expert with a width: f(x) = (x Wᵀ)² W, the square element by element, W (H,D).
template <class S>
class WideExpert {
 public:
  using Scalar = S;
  using Config = moxie::HiddenConfig;

  WideExpert(Index dim, const Config& config) { layout_.add("w", {config.hidden_dim, dim}); }
  const moxie::Layout& layout() const { return layout_; }
  void initialize(ParameterView<S> p, const moxie::Rng& rng) const { rng.fill_normal(p["w"]); }
  void forward(ParameterView<const S> p, RowView<const S> x, RowView<S> h) const {
    const RowView<const S> w = p["w"];
    h.eigen().setZero();
    for (Index r = 0; r < x.rows(); ++r) {
      for (Index i = 0; i < w.rows(); ++i) {
        const S a = dot(w, i, x, r);
        for (Index j = 0; j < w.cols(); ++j) {
          h(r, j) += a * a * w(i, j);
        }
      }
    }
  }
  void backward(ParameterView<const S> p, RowView<const S> x, RowView<const S> dh, RowView<S> dx, ParameterView<S> dp) const {
    const RowView<const S> w = p["w"];
    const RowView<S> dw = dp["w"];
    dx.eigen().setZero();
    for (Index r = 0; r < x.rows(); ++r) {
      for (Index i = 0; i < w.rows(); ++i) {
        const S a = dot(w, i, x, r);
        const S da = 2 * a * dot(w, i, dh, r);
        for (Index j = 0; j < w.cols(); ++j) {
          dx(r, j) += da * w(i, j);
          dw(i, j) += da * x(r, j) + a * a * dh(r, j);
        }
      }
    }
  }

 private:
  // Row by row, in order: Eigen's products would give a row other bits next to other rows.
  static S dot(RowView<const S> w, Index i, RowView<const S> x, Index r) {
    S sum = 0;
    for (Index j = 0; j < w.cols(); ++j) {
      sum += w(i, j) * x(r, j);
    }
    return sum;
  }

  moxie::Layout layout_;
};

static_assert(moxie::Expert<SquareExpert<float>>);
static_assert(moxie::Expert<moxie::NullExpert<float>>);
static_assert(moxie::Expert<moxie::IdentityExpert<double>>);
static_assert(moxie::Expert<moxie::OneOfExpert<WideExpert<float>, moxie::NullExpert<float>>>);
static_assert(moxie::Bank<moxie::ExpertBank<SquareExpert<float>>>);
static_assert(!moxie::Bank<moxie::TopKRouter<float>>);
static_assert(!moxie::Expert<moxie::SwiGluExperts<float>>);

template <class S>
using Square = moxie::ExpertBank<SquareExpert<S>>;

template <class S>
using Wide = moxie::ExpertBank<WideExpert<S>>;

// Two widths, nothing, and what comes in.
template <class S>
using Mixed = moxie::ExpertBank<moxie::OneOfExpert<WideExpert<S>, moxie::NullExpert<S>, moxie::IdentityExpert<S>>>;
constexpr moxie::HiddenConfig narrow{3};
constexpr moxie::HiddenConfig wide{9};
template <class S>
Mixed<S> mixed() {
  return Mixed<S>(model_dim, {wide, narrow, moxie::IdentityConfig{}, moxie::NullConfig{}});
}

template <class Layer>
void check_gradients(const Layer& layer, const Tokens<double>& in) {
  const Matrix<double> dy = moxie::test::random<double>(in.x.rows(), in.x.cols(), 73);
  for (const auto& report : moxie::testing::check_layer_gradients(layer, in, dy, one_thread)) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE_TEMPLATE("expert bank: an expert of a user's own keeps the laws of banks", S, float, double) {
  for (const auto& law : moxie::testing::check_bank_laws(Square<S>(4, model_dim, {}))) {
    INFO(law.message);
    CHECK(law.holds);
  }
}

TEST_CASE("expert bank: in a sparse layer, shared too, the gradients are right") {
  Moe layer(moxie::TopKRouter<double>({.model_dim = model_dim, .experts = 4, .top_k = 2}), Square<double>(4, model_dim, {}),
            std::optional(Square<double>(1, model_dim, {}, {"shared", false})));
  moxie::test::randomize(layer.parameters(), 75);
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 74);
  check_gradients(layer, Tokens<double>{x});
}

TEST_CASE("expert bank: in a dense layer the gradients are right") {
  Moe layer(moxie::SoftRouter<double>({.model_dim = model_dim, .experts = 3, .slots_per_expert = 2}),
            Square<double>(3, model_dim, {}));
  moxie::test::randomize(layer.parameters(), 78);
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 79);
  check_gradients(layer, Tokens<double>{x, 4});
}

TEST_CASE("expert bank: what an expert throws arrives, from any number of threads, and y stays as it was") {
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 80);
  for (const int threads : {1, 2, 7}) {
    for (const Index rows : {tokens, tokens + 1}) {  // with K = E = 3 each expert gets all tokens
      Moe<moxie::TopKRouter<float>, Square<float>> layer(
          moxie::TopKRouter<float>({.model_dim = model_dim, .experts = 3, .top_k = 3}), Square<float>(3, model_dim, {rows}));
      layer.initialize(moxie::Rng(1));
      Matrix<float> y = moxie::test::untouched<float>(tokens, model_dim);
      auto tape = layer.make_tape();
      auto grads = layer.parameters().zeros_like();
      if (rows == tokens) {
        CHECK_THROWS_WITH_AS(layer.forward(x, y, tape, Exec{threads}), "this expert gave up", std::runtime_error);
        CHECK(moxie::test::is_untouched(y));
        // No forward was completed, so there is nothing to go back from.
        CHECK_THROWS_AS(layer.backward(x, x, y, grads, tape, Exec{threads}), moxie::ValueError);
      } else {
        CHECK_NOTHROW(layer.forward(x, y, tape, Exec{threads}));
      }
    }
  }
}

TEST_CASE("expert bank: computes each row with the parameters of its expert") {
  const Square<double> bank(2, model_dim, {});
  moxie::Parameters<double> p{moxie::Layout(bank.layout())};
  moxie::test::randomize(p, 76);
  const Matrix<double> x = moxie::test::random<double>(6, model_dim, 77);
  const Index starts[] = {0, 2, 4};
  const Index index[] = {5, 0, 3, 3};  // rows are gathered
  Matrix<double> h(4, model_dim);
  moxie::Workspace workspace;
  bank.forward(p.view(), moxie::GroupedRows<double>{starts, x, index}, h, nullptr, {workspace, one_thread});
  for (Index r = 0; r < 4; ++r) {
    const std::string name = "experts." + std::to_string(r / 2) + ".";
    for (Index j = 0; j < model_dim; ++j) {
      CHECK(h(r, j) == p[name + "a"](0, j) * x(index[r], j) * x(index[r], j) + p[name + "b"](0, j));
    }
  }
}

TEST_CASE("expert bank: names are the expert's own with the bank's in front") {
  const Square<double> bank(2, model_dim, {});
  CHECK(bank.layout().find("experts.1.b") == 3);
  const Square<double> shared(1, model_dim, {}, {"shared", false});
  CHECK(shared.layout().find("shared.a") == 0);
  CHECK(bank.experts() == 2);
  CHECK(bank.model_dim() == model_dim);
}

TEST_CASE("expert bank: no experts or no width is refused") {
  CHECK_THROWS_AS(Square<float>(0, model_dim, {}), moxie::ValueError);
  CHECK_THROWS_AS(Square<float>(1, 0, {}), moxie::ValueError);
  CHECK_THROWS_AS(Wide<float>(model_dim, {}), moxie::ValueError);
  CHECK_THROWS_AS(Wide<float>(0, {narrow, wide}), moxie::ValueError);
  CHECK_THROWS_AS(Wide<float>(model_dim, {narrow, wide}, {"one", false}), moxie::ValueError);  // two under one name
}

TEST_CASE("expert bank: a list of equal configs is the bank of equal experts") {
  const Wide<double> equal(3, model_dim, wide);
  const Wide<double> listed(model_dim, {wide, wide, wide});
  moxie::Parameters<double> p{moxie::Layout(equal.layout())};
  moxie::Parameters<double> q{moxie::Layout(listed.layout())};
  equal.initialize(p, moxie::Rng(3));
  listed.initialize(q, moxie::Rng(3));
  moxie::zip([](const auto&, auto a, auto b) { CHECK(a.eigen() == b.eigen()); }, p, q);
  CHECK(p["experts.0.w"].eigen() != p["experts.1.w"].eigen());
}

TEST_CASE("expert bank: experts of different widths and kinds have their own tensors") {
  const Mixed<float> bank = mixed<float>();
  REQUIRE(bank.experts() == 4);
  REQUIRE(bank.layout().tensors().size() == 2);
  CHECK(bank.layout().tensors()[0].name == "experts.0.w");
  CHECK(bank.layout().tensors()[0].shape == std::vector<Index>{wide.hidden_dim, model_dim});
  CHECK(bank.layout().tensors()[1].shape == std::vector<Index>{narrow.hidden_dim, model_dim});
  CHECK(bank.layout().parameter_count() == (wide.hidden_dim + narrow.hidden_dim) * model_dim);
  CHECK(bank.expert(1).kind() == 0);
  CHECK(bank.expert(2).kind() == 2);
  CHECK(bank.expert(3).kind() == 1);
}

TEST_CASE_TEMPLATE("expert bank: unequal experts compute what each of them computes", S, float, double) {
  namespace reference = moxie::test::reference;
  moxie::test::bank::check_forward(mixed<S>(), [](const auto& p, const std::string& name, const reference::Vector& x) {
    if (name == "experts.2." || name == "experts.3.") {
      return reference::Vector((name == "experts.2." ? 1 : 0) * x);
    }
    const Matrix<double> w = reference::tensor(p, name + "w");
    return reference::Vector(w.transpose() * (w * x).cwiseAbs2());
  });
}

TEST_CASE("expert bank: the backward of unequal experts matches central differences") {
  moxie::test::bank::check_backward(mixed<double>());
  moxie::test::bank::check_backward(Wide<double>(model_dim, {narrow, wide, wide, narrow}));
}

TEST_CASE_TEMPLATE("expert bank: unequal experts keep the laws of banks", S, float, double) {
  moxie::test::bank::check_laws(mixed<S>());
  moxie::test::bank::check_laws(Wide<S>(model_dim, {narrow, wide}));
  moxie::test::bank::check_laws(moxie::ExpertBank<moxie::NullExpert<S>>(2, model_dim, {}));  // without any parameter
}

TEST_CASE("expert bank: with unequal experts the gradients of a layer are right") {
  Moe layer(moxie::TopKRouter<double>({.model_dim = model_dim, .experts = 4, .top_k = 2}), mixed<double>());
  moxie::test::randomize(layer.parameters(), 81);
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 82);
  check_gradients(layer, Tokens<double>{x});
}

TEST_CASE("null expert: writes zeros over what was there; identity expert: copies x and dh") {
  const Matrix<float> x = moxie::test::random<float>(tokens, model_dim, 83);
  const Matrix<float> dh = moxie::test::random<float>(tokens, model_dim, 84);
  const moxie::Layout none;
  const ParameterView<float> p = moxie::ParameterTable<float>(none, nullptr).view();
  Matrix<float> h = moxie::test::untouched<float>(tokens, model_dim);
  Matrix<float> dx = h;
  const moxie::NullExpert<float> null(model_dim, {});
  null.forward(p, x, h);
  null.backward(p, x, dh, dx, p);
  CHECK(h.isZero(0));
  CHECK(dx.isZero(0));
  const moxie::IdentityExpert<float> identity(model_dim, {});
  identity.forward(p, x, h);
  identity.backward(p, x, dh, dx, p);
  CHECK(moxie::test::same_bits(h, x));
  CHECK(moxie::test::same_bits(dx, dh));
  CHECK(null.layout().size() + identity.layout().size() == 0);
}

// Has the config of the null expert, and passes what comes in.
struct Passing : moxie::IdentityExpert<double> {
  using Config = moxie::NullConfig;
  Passing(Index dim, const Config& /*config*/) : IdentityExpert(dim, {}) {}
};

TEST_CASE("one-of expert: the position of the config decides, where two kinds have one type of config") {
  using Either = moxie::OneOfExpert<moxie::NullExpert<double>, Passing>;
  CHECK(Either(model_dim, Either::Config(std::in_place_index<0>)).kind() == 0);
  CHECK(Either(model_dim, Either::Config(std::in_place_index<1>)).kind() == 1);
}

// A configuration that cannot be compared, as a user's may be, in a layer of one of several kinds of expert.
struct Incomparable {
  Index unused = 0;
};
struct CopyingExpert : moxie::IdentityExpert<float> {
  using Config = Incomparable;
  CopyingExpert(Index width, const Config& /*config*/) : moxie::IdentityExpert<float>(width, {}) {}
};

TEST_CASE("one of several kinds: a named layer takes it, whatever its configuration is") {
  using Experts = moxie::ExpertBank<moxie::OneOfExpert<CopyingExpert, moxie::NullExpert<float>>>;
  moxie::TopKMoE<float, Experts> layer({.model_dim = 4, .experts = 3, .top_k = 3, .normalize = true});
  layer.initialize(moxie::Rng{1});
  const Matrix<float> x = moxie::test::random<float>(5, 4, 999);
  Matrix<float> y(5, 4);
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  CHECK(moxie::test::relative_error(y, x) < moxie::test::Tolerance<float>::layer);
}

}  // namespace

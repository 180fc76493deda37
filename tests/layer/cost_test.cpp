// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/cost.hpp>
#include <moxie/moxie.hpp>
#include <support.hpp>

namespace {

using moxie::Cost;
using moxie::Index;
using moxie::Matrix;
using moxie::Tokens;

constexpr Index dim = 5, experts = 4, hidden = 7, tokens = 12;
using Experts = moxie::SwiGluExperts<float>;

/// n products of a row and a matrix of one element: backward has two for each.
Cost products(double n) { return {n, 2 * n}; }
/// The same of 3 D H elements.
Cost swiglu(double rows) { return products(rows * 3 * dim * hidden); }

/// A bank that counts for itself.
struct CountingBank : Experts {
  using Experts::Experts;
  Cost multiply_adds(std::span<const Index> starts) const { return {double(starts.back()), 0}; }
};

struct UnevenConfig {
  Index width = 0;
};
/// f(x) = u ⟨w, x⟩ with a matrix of `width` rows that it multiplies.
class UnevenExpert {
 public:
  using Scalar = float;
  using Config = UnevenConfig;
  UnevenExpert(Index model_dim, const Config& config) {
    layout_.add("weight", {config.width, model_dim});
    layout_.add("bias", {model_dim});  // a vector is no product
  }
  const moxie::Layout& layout() const { return layout_; }
  void initialize(moxie::ParameterView<float> /*p*/, const moxie::Rng& /*rng*/) const {}
  void forward(moxie::ParameterView<const float> /*p*/, moxie::RowView<const float> /*x*/, moxie::RowView<float> /*h*/) const {}
  void backward(moxie::ParameterView<const float> /*p*/, moxie::RowView<const float> /*x*/, moxie::RowView<const float> /*dh*/,
                moxie::RowView<float> /*dx*/, moxie::ParameterView<float> /*dp*/) const {}

 private:
  moxie::Layout layout_;
};

TEST_CASE("cost: adds up, and is multiplied") {
  CHECK(Cost{1, 2} + Cost{3, 5} == Cost{4, 7});
  CHECK(3 * Cost{1, 2} == Cost{3, 6});
}

TEST_CASE("cost of banks: every row meets the matrices of its expert once, and twice backward") {
  const std::vector<Index> starts{0, 3, 3, 4, 10};
  const std::vector<Index> none{0, 0, 0, 0, 0};
  const auto check = [&](const auto& bank, double elements) {
    CHECK(multiply_adds(bank, starts) == products(10 * elements));
    CHECK(multiply_adds(bank, Index{10}) == products(10 * elements));
    CHECK(multiply_adds(bank, Index{11}) == products(11 * elements));  // no multiple of the experts
    CHECK(multiply_adds(bank, none) == Cost{});
  };
  check(Experts(experts, dim, {hidden}), 3 * dim * hidden);
  check(moxie::GeluTanhExperts<double>(experts, dim, {hidden}), 2 * dim * hidden);
  check(moxie::LinearExperts<float>(experts, dim), dim * dim);
  check(moxie::ExpertBank<moxie::IdentityExpert<float>>(experts, dim, {}), 0);
  CHECK(multiply_adds(Experts(1, dim, {hidden}, {"shared_experts", false}), Index{9}) == swiglu(9));
}

TEST_CASE("cost of banks: unequal experts, and a bank that counts for itself") {
  const moxie::ExpertBank<UnevenExpert> bank(dim, std::vector<UnevenConfig>{{1}, {2}, {4}, {9}});
  CHECK(multiply_adds(bank, std::vector<Index>{0, 1, 3, 6, 10}) == products(dim * (1 * 1 + 2 * 2 + 3 * 4 + 4 * 9)));
  CHECK(multiply_adds(bank, Index{8}) == products(dim * 2 * (1 + 2 + 4 + 9)));  // two rows for each
  CHECK(multiply_adds(CountingBank(experts, dim, {hidden}), Index{8}) == Cost{8, 0});
}

/// Checks a layer's cost before a forward and of its tape: the gate's products, those of the rows, and of the exchange.
template <class Layer>
void check_cost(const Layer& made, const Tokens<float>& in, double rows, const Cost& rest, bool known = true) {
  Layer layer = made;
  moxie::test::randomize(layer.parameters(), 1);
  auto tape = layer.make_tape();
  CHECK(layer.multiply_adds(tape) == Cost{});
  Matrix<float> y(in.count(), dim);
  layer.forward(in, y, tape);
  CHECK(double(tape.plan().rows()) == rows);
  CHECK(layer.multiply_adds(tape) == swiglu(rows) + rest);
  if (known) {
    CHECK(layer.multiply_adds(in.count(), in.sequences) == swiglu(rows) + rest);
  }
  auto inference = layer.make_tape();
  layer.forward(layer.freeze(), in, y, inference);
  CHECK(layer.multiply_adds(inference) == layer.multiply_adds(tape));
}

TEST_CASE("cost of layers: by hand, for every router, and the rows that a plan has") {
  using moxie::Moe;
  const Experts bank(experts, dim, {hidden});
  const Matrix<float> x = moxie::test::random<float>(tokens, dim, 2);
  const Matrix<float> condition = moxie::test::random<float>(3, 2, 3);
  const std::vector<std::int64_t> ids(std::size_t(tokens), 17);
  const Matrix<Index> chosen = Matrix<Index>::Constant(tokens, 1, 2);
  const Matrix<float> weight = Matrix<float>::Constant(tokens, 1, 1);
  Tokens<float> in(x, 4);  // three sequences
  in.condition = condition;
  in.ids = ids;
  const Cost gate = products(tokens * experts * dim);

  check_cost(moxie::TopKMoE<float>({.model_dim = dim, .experts = experts, .top_k = 3, .expert = {hidden}}), in, 3 * tokens,
             gate);
  check_cost(moxie::SharedExpertMoE<float>(
                 {.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}, .shared = {2 * hidden}}),
             in, 2 * tokens, gate + swiglu(2 * tokens));
  // Of 4 tokens each expert takes ⌈4 * 1.1 / 4⌉ = 2: not 13.2 rows, but 24.
  check_cost(
      moxie::ExpertChoiceMoE<float>({.model_dim = dim, .experts = experts, .expert = {hidden}, .capacity = {.factor = 1.1}}),
      in, 3 * experts * 2, gate);
  // Three sequences of 4 * 2 slots; logits, dispatch and combine.
  check_cost(moxie::SoftMoE<float, Experts>({.model_dim = dim, .experts = experts, .slots_per_expert = 2, .expert = {hidden}}),
             in, 3 * experts * 2, products(3 * tokens * 2 * experts * dim));
  check_cost(moxie::SoftMoE<float, Experts>({.model_dim = dim,
                                             .experts = experts,
                                             .expert = {hidden},
                                             .dispatch = moxie::Mixing::uniform,
                                             .combine = moxie::Mixing::uniform}),
             in, 3 * experts, products(2 * tokens * experts * dim));
  check_cost(moxie::TimestepMoE<float, Experts>(
                 {.model_dim = dim, .condition_dim = 2, .experts = experts, .top_k = 2, .expert = {hidden}}),
             in, 2 * tokens, products(3 * 2 * experts));
  check_cost(Moe(moxie::ClusterRouter<float>({.feature_dim = 2, .experts = experts, .top_k = 2}), bank), in, 2 * tokens,
             {3. * 2 * experts, 0});
  check_cost(Moe(moxie::ClusterRouter<float>({.feature_dim = dim, .experts = experts, .of_tokens = true}), bank), in, tokens,
             {double(tokens * dim * experts), 0});
  check_cost(Moe(moxie::HashRouter<float>({.experts = experts}), bank), in, tokens, {});
  check_cost(Moe(moxie::TopPRouter<float>({.model_dim = dim, .experts = experts, .top_p = 1, .most = 2}), bank), in, 2 * tokens,
             gate);
  in.chosen = chosen;
  in.weight = weight;
  const Moe given(moxie::GivenRouter<float>({.experts = experts}), bank);
  check_cost(given, in, tokens, {}, false);
  CHECK_THROWS_AS(given.multiply_adds(tokens), moxie::ValueError);  // only the call knows K
}

TEST_CASE("cost of layers: a gate of another width, ragged and masked sequences") {
  moxie::TopKMoE<float> layer({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}, .gate_dim = 3});
  CHECK(layer.multiply_adds(tokens) == swiglu(2 * tokens) + products(tokens * experts * 3));

  const std::vector<Index> ragged{0, 5, 5, 6, 12};
  moxie::SoftMoE<float, Experts> soft({.model_dim = dim, .experts = experts, .slots_per_expert = 3, .expert = {hidden}});
  const Matrix<float> x = moxie::test::random<float>(tokens, dim, 4);
  // A sequence without tokens has slots, which the experts compute.
  check_cost(soft, Tokens<float>(x, ragged), 4 * 3 * experts, products(3 * tokens * 3 * experts * dim));

  moxie::ExpertChoiceMoE<float> choice({.model_dim = dim, .experts = experts, .expert = {hidden}, .capacity = {.factor = 2}});
  // ⌈5 * 2 / 4⌉ = 3, none, 1, ⌈6 * 2 / 4⌉ = 3.
  check_cost(choice, Tokens<float>(x, ragged), experts * (3 + 1 + 3), products(tokens * experts * dim));

  std::vector<std::uint8_t> mask(std::size_t(tokens), 1);
  mask[0] = mask[7] = 0;
  Tokens<float> in(x);
  in.mask = mask;
  moxie::TopKMoE<float> plain({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}});
  moxie::test::randomize(plain.parameters(), 5);
  Matrix<float> y(tokens, dim);
  auto tape = plain.make_tape();
  plain.forward(in, y, tape);
  CHECK(plain.multiply_adds(tape) == plain.multiply_adds(tokens - 2));
  CHECK(plain.multiply_adds(Index{0}) == Cost{});
  CHECK_THROWS_AS(plain.multiply_adds(10, 4), moxie::ShapeError);
  CHECK_THROWS_AS(plain.multiply_adds(-1), moxie::ValueError);
}

TEST_CASE("cost of layers: with a capacity and with top-p, a plan has at most the rows that are promised") {
  // Equal tokens: all choose the same experts, which have no room for them.
  const Matrix<float> x = moxie::test::random<float>(1, dim, 6).replicate(tokens, 1);
  const auto check = [&](auto layer, const moxie::Sequences& division, Index promised) {
    moxie::test::randomize(layer.parameters(), 7, 3);
    const Tokens<float> in(x, division);
    Matrix<float> y(tokens, dim);
    auto tape = layer.make_tape();
    layer.forward(in, y, tape);
    CHECK(layer.router().most_rows(in.sequences) == promised);
    CHECK(tape.plan().rows() < promised);
    CHECK(layer.multiply_adds(tape).forward < layer.multiply_adds(tokens, division).forward);
  };
  const auto limited = [&](moxie::Capacity capacity) {
    return moxie::TopKMoE<float>({.model_dim = dim, .experts = experts, .top_k = 2, .expert = {hidden}, .capacity = capacity});
  };
  check(limited({.factor = 0.7}), 4, 3 * experts * 2);                              // ⌈8 * 0.7 / 4⌉ = 2
  check(limited({.factor = 0.7, .group = moxie::Grouping::call}), 4, experts * 5);  // ⌈24 * 0.7 / 4⌉ = 5
  check(limited({.factor = 1.5}), 4, 2 * tokens);                                   // room for more than there are
  check(moxie::Moe(moxie::TopPRouter<float>({.model_dim = dim, .experts = experts, .top_p = 0.5}),
                   Experts(experts, dim, {hidden})),
        0, experts * tokens);
}

}  // namespace

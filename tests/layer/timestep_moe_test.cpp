// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/expert/mlp.hpp>
#include <moxie/layer/timestep_moe.hpp>
#include <moxie/loss/diffusion_prior.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::TimestepMoE;
using moxie::Tokens;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

constexpr Index model_dim = 5;
constexpr Index condition_dim = 6;
constexpr Index tokens = 12;
const Exec one_thread{.threads = 1};

struct Mode {
  std::string name;
  Index experts;
  Index top_k;
  bool bias;
};
const Mode modes[] = {
    {"top 1", 4, 1, true},       {"top 2", 3, 2, true},      {"top 3 without biases", 7, 3, false},
    {"all experts", 4, 4, true}, {"one expert", 1, 1, true},
};

// Sequences of 5, 0, 1, 4 and 2 tokens.
const std::vector<Index> ragged{0, 5, 5, 6, 10, 12};
const moxie::Sequences divisions[] = {moxie::Sequences(), moxie::Sequences(4), moxie::Sequences(ragged)};

template <class S>
TimestepMoE<S> make(const Mode& mode) {
  TimestepMoE<S> layer({.model_dim = model_dim,
                        .condition_dim = condition_dim,
                        .experts = mode.experts,
                        .top_k = mode.top_k,
                        .expert = {.bias = mode.bias}});
  moxie::test::randomize(layer.parameters(), 651);
  return layer;
}

// Tokens with a condition, random and owned.
template <class S>
struct Batch {
  Matrix<S> x, condition;
  Tokens<S> in;

  explicit Batch(const moxie::Sequences& division, std::uint64_t seed = 652)
      : x(moxie::test::random<S>(tokens, model_dim, seed)),
        condition(moxie::test::random<S>(division.over(tokens).count(), condition_dim, seed + 1)),
        in(x, division) {
    in.condition = condition;
  }
};

TEST_CASE_TEMPLATE("timestep layer: y is the weighted sum of the experts that the sequence's condition chose", S, float,
                   double) {
  for (const Mode& mode : modes) {
    for (const moxie::Sequences& division : divisions) {
      CAPTURE(mode.name);
      const auto layer = make<S>(mode);
      const Batch<S> batch(division);
      Matrix<S> y = moxie::test::untouched<S>(tokens, model_dim);
      auto tape = layer.make_tape(tokens);
      layer.forward(batch.in, y, tape);

      const moxie::Parameters<double> p = moxie::test::as_double(layer.parameters());
      Matrix<double> weights = Matrix<double>::Zero(tokens, mode.experts);
      batch.in.sequences.for_each([&](Index b, Index begin, Index end) {
        const reference::Vector c = batch.condition.row(b).template cast<double>().transpose().unaryExpr(&reference::silu);
        const reference::Vector s =
            reference::softmax(reference::tensor(p, "gate.weight") * c + reference::vector(p, "gate.bias"));
        for (Index t = begin; t < end; ++t) {
          for (const Index e : reference::top_k(s, mode.top_k)) {
            weights(t, e) = s(e);
          }
        }
      });
      const Matrix<double> expected =
          reference::mixture(moxie::test::as_double(batch.x), weights, [&](Index e, const reference::Vector& v) {
            const std::string expert = "experts." + std::to_string(e) + ".";
            reference::Vector out = reference::tensor(p, expert + "weight") * v;
            return mode.bias ? reference::Vector(out + reference::vector(p, expert + "bias")) : out;
          });
      CHECK(moxie::test::relative_error(y, expected) < Tolerance<S>::layer);
    }
  }
}

TEST_CASE("timestep layer: all gradients match central differences, the condition's too") {
  const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 654);
  for (const Mode& mode : modes) {
    for (const moxie::Sequences& division : divisions) {
      CAPTURE(mode.name);
      const Batch<double> batch(division);
      const auto reports = moxie::testing::check_layer_gradients(make<double>(mode), batch.in, dy, one_thread);
      CHECK(reports.size() >= 5);
      CHECK(reports[1].tensor == "condition");
      for (const auto& report : reports) {
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      }
    }
  }
}

TEST_CASE("timestep layer: gradients are right under a mask and with other experts") {
  const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 655);
  Batch<double> batch{moxie::Sequences(ragged)};
  const std::vector<std::uint8_t> mask{1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1};  // nothing is left of the third sequence
  batch.in.mask = mask;
  for (const auto& report : moxie::testing::check_layer_gradients(make<double>(modes[1]), batch.in, dy, one_thread)) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
  TimestepMoE<double, moxie::GeluTanhExperts<double>> layer(
      {.model_dim = model_dim, .condition_dim = condition_dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = 7}});
  moxie::test::randomize(layer.parameters(), 656);
  for (const auto& report : moxie::testing::check_layer_gradients(layer, batch.in, dy, one_thread)) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE_TEMPLATE("timestep layer: keeps the laws in every mode", S, float, double) {
  moxie::testing::LawOptions options;
  options.allocations = [] { return moxie::test::allocation_count.load(); };
  for (const Mode& mode : modes) {
    for (const moxie::Sequences& division : divisions) {
      CAPTURE(mode.name);
      const Batch<S> batch(division);
      for (const auto& law : moxie::testing::check_layer_laws(make<S>(mode), batch.in, options)) {
        INFO(law.message);
        CHECK(law.holds);
      }
    }
  }
}

TEST_CASE("timestep layer: all tokens of a sequence share experts, masked ones take no part") {
  const auto layer = make<double>(modes[1]);
  Batch<double> batch{moxie::Sequences(ragged)};
  const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0};
  batch.in.mask = mask;
  Matrix<double> y(tokens, model_dim);
  auto tape = layer.make_tape();
  layer.forward(batch.in, y, tape);
  const auto& plan = tape.plan();
  CHECK(plan.tokens() == 9);
  std::vector<Index> sequence_of;
  batch.in.sequences.for_each(
      [&](Index b, Index begin, Index end) { sequence_of.insert(sequence_of.end(), std::size_t(end - begin), b); });
  for (Index t = 0; t < plan.tokens(); ++t) {
    const Index b = sequence_of[std::size_t(tape.row(t))];
    Index k = 0;
    for (const Index r : plan.rows_of_token(t)) {
      const Index expert = tape.router().choices()[std::size_t(2 * b + k++)];
      CHECK(r >= plan.expert_starts()[std::size_t(expert)]);
      CHECK(r < plan.expert_starts()[std::size_t(expert) + 1]);
    }
    CHECK(k == 2);
  }
  CHECK(y.row(2).isZero(0));
  CHECK_FALSE(y.row(3).isZero(0));
}

TEST_CASE("timestep layer: what the tokens hold does not change the routing") {
  const auto layer = make<double>(modes[2]);
  Batch<double> batch{moxie::Sequences(4)};
  Matrix<double> y(tokens, model_dim);
  auto a = layer.make_tape();
  auto b = layer.make_tape();
  layer.forward(batch.in, y, a);
  batch.x *= -3;
  layer.forward(batch.in, y, b);
  CHECK(moxie::testing::detail::same_bits<double>(a.router().scores(), b.router().scores()));
  CHECK(std::ranges::equal(a.plan().token(), b.plan().token()));
}

TEST_CASE("timestep layer: the gradient of a loss on the logits is added, to gate and condition alone") {
  const auto layer = make<double>(modes[1]);
  const Matrix<double> dy = moxie::test::random<double>(tokens, model_dim, 657);
  const Batch<double> batch{moxie::Sequences(ragged)};
  const Matrix<double> dlogits = moxie::test::random<double>(5, 3, 658);
  const auto run = [&](const Matrix<double>& of_y, bool of_logits) {
    moxie::testing::detail::Step<double> s{Matrix<double>(tokens, model_dim), Matrix<double>(tokens, model_dim),
                                           Matrix<double>(5, condition_dim), layer.parameters().zeros_like(), 0};
    auto tape = layer.make_tape();
    layer.forward(batch.in, s.y, tape);
    layer.backward(batch.in, {of_y, of_logits ? RowView<const double>(dlogits) : RowView<const double>()}, {s.dx, s.dcondition},
                   s.grads, tape);
    return s;
  };
  const auto both = run(dy, true);
  const auto of_y = run(dy, false);
  const auto of_logits = run(Matrix<double>::Zero(tokens, model_dim), true);
  CHECK(of_logits.dx.isZero(0));
  CHECK(moxie::test::same_bits(both.dx, of_y.dx));
  CHECK(moxie::test::relative_error(both.dcondition, Matrix<double>(of_y.dcondition + of_logits.dcondition)) < 1e-14);
  CHECK((of_logits.dcondition.array() != 0).any());
  moxie::zip(
      [&](const moxie::TensorInfo& info, auto sum, auto a, auto b) {
        CAPTURE(info.name);
        CHECK((sum.eigen() - a.eigen() - b.eigen()).cwiseAbs().maxCoeff() < 1e-13);
        CHECK((b.eigen().array() != 0).any() == info.name.starts_with("gate"));
      },
      both.grads, of_y.grads, of_logits.grads);
}

// Two blocks of Switch-DiT without the transformer in them, and the diffusion prior loss of both.
struct TwoBlocks {
  static constexpr Index timesteps = 10, experts = 3, top_k = 2, blocks = 2, length = 4;
  TimestepMoE<double> layers[blocks] = {make<double>(modes[1]), make<double>(modes[1])};
  Matrix<double> embedding = moxie::test::random<double>(timesteps, condition_dim, 661);  // of every timestep
  std::vector<Index> timestep{7, 0, 3};
  Matrix<std::uint8_t> mapping = moxie::unit_mapping(timesteps, blocks* experts, double(top_k) / double(experts));
  std::vector<Index> pair = {};
  Matrix<double> dcondition = {};
  std::vector<moxie::Parameters<double>> grads = {};

  TwoBlocks() { moxie::test::randomize(layers[1].parameters(), 662); }

  Matrix<double> condition() const {
    Matrix<double> c(Index(timestep.size()), condition_dim);
    for (std::size_t b = 0; b < timestep.size(); ++b) {
      c.row(Index(b)) = embedding.row(timestep[b]);
    }
    return c;
  }

  void match() {
    // [matching]
    moxie::Matrix<std::uint8_t> chosen(timesteps, blocks * experts);
    const std::vector<Index> empty(timesteps + 1, 0);  // one sequence for each timestep, without tokens
    Matrix<double> none(0, model_dim), no_output(0, model_dim);
    Tokens<double> all(none, empty);
    all.condition = embedding;  // (timesteps,C)
    for (Index l = 0; l < blocks; ++l) {
      auto tape = layers[l].make_tape();
      layers[l].forward(all, no_output, tape);
      moxie::mark_chosen_units(tape.router().choices(), experts, l * experts, chosen);
    }
    pair = moxie::match_units(chosen, mapping).column;
    // [matching]
  }

  // ⟨out, dout⟩ + weight · prior loss, and its gradients.
  double step(const Matrix<double>& x, const Matrix<double>& dout, double weight) {
    const Matrix<double> c = condition();
    decltype(layers[0].make_tape()) tapes[blocks];
    Matrix<double> y[blocks], r[blocks], out = x;
    Matrix<double> inputs[blocks];
    Matrix<double> probabilities(c.rows(), blocks * experts);
    for (Index l = 0; l < blocks; ++l) {
      inputs[l] = out;
      y[l].resizeLike(x);
      r[l].resizeLike(x);
      Tokens<double> in(inputs[l], length);
      in.condition = c;
      // [block forward]
      layers[l].forward(in, y[l], tapes[l]);
      moxie::timestep_mask<double>(in.x, y[l], r[l]);
      r[l] = r[l].array().sin().matrix();  // the transformer block would stand here
      out = r[l] - in.x.eigen().cwiseProduct(y[l]);
      probabilities.middleCols(l * experts, experts) = tapes[l].router().scores().eigen();
      // [block forward]
    }
    // [prior]
    const moxie::DiffusionPrior prior{.blocks = blocks, .mapping = mapping, .prior_of_unit = pair};
    const double loss = moxie::diffusion_prior_loss<double>(probabilities, timestep, prior);
    Matrix<double> dprobabilities = Matrix<double>::Zero(probabilities.rows(), probabilities.cols());
    moxie::diffusion_prior_loss_backward<double>(probabilities, timestep, prior, weight, dprobabilities);
    Matrix<double> dlogits[blocks];
    for (Index l = 0; l < blocks; ++l) {  // through the softmax of each layer
      dlogits[l] = dprobabilities.middleCols(l * experts, experts);
      moxie::softmax_rows_backward<double>(tapes[l].router().scores(), dlogits[l], {});
    }
    // [prior]
    const double value = out.cwiseProduct(dout).sum() + weight * loss;
    dcondition = Matrix<double>::Zero(c.rows(), c.cols());
    grads = {layers[0].parameters().zeros_like(), layers[1].parameters().zeros_like()};
    Matrix<double> d = dout;
    for (Index l = blocks - 1; l >= 0; --l) {
      Tokens<double> in(inputs[l], length);
      in.condition = c;
      Matrix<double> dx(x.rows(), x.cols()), dy(x.rows(), x.cols()), dx_layer(x.rows(), x.cols());
      Matrix<double> dc(c.rows(), c.cols());
      Matrix<double> masked(x.rows(), x.cols());
      moxie::timestep_mask<double>(in.x, y[l], masked);
      const Matrix<double> dr = d.cwiseProduct(masked.array().cos().matrix());
      // [block backward]
      moxie::timestep_mask_backward<double>(in.x, y[l], dr, dx, dy);
      dx -= d.cwiseProduct(y[l]);
      dy -= d.cwiseProduct(in.x.eigen());
      layers[l].backward(in, {dy, dlogits[l]}, {dx_layer, dc}, grads[std::size_t(l)], tapes[l]);
      d = dx + dx_layer;
      dcondition += dc;
      // [block backward]
    }
    return value;
  }
};

TEST_CASE("timestep layer: blocks with masks and the prior loss have the gradients of their sum") {
  TwoBlocks model;
  model.match();
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 663);
  const Matrix<double> dout = moxie::test::random<double>(tokens, model_dim, 664);
  model.step(x, dout, 3);
  const Matrix<double> dcondition = model.dcondition;
  const auto grads = model.grads;
  // The timesteps of the batch differ, so the gradient of an embedding is that of its sample.
  Matrix<double> dembedding = Matrix<double>::Zero(TwoBlocks::timesteps, condition_dim);
  for (std::size_t b = 0; b < model.timestep.size(); ++b) {
    dembedding.row(model.timestep[b]) = dcondition.row(Index(b));
  }
  const auto loss = [&] { return model.step(x, dout, 3); };
  std::vector<moxie::testing::GradientReport> reports{
      moxie::testing::check_gradient(loss, model.embedding, dembedding, {.step = 3e-5}, "embedding")};
  for (std::size_t l = 0; l < 2; ++l) {
    moxie::zip(
        [&](const moxie::TensorInfo& info, RowView<double> value, RowView<const double> gradient) {
          reports.push_back(moxie::testing::check_gradient(loss, value, gradient, {.step = 3e-5}, info.name));
        },
        model.layers[l].parameters(), grads[l]);
  }
  for (const auto& report : reports) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE("timestep layer: experts that are zero leave a block as it is without them") {
  TwoBlocks model;
  for (auto& layer : model.layers) {
    moxie::zip(
        [](const moxie::TensorInfo& info, auto w) {
          if (info.name.starts_with("experts.")) {
            w.eigen().setZero();
          }
        },
        layer.parameters());
  }
  model.match();
  const Matrix<double> x = moxie::test::random<double>(tokens, model_dim, 665);
  const Matrix<double> dout = moxie::test::random<double>(tokens, model_dim, 666);
  const double without = x.array().sin().sin().matrix().cwiseProduct(dout).sum();
  CHECK(model.step(x, dout, 0) == doctest::Approx(without).epsilon(1e-13));
  CHECK(model.grads[0]["gate.weight"].eigen().isZero(0));  // the gate learns nothing from y yet,
  CHECK_FALSE(model.grads[0]["experts.0.bias"].eigen().isZero(0));
  model.step(x, dout, 1);
  CHECK_FALSE(model.grads[0]["gate.weight"].eigen().isZero(0));  // but from the prior
}

TEST_CASE_TEMPLATE("timestep mask: is x ⊙ (1 + y), row by row of any view", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(70, 9, 671);
  const Matrix<S> y = moxie::test::random<S>(70, 9, 672);
  const Matrix<S> dr = moxie::test::random<S>(70, 9, 673);
  Matrix<S> r = moxie::test::untouched<S>(70, 11);
  Matrix<S> dx = moxie::test::untouched<S>(70, 9), dy = dx;
  for (const int threads : {1, 2, 7}) {
    moxie::timestep_mask<S>(x, y, r.middleCols(1, 9), Exec{threads});
    moxie::timestep_mask_backward<S>(x, y, dr, dx, dy, Exec{threads});
    for (Index t = 0; t < 70; ++t) {
      CHECK(r(t, 0) == S(-77));
      CHECK(r(t, 10) == S(-77));
      for (Index i = 0; i < 9; ++i) {
        CHECK(r(t, 1 + i) == x(t, i) * (S(1) + y(t, i)));
        CHECK(dx(t, i) == dr(t, i) * (S(1) + y(t, i)));
        CHECK(dy(t, i) == dr(t, i) * x(t, i));
      }
    }
  }
}

TEST_CASE("timestep mask: backward matches central differences and overwrites") {
  Matrix<double> x = moxie::test::random<double>(4, 5, 674);
  Matrix<double> y = moxie::test::random<double>(4, 5, 675);
  const Matrix<double> dr = moxie::test::random<double>(4, 5, 676);
  Matrix<double> dx = moxie::test::untouched<double>(4, 5), dy = dx;
  moxie::timestep_mask_backward<double>(x, y, dr, dx, dy);
  const auto loss = [&] {
    Matrix<double> r(4, 5);
    moxie::timestep_mask<double>(x, y, r);
    return r.cwiseProduct(dr).sum();
  };
  for (const auto& report :
       {moxie::testing::check_gradient(loss, x, dx, {}, "x"), moxie::testing::check_gradient(loss, y, dy, {}, "y")}) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE("timestep mask: other shapes and overlapping memory are refused, and nothing is written") {
  using M = Matrix<float>;
  M x = moxie::test::untouched<float>(4, 5), y = x, r = x, dx = x, dy = x;
  M other = moxie::test::untouched<float>(4, 6);
  CHECK_THROWS_AS(moxie::timestep_mask<float>(x, other, r), moxie::ShapeError);
  CHECK_THROWS_AS(moxie::timestep_mask<float>(x, y, other), moxie::ShapeError);
  CHECK(moxie::test::message_of<moxie::ShapeError>([&] { moxie::timestep_mask<float>(other, y, r); }) ==
        "timestep_mask: y is (4,5), expected (4,6)");
  CHECK_THROWS_AS(moxie::timestep_mask<float>(x, y, x), moxie::ValueError);
  CHECK_THROWS_AS(moxie::timestep_mask<float>(x, y, y), moxie::ValueError);
  const moxie::RowView<float> one_row(r.data(), 4, 5, 0);
  CHECK_THROWS_AS(moxie::timestep_mask<float>(x, y, one_row), moxie::ValueError);
  CHECK_THROWS_AS(moxie::timestep_mask_backward<float>(x, y, r, moxie::RowView<float>(dx.data(), 4, 5, 0), dy),
                  moxie::ValueError);
  CHECK_THROWS_AS(moxie::timestep_mask_backward<float>(x, y, r, dx, moxie::RowView<float>(dy.data(), 4, 5, 0)),
                  moxie::ValueError);
  const auto backward = [](M& x_, M& y_, M& dr, M& dx_, M& dy_) { moxie::timestep_mask_backward<float>(x_, y_, dr, dx_, dy_); };
  CHECK_THROWS_AS(backward(x, other, r, dx, dy), moxie::ShapeError);
  CHECK_THROWS_AS(backward(x, y, other, dx, dy), moxie::ShapeError);
  CHECK_THROWS_AS(backward(x, y, r, other, dy), moxie::ShapeError);
  CHECK_THROWS_AS(backward(x, y, r, dx, other), moxie::ShapeError);
  CHECK_THROWS_AS(backward(x, y, r, dx, dx), moxie::ValueError);
  for (M* in : {&x, &y, &r}) {
    CHECK_THROWS_AS(backward(x, y, r, *in, dy), moxie::ValueError);
    CHECK_THROWS_AS(backward(x, y, r, dx, *in), moxie::ValueError);
  }
  for (const M* m : {&x, &y, &r, &dx, &dy, &other}) {
    CHECK(moxie::test::is_untouched(*m));
  }
}

TEST_CASE("timestep layer: T = 0 and T = 1 are batches too") {
  for (const Mode& mode : modes) {
    CAPTURE(mode.name);
    const auto layer = make<double>(mode);
    auto tape = layer.make_tape();
    auto grads = layer.parameters().zeros_like();
    Matrix<double> none(0, model_dim), y(0, model_dim), dx(0, model_dim);
    const Matrix<double> no_condition(0, condition_dim);
    Tokens<double> nothing(none);
    nothing.condition = no_condition;
    layer.forward(nothing, y, tape);
    layer.backward(nothing, none, dx, grads, tape);
    CHECK((grads.flat() == 0).all());
    CHECK(tape.plan().rows() == 0);

    const Matrix<double> one = moxie::test::random<double>(1, model_dim, 677);
    const Matrix<double> c = moxie::test::random<double>(1, condition_dim, 678);
    const Matrix<double> dy = moxie::test::random<double>(1, model_dim, 679);
    Tokens<double> in(one);
    in.condition = c;
    for (const auto& report : moxie::testing::check_layer_gradients(layer, in, dy, one_thread)) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE("timestep layer: conditions that do not fit or are not finite are refused, and y stays as it was") {
  using moxie::test::contains;
  using moxie::test::message_of;
  const auto layer = make<float>(modes[1]);
  Batch<float> batch{moxie::Sequences(ragged)};
  Matrix<float> y = moxie::test::untouched<float>(tokens, model_dim);
  auto tape = layer.make_tape();
  Tokens<float> without = batch.in;
  without.condition = {};
  CHECK(
      contains(message_of<moxie::ShapeError>([&] { layer.forward(without, y, tape); }), "condition is (0,0), expected (5,6)"));
  CHECK(
      contains(message_of<moxie::ShapeError>([&] { layer.forward(batch.x, y, tape); }), "condition is (0,0), expected (1,6)"));
  Tokens<float> narrow = batch.in;
  const Matrix<float> four = Matrix<float>::Zero(5, 4);
  narrow.condition = four;
  CHECK(contains(message_of<moxie::ShapeError>([&] { layer.forward(narrow, y, tape); }), "condition is (5,4), expected (5,6)"));
  Tokens<float> few = batch.in;
  few.condition = RowView<const float>(batch.condition).middle_rows(0, 4);
  CHECK_THROWS_AS(layer.forward(few, y, tape), moxie::ShapeError);
  batch.condition(3, 1) = std::numeric_limits<float>::infinity();
  CHECK(contains(message_of<moxie::ValueError>([&] { layer.forward(batch.in, y, tape); }), "sequence 3 are not finite"));
  CHECK(moxie::test::is_untouched(y));

  batch.condition.setZero();
  layer.forward(batch.in, y, tape);
  auto grads = layer.parameters().zeros_like();
  Matrix<float> dx = moxie::test::untouched<float>(tokens, model_dim);
  Matrix<float> dcondition = moxie::test::untouched<float>(4, condition_dim);
  CHECK(contains(message_of<moxie::ShapeError>([&] {
                   layer.backward(batch.in, y, {dx, dcondition}, grads, tape);
                 }),
                 "dcondition is (4,6), expected (5,6)"));
  CHECK(moxie::test::is_untouched(dx));
  CHECK(moxie::test::is_untouched(dcondition));
}

TEST_CASE("timestep layer: sizes that make no layer are refused by name") {
  using moxie::test::contains;
  const auto build = [](Index dim, Index condition, Index experts, Index k) {
    return moxie::test::message_of<moxie::ValueError>(
        [=] { TimestepMoE<float>({.model_dim = dim, .condition_dim = condition, .experts = experts, .top_k = k}); });
  };
  CHECK(contains(build(0, 4, 3, 1), "model_dim is 0"));
  CHECK(contains(build(4, 0, 3, 1), "condition_dim is 0"));
  CHECK(contains(build(4, 4, 0, 1), "experts is 0"));
  CHECK(contains(build(4, 4, 3, 0), "top_k is 0"));
  CHECK(contains(build(4, 4, 3, 4), "top_k is more than there are experts"));
}

}  // namespace

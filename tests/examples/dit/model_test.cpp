// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/model.hpp>
#include <moxie/testing/gradient_check.hpp>

using dit::Buffer;
using dit::Exec;
using dit::Index;
using dit::Matrix;
using dit::Rng;
using moxie::Parameters;
using moxie::random_normal;

namespace {

constexpr double tolerance = 1e-6;

const dit::ModelConfig small{.image_size = 6, .channels = 2, .patch = 2, .dim = 8, .depth = 2, .heads = 2, .classes = 3};

// Switch-DiT with 10 timesteps, t in [0,1).
dit::ModelConfig switched() {
  dit::ModelConfig config = small;
  config.switch_experts = 3;
  config.timesteps = 10;
  config.timestep_unit = 0.1;
  config.prior = 0.7;
  return config;
}

template <class Layer>
dit::Model<Layer> shared_model() {
  return {small,
          Layer({.model_dim = 8,
                 .experts = 4,
                 .top_k = 2,
                 .expert = {.hidden_dim = 5},
                 .shared = {.hidden_dim = 6},
                 .balance = {.expert_level = 0.3}}),
          "moe."};
}

// Values that leave nothing at zero: at its start a DiT is the identity, and most gradients vanish.
template <class Scalar>
Parameters<Scalar> awake(const moxie::Layout& layout) {
  Parameters<Scalar> p(layout);
  for (std::size_t i = 0; i < layout.tensors().size(); ++i) {
    Rng(11).split(i).fill_normal(p.view()[Index(i)], 0.4);
  }
  return p;
}

template <class Scalar>
struct Step {
  explicit Step(const dit::ModelConfig& config = small)
      : x(random_normal<Scalar>(3, config.image_dim(), Rng(1))),
        dv(random_normal<Scalar>(3, config.output_dim(), Rng(2))),
        v(3, config.output_dim()),
        dx(3, config.image_dim()) {}

  Matrix<Scalar> x, dv;
  std::vector<Scalar> t{Scalar(0.1), Scalar(0.5), Scalar(0.9)};
  std::vector<Index> labels{0, 3, 2};
  Matrix<Scalar> v, dx;
};

// loss = ⟨v, dv⟩ + balance, NaN where a router chooses otherwise than in `plans`.
template <class Model>
void check_model(const Model& model) {
  Parameters<double> p = awake<double>(model.layout());
  Parameters<double> grads = p.zeros_like();
  Step<double> s(model.config());
  auto tape = model.make_tape();
  model.match_prior(p, tape, Exec{1});
  model.forward(p, s.x, s.t, s.labels, s.v, tape, Exec{1});
  model.backward(p, s.dv, grads, tape, Exec{1}, s.dx);
  auto moved = model.make_tape();
  moved.prior_of_unit = tape.prior_of_unit;
  const auto loss = [&] {
    model.forward(p, s.x, s.t, s.labels, s.v, moved, Exec{1});
    for (std::size_t i = 0; i < tape.blocks.size(); ++i) {
      if constexpr (requires { tape.blocks[i].feed_forward.plan(); }) {
        if (!moxie::testing::detail::same_selection(tape.blocks[i].feed_forward.plan(), moved.blocks[i].feed_forward.plan())) {
          return std::nan("");
        }
      }
      if (model.config().switch_experts > 0 &&
          !moxie::testing::detail::same_selection(tape.blocks[i].gated.plan(), moved.blocks[i].gated.plan())) {
        return std::nan("");
      }
    }
    return (s.v.array() * s.dv.array()).sum() + moved.balance_loss();
  };
  moxie::testing::GradientOptions options{.step = 1e-4, .max_elements = 24};
  const auto of_x = moxie::testing::check_gradient(loss, s.x, s.dx, options, "x");
  CHECK_MESSAGE(of_x.passes(tolerance), of_x.message());
  moxie::zip(
      [&](const moxie::TensorInfo& info, auto w, auto g) {
        const auto report = moxie::testing::check_gradient(loss, w, g, options, info.name);
        CHECK_MESSAGE(report.passes(tolerance), report.message());
        // Every part learns; an expert may be without tokens in so small a batch.
        const bool of_expert = info.name.find(".experts.") != std::string::npos;
        CHECK_MESSAGE((of_expert || g.eigen().cwiseAbs().maxCoeff() > 0), info.name);
      },
      p, grads);
}

}  // namespace

TEST_CASE("Model: the whole gradient agrees with finite differences, shared experts") {
  check_model(shared_model<moxie::SharedExpertMoE<double>>());
}
TEST_CASE("Model: the whole gradient agrees with finite differences, top-k") {
  using Layer = moxie::TopKMoE<double>;
  check_model(dit::Model<Layer>(
      small, Layer({.model_dim = 8, .experts = 3, .top_k = 2, .expert = {.hidden_dim = 5}, .balance = {.sequence_level = 0.2}}),
      "moe."));
}
TEST_CASE("Model: the whole gradient agrees with finite differences, Soft MoE") {
  using Layer = moxie::SoftMoE<double>;
  check_model(dit::Model<Layer>(
      small, Layer({.model_dim = 8, .experts = 3, .slots_per_expert = 2, .expert = {.hidden_dim = 5}}), "moe."));
}
TEST_CASE("Model: the whole gradient agrees with finite differences, dense") {
  using Layer = dit::DenseFeedForward<double>;
  check_model(dit::Model<Layer>(small, Layer({.model_dim = 8, .hidden_dim = 12}), ""));
}
TEST_CASE("Model: the whole gradient agrees with finite differences, with a learned variance") {
  using Layer = dit::DenseFeedForward<double>;
  dit::ModelConfig config = small;
  config.learn_sigma = true;
  CHECK(config.output_dim() == 2 * config.image_dim());
  check_model(dit::Model<Layer>(config, Layer({.model_dim = 8, .hidden_dim = 12}), ""));
}

TEST_CASE("Model: the whole gradient agrees with finite differences, Switch-DiT with its prior loss") {
  using Layer = dit::DenseFeedForward<double>;
  check_model(dit::Model<Layer>(switched(), Layer({.model_dim = 8, .hidden_dim = 12}), ""));
}

TEST_CASE("Model: Switch-DiT's experts start at zero and mask nothing, and its prior loss is part of the balance loss") {
  using Layer = dit::DenseFeedForward<double>;
  const Layer layer({.model_dim = 8, .hidden_dim = 12});
  const dit::Model<Layer> with(switched(), layer, "");
  const dit::Model<Layer> without(small, layer, "");
  Parameters<double> p = awake<double>(with.layout());
  for (const auto& tensor : with.layout().tensors()) {
    if (tensor.name.find(".experts.") != std::string::npos) {
      p[tensor.name].eigen().setZero();
    }
  }
  Parameters<double> plain(without.layout());
  for (const auto& tensor : without.layout().tensors()) {
    plain[tensor.name].eigen() = p[tensor.name].eigen();
  }
  Step<double> s;
  Step<double> expected;
  auto tape = with.make_tape();
  auto plain_tape = without.make_tape();
  with.forward(p, s.x, s.t, s.labels, s.v, tape, Exec{1});
  without.forward(plain, s.x, s.t, s.labels, expected.v, plain_tape, Exec{1});
  CHECK(s.v == expected.v);
  CHECK(tape.balance_loss() == 0);
  with.match_prior(p, tape, Exec{1});
  with.forward(p, s.x, s.t, s.labels, s.v, tape, Exec{1});
  CHECK(tape.balance_loss() == tape.prior_loss);
  CHECK(tape.prior_loss > 0.0);
  CHECK(tape.prior_loss < 0.5 * std::log(2.0));

  with.initialize(p, Rng(1));
  for (const auto& tensor : with.layout().tensors()) {
    const bool zero = tensor.name.find("routers.") == 0 && !tensor.name.ends_with("gate.weight");
    CHECK_MESSAGE((zero == p[tensor.name].eigen().isZero() || tensor.name.find("routers.") != 0), tensor.name);
  }
}

TEST_CASE("ModelConfig: the timestep of a time") {
  dit::ModelConfig ddpm;
  CHECK(ddpm.timestep(0) == 0);
  CHECK(ddpm.timestep(999) == 999);
  CHECK(ddpm.timestep(5000) == 999);
  dit::ModelConfig flow{.timesteps = 1000, .timestep_unit = 1e-3};
  for (Index i = 0; i < 1000; ++i) {
    REQUIRE(flow.timestep(double(float(double(i) * 1e-3))) == i);
  }
  CHECK(flow.timestep(1) == 999);
}

TEST_CASE("Model: the same bits with 1, 2 and 7 threads, forward and backward") {
  const auto model = shared_model<moxie::SharedExpertMoE<float>>();
  const Parameters<float> p = awake<float>(model.layout());
  Step<float> first;
  Parameters<float> first_grads = p.zeros_like();
  for (const int threads : {1, 2, 7, 1}) {
    Step<float> s;
    Parameters<float> grads = p.zeros_like();
    auto tape = model.make_tape();
    model.forward(p, s.x, s.t, s.labels, s.v, tape, Exec{threads});
    model.backward(p, s.dv, grads, tape, Exec{threads}, s.dx);
    if (threads == 1 && first_grads.flat().abs().maxCoeff() == 0) {
      first = s;
      first_grads = grads;
    }
    CHECK(s.v == first.v);
    CHECK(s.dx == first.dx);
    CHECK((grads.flat() == first_grads.flat()).all());
  }
}

TEST_CASE("Model: a tape that keeps nothing gives the same bits, and has no backward") {
  const auto check = [](const auto& model) {
    const Parameters<float> p = awake<float>(model.layout());
    Step<float> kept;
    Step<float> nothing;
    auto whole = model.make_tape();
    auto tape = model.make_tape(moxie::Keep::nothing);
    for (int i = 0; i < 2; ++i) {
      model.forward(p, kept.x, kept.t, kept.labels, kept.v, whole, Exec{1});
      model.forward(p, nothing.x, nothing.t, nothing.labels, nothing.v, tape, Exec{1});
      CHECK(kept.v == nothing.v);
    }
    Parameters<float> grads = p.zeros_like();
    CHECK_THROWS_AS(model.backward(p, nothing.dv, grads, tape, Exec{1}, nothing.dx), moxie::ValueError);
  };
  check(shared_model<moxie::SharedExpertMoE<float>>());
  using Dense = dit::DenseFeedForward<float>;
  check(dit::Model<Dense>(small, Dense({.model_dim = 8, .hidden_dim = 7}), ""));
}

TEST_CASE("Model: adds to gradients, and images need none") {
  const auto model = shared_model<moxie::SharedExpertMoE<double>>();
  const Parameters<double> p = awake<double>(model.layout());
  Step<double> s(model.config());
  auto tape = model.make_tape();
  model.forward(p, s.x, s.t, s.labels, s.v, tape, Exec{1});
  Parameters<double> once = p.zeros_like();
  model.backward(p, s.dv, once, tape, Exec{1}, s.dx);
  Parameters<double> twice = once;
  model.backward(p, s.dv, twice, tape, Exec{1});
  const double scale = once.flat().abs().maxCoeff();
  CHECK((twice.flat() - 2 * once.flat()).abs().maxCoeff() < 1e-12 * scale);
}

TEST_CASE("Model: starts as the zero velocity, with every block the identity") {
  const auto model = shared_model<moxie::SharedExpertMoE<double>>();
  Parameters<double> p = awake<double>(model.layout());
  model.initialize(p, Rng(3));
  Step<double> s(model.config());
  auto tape = model.make_tape();
  model.forward(p, s.x, s.t, s.labels, s.v, tape, Exec{1});
  CHECK(s.v.cwiseAbs().maxCoeff() == 0);
  const Index rows = 3 * small.tokens();
  CHECK(tape.blocks.back().out.view(rows, 8).eigen() == tape.first.view(rows, 8).eigen());
}

TEST_CASE("Model: images of a batch do not influence each other") {
  const auto model = shared_model<moxie::SharedExpertMoE<double>>();
  const Parameters<double> p = awake<double>(model.layout());
  Step<double> s(model.config());
  auto tape = model.make_tape();
  model.forward(p, s.x, s.t, s.labels, s.v, tape, Exec{1});
  Matrix<double> alone(1, small.image_dim());
  model.forward(p, s.x.middleRows(1, 1), {s.t[1]}, {s.labels[1]}, alone, tape, Exec{1});
  CHECK(alone.row(0) == s.v.row(1));
}

TEST_CASE("Model: refuses other shapes, labels that are no class, and configurations that are no transformer") {
  const auto model = shared_model<moxie::SharedExpertMoE<double>>();
  const Parameters<double> p = awake<double>(model.layout());
  Step<double> s(model.config());
  auto tape = model.make_tape();
  const auto forward = [&](const Matrix<double>& x, std::vector<double> t, std::vector<Index> labels) {
    s.v.setConstant(7);
    model.forward(p, x, t, labels, s.v, tape, Exec{1});
  };
  CHECK_THROWS_WITH_AS(forward(Matrix<double>::Zero(3, 5), s.t, s.labels), "Model::forward: x is (3,5), expected (B,72)",
                       moxie::ShapeError);
  CHECK_THROWS_AS(forward(Matrix<double>::Zero(2, 72), s.t, s.labels), moxie::ShapeError);
  CHECK_THROWS_AS(forward(s.x, {0.1}, s.labels), moxie::ValueError);
  CHECK_THROWS_AS(model.forward(p, Matrix<double>(0, 72), {}, {}, Matrix<double>(0, 72), tape, Exec{1}), moxie::ValueError);
  CHECK_THROWS_AS(forward(s.x, s.t, {0, 1, 4}), moxie::ValueError);
  CHECK_THROWS_AS(forward(s.x, s.t, {0, 1, -1}), moxie::ValueError);
  CHECK((s.v.array() == 7).all());
  for (const dit::ModelConfig& bad :
       {dit::ModelConfig{.image_size = 7, .patch = 2}, dit::ModelConfig{.dim = 10}, dit::ModelConfig{.dim = 12, .heads = 5},
        dit::ModelConfig{.depth = 0}, dit::ModelConfig{.switch_experts = 2, .switch_top_k = 3}, dit::ModelConfig{.patch = 0},
        dit::ModelConfig{.classes = 0}}) {
    CHECK_THROWS_AS(bad.validate(), moxie::ValueError);
  }
}

// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <dit/reference_names.hpp>
#include <dit/sampling.hpp>

#include "golden_case.hpp"
#include "switchdit.hpp"

namespace golden {

/// What the metadata of a diffusion transformer says.
inline dit::ModelConfig dit_config(const GoldenCase& golden, bool learn_sigma) {
  const dit::ModelConfig config{
      .image_size = golden.integer("input_size", 1, 4096),
      .channels = golden.integer("in_channels", 1, 4096),
      .patch = golden.integer("patch_size", 1, 4096),
      .dim = golden.integer("hidden_size", 1, 1 << 16),
      .depth = golden.integer("depth", 1, 256),
      .heads = golden.integer("num_heads", 1, 4096),
      .classes = golden.integer("num_classes", 1, 1 << 20),
      .learn_sigma = learn_sigma,
      .qk_norm = golden.contains("param/blocks.0.attn.Wqkv.weight") || golden.contains("grad/param/blocks.0.attn.Wqkv.weight")};
  config.validate();
  return config;
}
inline dit::ModelConfig dit_config(const GoldenCase& golden) {
  const dit::ModelConfig config = dit_config(golden, golden.boolean("learn_sigma"));
  if (golden.integer("out_channels") != config.out_channels()) {
    throw GoldenError("metadata 'out_channels' is " + golden.text("out_channels") + ", expected " +
                      std::to_string(config.out_channels()));
  }
  return config;
}

/// Parameters from a file's tensors, as the reference names and stores them.
template <class Scalar>
void read_parameters(GoldenCase& golden, const moxie::Layout& layout, moxie::Parameters<Scalar>& p) {
  const std::vector<dit::FileTensor> tensors = dit::file_tensors(layout);
  for (const dit::FileTensor& tensor : tensors) {
    golden.require("param/" + tensor.name, tensor.shape);
  }
  for (const dit::FileTensor& tensor : tensors) {
    const std::vector<Scalar> elements = golden.read<Scalar>("param/" + tensor.name);
    dit::for_each_element(tensor, p.view(), [&](Index i, Scalar& to) { to = elements[std::size_t(i)]; });
  }
}
template <class Scalar>
void compare_gradients(GoldenCase& golden, const moxie::Layout& layout, moxie::Parameters<Scalar>& grads) {
  for (const dit::FileTensor& tensor : dit::file_tensors(layout)) {
    const std::string name = "grad/param/" + tensor.name;
    golden.require(name, tensor.shape);
    std::vector<double> elements;
    dit::for_each_element(tensor, grads.view(), [&](Index, Scalar of) { elements.push_back(double(of)); });
    if (tensor.name.ends_with("k_norm.bias")) {  // adds the same to all logits of a row, which softmax does not see
      const std::string weight = tensor.name.substr(0, tensor.name.size() - 4) + "weight";
      golden.compare_cancelled(name, elements, double(grads[weight].eigen().cwiseAbs().maxCoeff()));
    } else {
      golden.compare(name, elements);
    }
  }
}

/// A model with a file's parameters, its inputs, and its pass over them.
template <class Scalar, class FeedForward>
struct DitRun {
  using Model = dit::Model<FeedForward>;

  const Model& model;
  Index batch;
  moxie::Parameters<Scalar> p;
  typename Model::Tape tape;
  Matrix<Scalar> x, dy, y;

  /// `prior_of_unit` is Switch-DiT's recorded matching.
  DitRun(GoldenCase& golden, const Model& m, std::vector<Index> prior_of_unit = {})
      : model(m), batch(golden.first_size("input/x")), p(m.layout()), tape(m.make_tape()) {
    const dit::ModelConfig& config = model.config();
    const Index size = config.image_size;
    golden.require("input/x", {batch, config.channels, size, size});
    golden.require("input/dy", {batch, config.out_channels(), size, size});
    golden.require("input/t", {batch});
    golden.require("input/y", {batch});
    GoldenCase::limit({batch, config.tokens(), config.dim, 6, config.depth});
    GoldenCase::limit({config.heads, config.tokens(), config.tokens()});
    read_parameters(golden, model.layout(), p);
    x = golden.matrix<Scalar>("input/x", batch, config.image_dim());
    dy = golden.matrix<Scalar>("input/dy", batch, config.output_dim());
    tape.prior_of_unit = std::move(prior_of_unit);
    y = forward(golden, "input/", x);
  }

  Matrix<Scalar> forward(GoldenCase& golden, const std::string& prefix, const Matrix<Scalar>& images) {
    std::vector<Scalar> t;
    if (!moxie::reads_as<Scalar>(golden.file().info(prefix + "t").dtype)) {
      for (const std::int64_t step : golden.read<std::int64_t>(prefix + "t")) {
        t.push_back(Scalar(step));
      }
    } else {
      t = golden.read<Scalar>(prefix + "t");
    }
    const std::vector<std::int64_t> labels = golden.read<std::int64_t>(prefix + "y");
    Matrix<Scalar> out = unwritten<Scalar>(images.rows(), model.config().output_dim());
    model.forward(p, images, t, {labels.begin(), labels.end()}, out, tape, moxie::Exec{2});
    return out;
  }

  /// The forward pass over the inputs, and the sampler's, if it was recorded: the first half of the images twice, guided in as
  /// many channels as the reference guides.
  void compare_outputs(GoldenCase& golden) {
    golden.compare("output/y", values(y));
    if (golden.contains("output/y_eval")) {
      golden.compare("output/y_eval", values(y));
    }
    const dit::ModelConfig& config = model.config();
    const Index dim = config.dim;
    const auto compare = [&](const std::string& name, RowView<const Scalar> actual) {
      if (golden.contains(name)) {
        golden.compare(name, values(actual));
      }
    };
    const Index rows = batch * config.tokens();
    compare("intermediate/t_freq", tape.time.frequencies.view(batch, 256));
    golden.leave_out("intermediate/t_freq_reference_float32", "in float; the reference's rounding, not the formula's");
    compare("intermediate/c", tape.condition.view(batch, dim));
    compare("intermediate/x_embed", tape.first.view(rows, dim));
    compare("intermediate/final_tokens", tape.tokens.view(rows, config.patch_output_dim()));
    for (std::size_t i = 0; i < tape.blocks.size(); ++i) {
      const std::string block = "intermediate/blocks." + std::to_string(i) + ".";
      compare(block + "out", tape.blocks[i].out.view(rows, dim));
      compare(block + "attn", tape.blocks[i].projected.view(rows, dim));
      compare(block + "moe", tape.blocks[i].mixed.view(rows, dim));
    }
    golden.leave_out("intermediate/t_emb", "a summand of intermediate/c");
    golden.leave_out("intermediate/y_emb", "a summand of intermediate/c");
    golden.require("param/pos_embed", {1, config.tokens(), dim});
    golden.compare("param/pos_embed", values(nn::position_embedding<Scalar>(config.grid(), dim)));
    golden.compare_total("loss/total", y, dy, tape.balance_loss());
  }

  void compare_guided(GoldenCase& golden, Index guided_channels = 3) {
    if (!golden.contains("cfg/output")) {
      return;
    }
    const dit::ModelConfig& config = model.config();
    const Index size = config.image_size;
    const Index n = golden.first_size("cfg/x");
    if (n % 2 != 0) {
      throw GoldenError("tensor cfg/x has an odd number of images");
    }
    golden.require("cfg/x", {n, config.channels, size, size});
    golden.require("cfg/t", {n});
    golden.require("cfg/y", {n});
    golden.require("cfg/output", {n, config.out_channels(), size, size});
    Matrix<Scalar> images = golden.matrix<Scalar>("cfg/x", n, config.image_dim());
    images.bottomRows(n / 2) = images.topRows(n / 2);
    Matrix<Scalar> out = forward(golden, "cfg/", images);
    dit::guide<Scalar>(out, std::min(guided_channels, config.out_channels()) * size * size, golden.number("cfg_scale"));
    golden.compare("cfg/output", values(out));
  }

  /// What the recorded gradients are of: ⟨y, dy⟩ + balance loss.
  void compare_gradients(GoldenCase& golden) {
    const dit::ModelConfig& config = model.config();
    auto grads = p.zeros_like();
    Matrix<Scalar> dx = unwritten<Scalar>(batch, config.image_dim());
    model.backward(p, dy, grads, tape, moxie::Exec{2}, dx);
    golden.compare("grad/x", values(dx));
    golden::compare_gradients(golden, model.layout(), grads);
  }
};

/// Family `dense_dit`: DiT with its MLP.
template <class Scalar>
void verify_dense_dit(GoldenCase& golden) {
  using Layer = dit::DenseFeedForward<Scalar>;
  const dit::ModelConfig config = dit_config(golden);
  const dit::Model<Layer> model(config,
                                Layer({.model_dim = config.dim, .hidden_dim = golden.integer("mlp_hidden", 1, 1 << 20)}), "");
  DitRun<Scalar, Layer> run(golden, model);
  run.compare_outputs(golden);
  run.compare_gradients(golden);
  run.compare_guided(golden);
}

/// Family `ditmoe_model`: DiT-MoE; the gradients are in a file of their own, which names the one with the parameters.
template <class Scalar>
void verify_ditmoe_model(GoldenCase& golden) {
  using Layer = moxie::SharedExpertMoE<Scalar>;
  const dit::ModelConfig config = dit_config(golden);
  const Index experts = golden.integer("num_experts", 1, 4096);
  const Layer layer({.model_dim = config.dim,
                     .experts = experts,
                     .top_k = golden.integer("top_k", 1, experts),
                     .expert = {.hidden_dim = golden.integer("routed_intermediate", 1, 1 << 20)},
                     .shared = {.hidden_dim = golden.integer("shared_intermediate", 1, 1 << 20)},
                     .balance = {.expert_level = golden.number("aux_loss_alpha")}});
  const dit::Model<Layer> model(config, layer, "moe.");
  if (golden.file().metadata().count("params_file") != 0) {
    const moxie::SafetensorsFile file(golden.beside(golden.text("params_file")));
    GoldenCase params(file, golden.tolerance());
    DitRun<Scalar, Layer>(params, model).compare_gradients(golden);
    return;
  }
  DitRun<Scalar, Layer> run(golden, model);
  run.compare_outputs(golden);
  double sum = 0;
  for (std::size_t i = 0; i < run.tape.blocks.size(); ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    const auto& tape = run.tape.blocks[i].feed_forward;
    const double loss = tape.balance_loss();
    golden.compare("loss/aux." + block.substr(0, block.size() - 1), {loss});
    sum += loss;
    const auto& plan = tape.plan();
    std::vector<std::int64_t> index;
    std::vector<double> weight;
    for (Index t = 0; t < run.batch * config.tokens(); ++t) {
      for (const Index r : plan.rows_of_token(t)) {
        const auto& starts = plan.expert_starts();
        index.push_back(std::upper_bound(starts.begin(), starts.end(), r) - starts.begin() - 1);
        weight.push_back(double(plan.weight(r)));
      }
    }
    golden.compare_choices("routing/" + block + "expert_index", "routing/" + block + "weight", experts, index, weight);
  }
  golden.compare("loss/aux", {sum});
  run.compare_guided(golden);
}

/// Family `switchdit_model`: Switch-DiT, with the recorded one of the many matchings of least cost.
template <class Scalar>
void verify_switchdit_model(GoldenCase& golden) {
  using Layer = dit::DenseFeedForward<Scalar>;
  const std::vector<Index>& out = golden.shape("output/y");
  dit::ModelConfig config = dit_config(golden, out.size() == 4 && out[1] == 2 * golden.integer("in_channels", 1, 4096));
  config.switch_experts = golden.integer("num_experts", 1, 4096);
  config.switch_top_k = golden.integer("top_k", 1, config.switch_experts);
  config.timesteps = golden.integer("taskcount", 1, 1 << 16);
  config.prior = golden.number("w_JSD");
  if (golden.number("prior_alpha") != 4 || golden.number("prior_epsilon") != 1e-6) {
    throw GoldenError("metadata 'prior_alpha' or 'prior_epsilon': only 4 and 1e-6 are known");
  }
  const Index units = config.depth * config.switch_experts;
  GoldenCase::limit({config.timesteps, units});
  const dit::Model<Layer> model(config,
                                Layer({.model_dim = config.dim, .hidden_dim = golden.integer("mlp_hidden", 1, 1 << 20)}), "");
  const Matrix<std::uint8_t> mapping =
      prior_mapping(golden, config.timesteps, units, config.switch_top_k, config.switch_experts, 4);
  golden.require("input/t", {golden.first_size("input/x")});
  const std::vector<Index> timestep = read_indices(golden, "input/t", config.timesteps);
  compare_active_mask(golden, mapping, timestep);
  const std::vector<Index> pair = compare_matching(golden, "intermediate/probs_full_quantized", mapping);

  DitRun<Scalar, Layer> run(golden, model, pair);
  run.compare_outputs(golden);
  Matrix<double> probs(run.batch, units);
  for (std::size_t i = 0; i < run.tape.blocks.size(); ++i) {
    const auto& block = run.tape.blocks[i];
    const Index rows = run.batch * config.tokens();
    const std::string name = "intermediate/blocks." + std::to_string(i) + ".mask";
    golden.compare(name, values(Matrix<Scalar>((block.gated_y.view(rows, config.dim).eigen().array() + Scalar(1)).matrix())));
    probs.middleCols(Index(i) * config.switch_experts, config.switch_experts) =
        block.gated.router().scores().eigen().template cast<double>();
  }
  golden.compare("intermediate/probs", values(probs));
  golden.compare("loss/aux", {run.tape.prior_loss});
  const moxie::DiffusionPrior prior{.blocks = config.depth, .mapping = mapping, .prior_of_unit = pair};
  std::vector<double> each;
  for (Index b = 0; b < run.batch; ++b) {
    each.push_back(
        moxie::diffusion_prior_loss<double>(probs.middleRows(b, 1), std::span(timestep).subspan(std::size_t(b), 1), prior));
  }
  golden.compare("loss/jsd_per_sample", each);
  run.compare_gradients(golden);
  // The choices at all timesteps, and so the costs, are the recorded ones if our matching has the least cost.
  model.match_prior(run.p, run.tape, moxie::Exec{2});
  const Matrix<double> cost = golden.matrix<double>("routing/cost", units, units);
  double ours = 0;
  for (Index g = 0; g < units; ++g) {
    ours += cost(g, run.tape.prior_of_unit[std::size_t(g)]);
  }
  golden.compare("routing/optimal_cost", {ours});
  run.compare_guided(golden, config.channels);
}

/// Family `flash_attention_qknorm`: the attention of the large models, without a transformer around it.
template <class Scalar>
void verify_flash_attention(GoldenCase& golden) {
  const Index batch = golden.integer("batch");
  const Index length = golden.integer("tokens");
  const Index dim = golden.integer("dim");
  const Index heads = golden.integer("num_heads", 1, dim);
  if (dim % heads != 0) {
    throw GoldenError("metadata 'num_heads' does not divide 'dim'");
  }
  if (golden.boolean("qk_norm") && golden.number("qk_norm_eps") != 1e-6) {
    throw GoldenError("metadata 'qk_norm_eps': only 1e-6 is known");
  }
  for (const char* name : {"input/x", "input/dy", "output/y", "grad/x"}) {
    golden.require(name, {batch, length, dim});
  }
  GoldenCase::limit({batch, heads, length, length});
  GoldenCase::limit({batch, length, dim, 3});
  moxie::Layout layout;
  const nn::SelfAttention<Scalar> attention(layout, "", dim, heads, length, golden.boolean("qk_norm"));
  moxie::Parameters<Scalar> p(layout);
  read_parameters(golden, layout, p);
  const Matrix<Scalar> x = golden.matrix<Scalar>("input/x", batch * length, dim);
  const Matrix<Scalar> dy = golden.matrix<Scalar>("input/dy", batch * length, dim);
  Matrix<Scalar> y = unwritten<Scalar>(batch * length, dim);
  Matrix<Scalar> dx = unwritten<Scalar>(batch * length, dim);
  typename nn::SelfAttention<Scalar>::Tape tape;
  moxie::Workspace workspace;
  auto grads = p.zeros_like();
  attention.forward(p, x, y, tape, {workspace, moxie::Exec{2}});
  attention.backward(p, x, dy, dx, grads, tape, {workspace, moxie::Exec{2}});
  golden.compare("output/y", values(y));
  golden.compare_total("loss/total", y, dy, 0);
  golden.compare("grad/x", values(dx));
  compare_gradients(golden, layout, grads);
}

/// A model that says what was recorded: of step i, outputs for labels above those for no class.
template <class Scalar>
struct RecordedModel {
  struct Tape {};

  dit::ModelConfig shape;
  Matrix<Scalar> with;  // (steps · n, columns)
  Matrix<Scalar> without;
  std::vector<double> times;
  mutable Index step = 0;

  const dit::ModelConfig& config() const { return shape; }
  void forward(moxie::ParameterView<const Scalar> /*p*/, const Matrix<Scalar>& /*x*/, const std::vector<Scalar>& t,
               const std::vector<Index>& /*labels*/, Matrix<Scalar>& v, Tape& /*tape*/, const moxie::Exec& /*exec*/) const {
    const Index n = with.rows() / Index(times.size());
    if (double(std::abs(t.front() - Scalar(times[std::size_t(step)]))) > 1e-6) {
      throw GoldenError("output/sample_t: step " + std::to_string(step) + " is at another time");
    }
    v.topRows(n) = with.middleRows(step * n, n);
    if (v.rows() > n) {
      v.bottomRows(n) = without.middleRows(step * n, n);
    }
    ++step;
  }
};

/// Family `rectified_flow`: path, loss and sampler with the recorded outputs of a network.
template <class Scalar>
void verify_rectified_flow(GoldenCase& golden) {
  const std::vector<Index> like_x = golden.shape("input/x");
  if (like_x.size() != 4 || *std::min_element(like_x.begin(), like_x.end()) < 1) {
    throw GoldenError("tensor input/x: expected images");
  }
  const bool learn_sigma = golden.boolean("learn_sigma");
  std::vector<Index> like_output = like_x;
  like_output[1] *= learn_sigma ? 2 : 1;
  const Index batch = like_x[0];
  const Index n = like_x[1] * like_x[2] * like_x[3];
  const Index columns = learn_sigma ? 2 * n : n;
  const Index steps = golden.integer("sample_steps", 1, 4096);
  GoldenCase::limit({batch, columns, steps + 1});
  for (const char* name : {"input/x", "input/z1", "output/zt", "output/target"}) {
    golden.require(name, like_x);
  }
  golden.require("input/model_output", like_output);
  golden.require("grad/model_output", like_output);
  golden.require("input/time_draw", {batch});
  golden.require("output/t", {batch});
  golden.require("loss/loss", {});

  // A batch with the recorded draws.
  const std::vector<double> draw = golden.read<double>("input/time_draw");
  const dit::Process process = dit::RectifiedFlow{golden.boolean("ln")};
  const bool logit_normal = golden.boolean("ln");
  std::vector<double> times;
  for (const double z : draw) {
    times.push_back(logit_normal ? dit::logit_normal(z) : z);
  }
  golden.compare("output/t", times);
  dit::Batch<Scalar> flow;
  flow.clean = golden.matrix<Scalar>("input/x", batch, n);
  flow.noise = golden.matrix<Scalar>("input/z1", batch, n);
  flow.times.assign(times.begin(), times.end());
  flow.add_noise(process, moxie::Exec{2});
  golden.compare("output/zt", values(flow.images));
  golden.compare("output/target", values(Matrix<Scalar>(flow.noise - flow.clean)));
  const Matrix<Scalar> output = golden.matrix<Scalar>("input/model_output", batch, columns);
  Matrix<Scalar> doutput = unwritten<Scalar>(batch, columns);
  golden.compare("loss/loss", {flow.loss(process, 0, output, doutput)});
  golden.compare("grad/model_output", values(doutput));
  if (golden.contains("loss/batchwise_mse")) {
    std::vector<double> mse;
    for (Index b = 0; b < batch; ++b) {
      mse.push_back(flow.loss(process, b, RowView<const Scalar>(output.row(b)), {}));
    }
    golden.compare("loss/batchwise_mse", mse);
  }

  golden.require("sample/z", like_x);
  const auto predictions = [&](const std::string& name) {
    golden.require(name, {steps, batch, like_output[1], like_x[2], like_x[3]});
    return golden.matrix<Scalar>(name, steps * batch, columns);
  };
  const bool guidance = golden.contains("sample/v_uncond");
  // A pixel's place is nothing to the sampler: each is a channel of its own.
  RecordedModel<Scalar> model{.shape = {.image_size = 1, .channels = n, .patch = 1, .learn_sigma = learn_sigma},
                              .with = predictions("sample/v_cond"),
                              .without = guidance ? predictions("sample/v_uncond") : Matrix<Scalar>(),
                              .times = golden.read<double>("output/sample_t")};
  if (Index(model.times.size()) != steps) {
    throw GoldenError("tensor output/sample_t: expected a time for every step");
  }
  const Matrix<Scalar> start = golden.matrix<Scalar>("sample/z", batch, n);
  for (const bool guided : {false, true}) {
    if (guided && !guidance) {
      continue;
    }
    Matrix<Scalar> z = start;
    std::vector<double> path;
    std::vector<double> predicted = values(start);
    const auto append = [](std::vector<double>& to, const Matrix<Scalar>& m) {
      const std::vector<double> more = values(m);
      to.insert(to.end(), more.begin(), more.end());
    };
    typename RecordedModel<Scalar>::Tape tape;
    model.step = 0;
    const dit::Sampler<RecordedModel<Scalar>, Scalar> sampler(
        process, {.steps = std::to_string(steps), .guidance = guided ? golden.number("cfg") : 1.0}, model);
    sampler.integrate(moxie::ParameterView<const Scalar>(), z, std::vector<Index>(std::size_t(batch), 0), moxie::Rng(0), 0,
                      tape, moxie::Exec{1}, [&](double t, RowView<const Scalar> at, RowView<const Scalar> v) {
                        append(path, at.eigen());
                        append(predicted, at.eigen() - Scalar(t) * v.eigen());
                      });
    append(path, z);
    const std::string suffix = guided ? "cfg/images" : "nocfg/images";
    for (const auto& [name, actual] :
         {std::pair("sample_" + suffix, path), std::pair("sample_with_xps_" + suffix, predicted)}) {
      if (golden.contains(name)) {
        golden.require(name, {steps + 1, batch, like_x[1], like_x[2], like_x[3]});
        golden.compare(name, actual);
      }
    }
  }
}

}  // namespace golden

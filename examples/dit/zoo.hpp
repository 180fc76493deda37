// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <dit/cost.hpp>
#include <dit/text.hpp>
#include <ostream>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

/// The named models of DiT (Peebles and Xie 2023) and DiT-MoE (Fei et al. 2024): their shapes, and what they cost. All counts
/// are arithmetic; no model is made.
namespace dit {

struct ModelSize {
  std::string_view name;
  Index depth;
  Index dim;
  Index heads;
};
inline constexpr std::array model_sizes{ModelSize{"S", 12, 384, 6}, ModelSize{"B", 12, 768, 12}, ModelSize{"L", 24, 1024, 16},
                                        ModelSize{"XL", 28, 1152, 16}, ModelSize{"G", 40, 1408, 16}};

/// A model of the papers, on latents of 4 x 32 x 32 (images of 256 x 256) in 1000 classes. The fields are those of
/// `TrainingConfig`.
struct NamedModel {
  std::string name;
  ModelConfig model;
  std::string feed_forward = "dense";  ///< or shared
  Index experts = 0;
  Index top_k = 0;
  Index hidden_dim = 0;
  Index shared_hidden_dim = 0;

  bool dense() const { return feed_forward == "dense"; }
};

namespace detail {

/// Takes a prefix off a text, if it is there.
inline bool take(std::string_view& text, std::string_view prefix) {
  const bool there = text.starts_with(prefix);
  text.remove_prefix(there ? prefix.size() : 0);
  return there;
}
/// Takes a number below a million off a text; 0 where there is none.
inline Index take_number(std::string_view& text) {
  std::uint32_t n = 0;
  const char* const end = std::from_chars(text.data(), text.data() + std::min<std::size_t>(text.size(), 6), n).ptr;
  text.remove_prefix(std::size_t(end - text.data()));
  return Index(n);
}

}  // namespace detail

/// The model of a name: size / patch - experts E active A.
///
///     S/2-8E2A, DiT-MoE-S/2-8E2A   DiT-MoE: 8 SwiGLU experts of width 4D, 2 for each token, beside two shared ones of width D
///     S/2, DiT-S/2                 DiT: a GELU perceptron of width 4D
///
/// Sizes are S, B, L, XL and G, the patch any divisor of 32, A at most E. Throws ValueError for other names.
inline NamedModel named_model(std::string_view name) {
  std::string_view rest = name;
  const bool moe = detail::take(rest, "DiT-MoE-");
  const bool dense = !moe && detail::take(rest, "DiT-");
  const std::string_view letters = rest.substr(0, rest.find('/'));
  const auto* const size = std::find_if(model_sizes.begin(), model_sizes.end(), [&](auto& s) { return s.name == letters; });
  rest.remove_prefix(letters.size());

  NamedModel m;
  bool known = size != model_sizes.end() && detail::take(rest, "/");
  m.model = {.image_size = 32, .channels = 4, .patch = detail::take_number(rest), .classes = 1000, .learn_sigma = true};
  known = known && m.model.patch > 0 && 32 % m.model.patch == 0;
  if (!dense && detail::take(rest, "-")) {
    m.feed_forward = "shared";
    m.experts = detail::take_number(rest);
    known = known && detail::take(rest, "E");
    m.top_k = detail::take_number(rest);
    known = known && detail::take(rest, "A") && m.top_k >= 1 && m.top_k <= m.experts;
  }
  known = known && rest.empty() && !(moe && m.dense());
  moxie::detail::expect_value(known, "named_model",
                              "there is no model '" + std::string(name) +
                                  "'; there are DiT-MoE's, as S/2-8E2A (8 experts, 2 active), and dense ones, as DiT-S/2, with "
                                  "sizes S, B, L, XL, G and patches that divide 32");

  m.model.depth = size->depth;
  m.model.dim = size->dim;
  m.model.heads = size->heads;
  m.hidden_dim = 4 * size->dim;
  m.shared_hidden_dim = m.dense() ? 0 : 2 * size->dim;
  m.name = (m.dense() ? "DiT-" : "") + std::string(letters) + "/" + std::to_string(m.model.patch);
  if (!m.dense()) {
    m.name += "-" + std::to_string(m.experts) + "E" + std::to_string(m.top_k) + "A";
  }
  return m;
}

/// Gives a `TrainingConfig` the shape of a model. What a dense one does not have stays as it is.
template <class Config>
void apply(const NamedModel& m, Config& config) {
  config.model = m.model;
  config.feed_forward = m.feed_forward;
  config.hidden_dim = m.hidden_dim;
  if (!m.dense()) {
    config.experts = m.experts;
    config.top_k = m.top_k;
    config.shared_hidden_dim = m.shared_hidden_dim;
  }
}

/// What a named model costs.
inline Cost cost_of(const NamedModel& m) {
  TrainingConfig config;
  apply(m, config);
  return cost_of(config);
}

/// What gradients train: the parameters of `Model`'s layout.
inline std::int64_t trainable_parameters(const NamedModel& m) { return cost_of(m).parameters; }
/// With the fixed position embedding, L·D, as the references count.
inline std::int64_t total_parameters(const NamedModel& m) { return trainable_parameters(m) + m.model.tokens() * m.model.dim; }
/// Those that a token meets: all but the experts that it does not choose.
inline std::int64_t activated_parameters(const NamedModel& m) { return cost_of(m).activated + m.model.tokens() * m.model.dim; }
/// DiT-MoE's GFLOPs, each rounded: the gate, K experts and the shared ones are in, q kᵀ and P v are not.
inline std::int64_t linear_multiply_adds(const NamedModel& m) { return cost_of(m).linear_multiply_adds; }
/// DiT's GFLOPs, to 0.02%: one operation for each element of a layer norm, (2 blocks + 1) L D, makes up the rest.
inline std::int64_t multiply_adds(const NamedModel& m) { return cost_of(m).multiply_adds; }

/// Bytes that `Model` needs beside its weights for B images, in float: what a forward leaves on the tape, and scratch, which
/// stays there too. In numbers, with T = B·L, H of an expert, H' of the shared ones together, and P the probabilities that
/// attention holds at once, heads·L² for as many images as fit into `Attention::scratch`, at least one:
///
///     tape       blocks (T (12D + F) + 6BD) + T (3D + Cin p² + Cout p²)    F = K (D + 2H) + 2H' + 2E, dense: H;
///                                                                          qk_norm: 2 (D + heads) more
///     forward    the larger of T S and P                                   S = KH, dense: H
///     backward   T (7D + Cout p²) and the larger of T S and 2P             S = K (2D + 3H), dense: 2H
///
/// A forward needs tape + forward, a step tape + backward. Left out is what is small, below 2%: padding of rows, indices of the
/// plans, packing buffers.
inline std::int64_t activation_bytes(const NamedModel& m, std::int64_t batch, bool backward) {
  const ModelConfig& c = m.model;
  const std::int64_t dim = c.dim;
  const std::int64_t hidden = m.hidden_dim;
  const std::int64_t rows = batch * c.tokens();
  const std::int64_t feed_forward = m.dense() ? hidden : m.top_k * (dim + 2 * hidden) + 2 * m.shared_hidden_dim + 2 * m.experts;
  const std::int64_t head_norms = c.qk_norm ? 2 * (dim + c.heads) : 0;
  const std::int64_t tape = c.depth * (rows * (12 * dim + feed_forward + head_norms) + 6 * batch * dim) +
                            rows * (3 * dim + c.patch_dim() + c.patch_output_dim());
  const std::int64_t image = c.heads * c.tokens() * c.tokens();
  const std::int64_t probabilities = image * std::clamp<std::int64_t>(Attention<float>::scratch / image, 1, batch);
  const std::int64_t k = m.dense() ? 1 : m.top_k;
  const std::int64_t scratch =
      backward ? rows * (7 * dim + c.patch_output_dim()) +
                     std::max(rows * (m.dense() ? 2 * hidden : k * (2 * dim + 3 * hidden)), 2 * probabilities)
               : std::max(rows * k * hidden, probabilities);
  return 4 * (tape + scratch);
}

/// Bytes to draw one image without guidance: weights of 4 bytes (float) or 2 (bfloat16), and a forward in float.
inline std::int64_t inference_bytes(const NamedModel& m, std::int64_t weight_bytes) {
  return weight_bytes * trainable_parameters(m) + activation_bytes(m, 1, false);
}

/// Bytes to train on B images at once: weights, gradients, two moments and averages, 20 bytes a parameter, and a step.
inline std::int64_t training_bytes(const NamedModel& m, std::int64_t batch) {
  return 20 * trainable_parameters(m) + activation_bytes(m, batch, true);
}

/// A model beside what its paper prints of it, as it prints it; empty where it prints nothing.
struct ZooEntry {
  std::string_view name;
  std::string_view parameters;
  std::string_view activated;
  std::string_view gflops;
};
/// Fei et al. 2024, and Peebles and Xie 2023. Parameters of DiT-MoE are cut off, not rounded, but for XL's 1.49 activated
/// billions; those of DiT are rounded, without the position embedding.
inline constexpr std::array zoo{ZooEntry{"S/2-8E2A", "199M", "71M", "15.4"},
                                ZooEntry{"S/2-16E2A", "369M", "71M", "15.4"},
                                ZooEntry{"B/2-8E2A", "795M", "286M", "61.7"},
                                ZooEntry{"L/2-8E2A", "2.8B", "1.0B", "219"},
                                ZooEntry{"XL/2-8E2A", "4.1B", "1.5B", "324"},
                                ZooEntry{"G/2-16E2A", "16.5B", "3.1B", "691"},
                                ZooEntry{"S/4-8E2A", "", "", ""},
                                ZooEntry{"S/8-8E2A", "", "", ""},
                                ZooEntry{"DiT-S/2", "33M", "", "6.06"},
                                ZooEntry{"DiT-B/2", "130M", "", "23.01"},
                                ZooEntry{"DiT-L/2", "458M", "", "80.71"},
                                ZooEntry{"DiT-XL/2", "675M", "", "118.64"},
                                ZooEntry{"DiT-S/4", "", "", ""},
                                ZooEntry{"DiT-S/8", "", "", ""}};

/// A table of all of them, as text that Markdown reads as a table too.
inline void print_zoo(std::ostream& out) {
  const auto count = [](std::int64_t n) {  // 199,307,552
    std::string text = std::to_string(n);
    for (std::size_t i = text.size(); i > 3; i -= 3) {
      text.insert(i - 3, 1, ',');
    }
    return text;
  };
  const auto gib = [&](std::int64_t bytes) { return fixed(double(bytes) / double(1 << 30), 2); };

  using Row = std::array<std::string, 14>;
  std::vector<Row> rows{{"model", "blocks", "width", "heads", "parameters", "paper", "activated", "paper", "GFLOPs", "paper",
                         "+ attention", "float GiB", "bf16 GiB", "train GiB"}};
  for (const ZooEntry& entry : zoo) {
    const NamedModel m = named_model(entry.name);
    const ModelConfig& c = m.model;
    rows.push_back({m.name, std::to_string(c.depth), std::to_string(c.dim), std::to_string(c.heads), count(total_parameters(m)),
                    std::string(entry.parameters), count(activated_parameters(m)), std::string(entry.activated),
                    fixed(double(linear_multiply_adds(m)) * 1e-9, 2), std::string(entry.gflops),
                    fixed(double(multiply_adds(m)) * 1e-9, 2), gib(inference_bytes(m, 4)), gib(inference_bytes(m, 2)),
                    gib(training_bytes(m, 1))});
  }
  std::array<std::size_t, std::tuple_size_v<Row>> widths{};
  for (const Row& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t i = 0; i < widths.size(); ++i) {  // names to the left, numbers to the right
      const std::string padding(widths[i] - rows[r][i].size(), ' ');
      out << "| " << (i == 0 ? rows[r][i] + padding : padding + rows[r][i]) << ' ';
    }
    out << "|\n";
    if (r == 0) {
      for (std::size_t i = 0; i < widths.size(); ++i) {
        out << '|' << std::string(widths[i] + 1, '-') << (i == 0 ? '-' : ':');
      }
      out << "|\n";
    }
  }
  out << "\nGFLOPs are 10^9 multiply-adds for one image: of the linear layers, as DiT-MoE's paper counts, and with those of\n"
         "attention, as DiT's does. GiB are for one image: to draw it with weights in float or bfloat16, and to train on it.\n";
}

}  // namespace dit

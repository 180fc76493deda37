// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <dit/zoo.hpp>
#include <examples/dit/comma_locale.hpp>
#include <sstream>
#include <string>

using dit::Index;
using dit::named_model;
using dit::NamedModel;

namespace {

/// What a paper prints: "2.8B" is 28 units of 10^8.
struct Printed {
  double value;
  double unit;

  explicit Printed(std::string text) {
    const double factor = text.back() == 'M' ? 1e6 : text.back() == 'B' ? 1e9 : 1;
    const auto point = text.find('.');
    const std::size_t digits = text.find_last_of("0123456789") + 1;
    value = std::stod(text) * factor;
    unit = factor * (point == std::string::npos ? 1.0 : std::pow(10.0, -double(digits - point - 1)));
  }
  /// In units: at least 0 and below 1 of a number that was cut off, within a half of one that was rounded.
  double missing(double exact) const { return (exact - value) / unit; }
  bool rounded(double exact) const { return std::abs(missing(exact)) <= 0.5; }
  bool cut(double exact) const { return missing(exact) >= 0 && missing(exact) < 1; }
};

Index parameters_of_model(const NamedModel& m) {
  if (m.dense()) {
    using Layer = dit::DenseFeedForward<float>;
    return dit::Model<Layer>(m.model, Layer({.model_dim = m.model.dim, .hidden_dim = m.hidden_dim}), "")
        .layout()
        .parameter_count();
  }
  using Layer = moxie::SharedExpertMoE<float>;
  return dit::Model<Layer>(m.model,
                           Layer({.model_dim = m.model.dim,
                                  .experts = m.experts,
                                  .top_k = m.top_k,
                                  .expert = {.hidden_dim = m.hidden_dim},
                                  .shared = {.hidden_dim = m.shared_hidden_dim}}),
                           "moe.")
      .layout()
      .parameter_count();
}

/// Another width and depth, and few classes: every term of the arithmetic counts.
NamedModel small(const char* name) {
  NamedModel m = named_model(name);
  m.model.image_size = 12;
  m.model.channels = 3;
  m.model.dim = 24;
  m.model.depth = 3;
  m.model.heads = 2;
  m.model.classes = 5;
  m.hidden_dim = 20;
  m.shared_hidden_dim = 28;
  return m;
}

}  // namespace

TEST_CASE("named_model: a name says size, patch and experts") {
  for (const char* name : {"S/2-8E2A", "DiT-MoE-S/2-8E2A"}) {
    const NamedModel m = named_model(name);
    CHECK(m.name == "S/2-8E2A");
    CHECK(m.model.depth == 12);
    CHECK(m.model.dim == 384);
    CHECK(m.model.heads == 6);
    CHECK(m.model.patch == 2);
    CHECK(m.model.tokens() == 256);
    CHECK(m.model.output_dim() == 8 * 32 * 32);
    CHECK(m.model.classes == 1000);
    CHECK(m.feed_forward == "shared");
    CHECK(m.experts == 8);
    CHECK(m.top_k == 2);
    CHECK(m.hidden_dim == 1536);
    CHECK(m.shared_hidden_dim == 768);
    m.model.validate();
  }
  for (const char* name : {"XL/4", "DiT-XL/4"}) {
    const NamedModel m = named_model(name);
    CHECK(m.name == "DiT-XL/4");
    CHECK(m.feed_forward == "dense");
    CHECK(m.model.dim == 1152);
    CHECK(m.model.tokens() == 64);
    CHECK(m.hidden_dim == 4608);
  }
  CHECK(named_model("G/16-128E128A").name == "G/16-128E128A");
}

TEST_CASE("named_model: refuses other names and says what there is") {
  for (const char* name : {"",
                           "S",
                           "S/",
                           "S/2-",
                           "M/2",
                           "s/2",
                           "S/3",
                           "S/0",
                           "S/64",
                           "S/-2",
                           "S/2-8E",
                           "S/2-8E9A",
                           "S/2-8E0A",
                           "S/2-0E0A",
                           "S/2-8E2A ",
                           "S/2-8E2",
                           "S/2-E2A",
                           "DiT-MoE-S/2",
                           "DiT-S/2-8E2A",
                           "DiT-DiT-S/2",
                           "DiT-",
                           "S/2-1000000E2A",
                           "S/2-8E+2A",
                           "S/99999999999999999999"}) {
    CHECK_THROWS_WITH_AS(
        named_model(name),
        ("named_model: there is no model '" + std::string(name) +
         "'; there are DiT-MoE's, as S/2-8E2A (8 experts, 2 active), and dense ones, as DiT-S/2, with sizes S, "
         "B, L, XL, G and patches that divide 32")
            .c_str(),
        moxie::ValueError);
  }
}

TEST_CASE("apply: gives a configuration the shape") {
  struct {
    dit::ModelConfig model;
    std::string feed_forward = "soft";
    Index experts = 3, top_k = 1, hidden_dim = 0, shared_hidden_dim = 5;
  } config;
  apply(named_model("DiT-B/8"), config);
  CHECK(config.model.dim == 768);
  CHECK(config.model.patch == 8);
  CHECK(config.feed_forward == "dense");
  CHECK(config.hidden_dim == 3072);
  CHECK(config.experts == 3);
  CHECK(config.top_k == 1);
  CHECK(config.shared_hidden_dim == 5);
  apply(named_model("L/2-16E4A"), config);
  CHECK(config.model.depth == 24);
  CHECK(config.feed_forward == "shared");
  CHECK(config.experts == 16);
  CHECK(config.top_k == 4);
  CHECK(config.hidden_dim == 4096);
  CHECK(config.shared_hidden_dim == 2048);
}

TEST_CASE("trainable_parameters: as many as the model has") {
  for (const char* name : {"S/2-8E2A", "S/2-4E1A", "B/4-3E3A", "DiT-S/2", "DiT-B/4"}) {
    NamedModel m = small(name);
    CHECK(dit::trainable_parameters(m) == parameters_of_model(m));
    m.model.qk_norm = true;
    m.model.learn_sigma = false;
    CHECK(dit::trainable_parameters(m) == parameters_of_model(m));
  }
  for (const char* name : {"S/2-8E2A", "DiT-S/2"}) {
    CHECK(dit::trainable_parameters(named_model(name)) == parameters_of_model(named_model(name)));
  }
}

TEST_CASE("total_parameters: equals the reference's for S/2-8E2A") {
  CHECK(dit::total_parameters(named_model("S/2-8E2A")) == 199'307'552);
}

TEST_CASE("activated_parameters: those of a model with no more experts than a token takes") {
  NamedModel m = named_model("B/2-8E2A");
  const std::int64_t activated = dit::activated_parameters(m);
  CHECK(dit::activated_parameters(named_model("DiT-B/2")) == dit::total_parameters(named_model("DiT-B/2")));
  m.experts = 2;
  CHECK(activated == dit::total_parameters(m) + m.model.depth * 6 * m.model.dim);  // and the gate's other six rows
}

TEST_CASE("the counts are those of the papers") {
  for (const dit::ZooEntry& entry : dit::zoo) {
    if (entry.parameters.empty()) {
      continue;
    }
    CAPTURE(entry.name);
    const NamedModel m = named_model(entry.name);
    const Printed parameters{std::string(entry.parameters)};
    const Printed gflops{std::string(entry.gflops)};
    if (m.dense()) {
      CHECK(parameters.rounded(double(dit::trainable_parameters(m))));
      const double exact = double(dit::multiply_adds(m));
      CHECK(std::abs(gflops.missing(exact * 1e-9)) < 2);
      CHECK(gflops.rounded(exact * 1e-9) == (m.model.depth == 12));  // S and B; L and XL have more norms
      const double norms = double((2 * m.model.depth + 1) * m.model.tokens() * m.model.dim);
      CHECK(gflops.rounded((exact + norms) * 1e-9));
    } else {
      CHECK(parameters.cut(double(dit::total_parameters(m))));
      const Printed activated{std::string(entry.activated)};
      const double exact = double(dit::activated_parameters(m));
      CHECK((entry.name == "XL/2-8E2A" ? activated.rounded(exact) : activated.cut(exact)));
      CHECK(gflops.rounded(double(dit::linear_multiply_adds(m)) * 1e-9));
    }
  }
}

TEST_CASE("multiply_adds: the attention products are 2L²D a block") {
  const NamedModel m = named_model("S/4-8E2A");
  CHECK(dit::multiply_adds(m) - dit::linear_multiply_adds(m) == 12LL * 2 * 64 * 64 * 384);
}

TEST_CASE("activation_bytes: of a model small enough to count by hand") {
  // 2 images of 9 tokens: 18 rows of width 8, 4 experts of width 6, 2 a token, shared ones of width 10, 2 heads.
  NamedModel m;
  m.model = {.image_size = 6, .channels = 2, .patch = 2, .dim = 8, .depth = 3, .heads = 2, .classes = 3};
  m.feed_forward = "shared";
  m.experts = 4;
  m.top_k = 2;
  m.hidden_dim = 6;
  m.shared_hidden_dim = 10;
  const std::int64_t rows = 18;
  const std::int64_t routed = 36;
  const std::int64_t modulation = 96;      // 2 images, 6D
  const std::int64_t probabilities = 324;  // 2 images, 2 heads, 9 x 9
  const std::int64_t block = rows * 12 * 8 + modulation + routed * (8 + 12) + rows * (20 + 8);
  const std::int64_t tape = 3 * block + rows * (24 + 8 + 8);
  CHECK(dit::activation_bytes(m, 2, false) == 4 * (tape + probabilities));  // more than routed · 6
  CHECK(dit::activation_bytes(m, 2, true) == 4 * (tape + routed * (16 + 18) + rows * (56 + 8)));
  CHECK(dit::inference_bytes(m, 2) == 2 * dit::trainable_parameters(m) + dit::activation_bytes(m, 1, false));
  CHECK(dit::training_bytes(m, 2) == 20 * dit::trainable_parameters(m) + dit::activation_bytes(m, 2, true));

  m.feed_forward = "dense";
  m.model.qk_norm = true;
  const std::int64_t dense_block = rows * (12 * 8 + 2 * (8 + 2)) + modulation + rows * 6;
  const std::int64_t dense_tape = 3 * dense_block + rows * (24 + 8 + 8);
  CHECK(dit::activation_bytes(m, 2, false) == 4 * (dense_tape + probabilities));
  CHECK(dit::activation_bytes(m, 2, true) == 4 * (dense_tape + rows * (56 + 8) + 2 * probabilities));
}

TEST_CASE("activation_bytes: the probabilities of many images are not there at once") {
  NamedModel m = named_model("DiT-S/2");
  m.model.heads = 12;  // five images at a time
  const auto one_more = [&](std::int64_t batch) {
    return dit::activation_bytes(m, batch + 1, false) - dit::activation_bytes(m, batch, false);
  };
  CHECK(one_more(1) - one_more(5) == 4LL * 12 * 256 * 256);
}

TEST_CASE("print_zoo: an aligned table") {
  std::ostringstream out;
  dit::print_zoo(out);
  std::istringstream in(out.str());
  std::string line;
  std::size_t rows = 0;
  std::size_t width = 0;
  while (std::getline(in, line) && !line.empty()) {
    width = width == 0 ? line.size() : width;
    CHECK(line.size() == width);
    ++rows;
  }
  CHECK(rows == dit::zoo.size() + 2);
  CHECK(out.str().find(
            "| S/2-8E2A  |     12 |   384 |     6 |    199,307,552 |  199M |    71,905,568 |   71M |  15.43 |   15.4 |") !=
        std::string::npos);
}

TEST_CASE("print_zoo: the same in every locale") {
  std::ostringstream expected;
  dit::print_zoo(expected);
  const dit::test::CommaLocale comma;
  std::ostringstream out;
  dit::print_zoo(out);
  CHECK(out.str() == expected.str());
}

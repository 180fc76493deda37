// SPDX-License-Identifier: MIT
//
// Lesson 6: who goes where.
//
// T tokens in sequences of L_b, E experts. A plan is a list of (token t, expert i, weight); routers differ in who chooses:
//
//     top-k          token t takes the K largest of s_t = softmax(x_t Wgᵀ)                        weight s_ti
//     capacity       the same, but expert i keeps C_b = ⌈cf K L_b / E⌉ tokens of sequence b; others are dropped
//     DeepSeek-V3    token t takes the K largest of sigmoid(x_t Wgᵀ) + b from its best groups     sigmoids over their sum
//     expert choice  expert i takes the C_b = ⌈cf L_b / E⌉ tokens of the largest s_ti             weight s_ti
//     hash           token t goes to expert hash(id_t) mod E                                      weight 1
//     cluster        token t goes to its K nearest centroids μ_i                                  ∝ exp(-‖x_t - μ_i‖²/τ)
//     timestep       sequence b takes the K largest of s_b = softmax(silu(c_b) Wᵀ + bias)         weight s_bi
//     Soft MoE       token t takes all slots n: row t of C (T,N)                                  weight C_tn
//
// A digit is a weight in tenths, # is 1, x a dropped pair. With a folder as argument, gnuplot draws each plan into it.
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <locale>
#include <moxie/moxie.hpp>
#include <sstream>
#include <stdexcept>

using moxie::Index, moxie::Matrix;
constexpr Index T = 24, D = 8, E = 6, K = 2;
static const std::vector<Index> starts{0, 10, T};  // two sequences
static bool drawing = false;                       // into the current folder
static bool right = true;

static void check(bool holds, const char* claim) {
  std::printf("  %s: %s\n\n", claim, holds ? "yes" : "NO");
  right = right && holds;
}

static void draw(const std::string& name, const std::string& title, const Matrix<double>& weight) {
  std::ostringstream script;
  script.imbue(std::locale::classic());
  script << "set encoding utf8\nset terminal pngcairo noenhanced font 'DejaVu Sans,11' size 560,214\n"
         << "set output 'plan_" << name << ".png'\nset title \"" << title << "\" font ',13'\n"
         << "set lmargin at screen 0.104\nset rmargin at screen 0.961\nset tmargin at screen 0.813\n"
         << "set bmargin at screen 0.252\nset border lc rgb '#808080'\nset tics scale 0 textcolor rgb '#303030'\nset xtics "
            "4\nset ytics 1\n"
         << "unset key\nset xlabel 'token' offset 0,0.5\nset ylabel 'expert'\n"
         << "set xrange [-0.5:23.5]\nset yrange [5.5:-0.5]\nset cbrange [0:1]\nunset colorbox\n"
         << "set palette defined (0 '#F4F4F4', 0.01 '#DEEBF7', 0.3 '#9ECAE1', 0.6 '#4292C6', 1 '#08306B')\n"
         << "set arrow from 9.5,-0.5 to 9.5,5.5 nohead front lw 2 lc rgb '#303030'\n$w << EOD\n"
         << weight << "\nEOD\nplot $w matrix using 1:2:($1-.46):($1+.46):($2-.46):($2+.46):($3 < 0 ? 0 : $3) with boxxyerror "
         << "fill solid noborder fc palette, $w matrix using ($3 < 0 ? $1 : 1/0):2 with points pt 2 lw 2 lc rgb '#CC3311'\n";
  std::signal(SIGPIPE, SIG_IGN);  // where gnuplot is missing, the write fails
  std::FILE* gnuplot = popen("gnuplot", "w");
  if (gnuplot == nullptr || std::fputs(script.str().c_str(), gnuplot) < 0 || pclose(gnuplot) != 0) {
    throw std::runtime_error("gnuplot is missing, or failed");
  }
}

static void show(const std::string& name, const std::string& title, const Matrix<double>& weight) {  // (E,T), -1: dropped
  std::printf("%s\n", title.c_str());
  for (Index e = 0; e < E; ++e) {
    std::printf("  expert %td  ", e);
    for (Index t = 0; t < T; ++t) {
      const double w = weight(e, t);
      const char digit = w >= 1 - 1e-9 ? '#' : char('0' + int(10 * w));
      std::printf("%s%c", t == starts[1] ? " | " : "", w < 0 ? 'x' : w > 0 ? digit : '.');
    }
    std::printf("  %2td tokens\n", (weight.row(e).array() > 0).count());
  }
  if (drawing) {
    draw(name, title, weight);
  }
}

template <class Layer>
static Matrix<double> run(const char* name, const char* title, const Layer& layer, const moxie::Tokens<double>& in) {
  Matrix<double> weight = Matrix<double>::Zero(E, T), y(T, D);
  auto tape = layer.make_tape(T);
  layer.forward(in, y, tape, {.threads = 1});
  const auto& plan = tape.plan();
  if constexpr (requires { plan.combine(); }) {
    weight = plan.combine().eigen().transpose();  // (N,T), one slot an expert
  } else {
    if constexpr (requires { tape.router().places(); }) {
      for (Index pair = 0; pair < T * K; ++pair) {
        weight(tape.router().choices()[std::size_t(pair)], pair / K) = -1;  // unless it is in the plan
      }
    }
    for (Index e = 0; e < E; ++e) {
      for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e + 1)]; ++r) {
        weight(e, plan.token(r)) = plan.weight(r);
      }
    }
  }
  show(name, title, weight);
  return weight;
}

int main(int argc, char** argv) try {
  drawing = argc > 1;
  if (drawing) {
    std::filesystem::create_directories(argv[1]);
    std::filesystem::current_path(argv[1]);
  }
  const Matrix<double> x = moxie::random_normal<double>(T, D, moxie::Rng{2});
  moxie::Tokens<double> in(x, starts);
  const auto load = [](const Matrix<double>& w) -> Matrix<double> { return (w.array() > 0).cast<double>().rowwise().sum(); };
  const auto start = [](auto layer) {  // the same gate for all that have one, sharper than it begins
    layer.initialize(moxie::Rng{5});
    layer.parameters()["gate.weight"].eigen() *= 3;
    return layer;
  };
  moxie::TopKMoE<double>::Config config{.model_dim = D, .experts = E, .top_k = K, .expert = {.hidden_dim = 4}};
  const auto all = run("top_k", "Top-k: every token takes 2 experts", start(moxie::TopKMoE<double>(config)), in);
  check(load(all).sum() == T * K, "every token has K experts");

  config.capacity.factor = 0.5;
  const moxie::TopKMoE<double> by_order(config);
  config.capacity.priority = moxie::Priority::weight;
  const moxie::TopKMoE<double> by_weight(config);
  const auto first = run("capacity", "Capacity factor 0.5: tokens in order", start(by_order), in);
  const auto best = run("batch_priority", "Capacity factor 0.5: batch priority", start(by_weight), in);
  check(load(best.leftCols(10)).maxCoeff() == double(moxie::expert_capacity(10 * K, E, config.capacity)),
        "C is the largest load");
  check(load(first) == load(best) && first.sum() < best.sum(), "batch priority drops as many pairs, and keeps more weight");

  moxie::SharedExpertMoE<double>::Config v3{.model_dim = D, .experts = E, .top_k = K, .expert = {4}, .shared = {4}};
  v3.score = moxie::Score::sigmoid;
  v3.groups = {.count = 3, .chosen = 2};
  v3.normalize = v3.selection_bias = true;
  moxie::SharedExpertMoE<double> deepseek = start(moxie::SharedExpertMoE<double>(v3));
  auto tape = deepseek.make_tape();
  Matrix<double> y(T, D);
  for (int step = 0; step < 200; ++step) {
    deepseek.forward(in, y, tape, {.threads = 1});
    moxie::update_selection_bias(deepseek.parameters()["gate.e_score_correction_bias"], tape.plan().tokens_per_expert(), 0.001);
  }
  const auto even = run("deepseek", "DeepSeek-V3: 2 of 3 groups, bias after 200 steps", deepseek, in);
  check(load(even).maxCoeff() < load(all).maxCoeff(), "the selection bias makes the load more even");

  moxie::ExpertChoiceMoE<double> chooses({.model_dim = D, .experts = E, .expert = {4}, .capacity = {.factor = 2}});
  const auto taken = run("expert_choice", "Expert choice: capacity factor 2", start(chooses), in);
  check(load(taken).maxCoeff() == load(taken).minCoeff(), "all loads are equal");

  const moxie::SwiGluExperts<double> bank(E, D, {.hidden_dim = 4});
  const moxie::Moe hash(moxie::HashRouter<double>({.experts = E}), bank);
  const std::vector<std::int64_t> ids{3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4};
  in.ids = ids;  // of words, say
  const auto hashed = run("hash", "Hash: by the token's id", hash, in);
  check(hashed.col(1) == hashed.col(3), "tokens of one id go to one expert");
  moxie::Moe cluster(moxie::ClusterRouter<double>({.feature_dim = D, .experts = E, .top_k = 2, .of_tokens = true}), bank);
  cluster.parameters()["centroids"].eigen() = moxie::balanced_k_means<double>(x, E, moxie::Rng{3}).centroids;
  const auto near = run("cluster", "Cluster: the 2 nearest of 6 centroids", cluster, in);
  check((near.colwise().sum().array() - 1).abs().maxCoeff() < 1e-12, "the weights of a token sum to 1");

  const moxie::TimestepMoE<double> timestep({.model_dim = D, .condition_dim = 4, .experts = E, .top_k = K});
  const Matrix<double> condition = moxie::random_normal<double>(2, 4, moxie::Rng{4});  // (B,C)
  in.condition = condition;
  const auto agreed = run("timestep", "Timestep: each sequence takes 2 experts", start(timestep), in);
  check(agreed.col(0) == agreed.col(9) && agreed.col(10) == agreed.col(T - 1), "all tokens of a sequence agree");

  moxie::SoftMoE<double> soft({.model_dim = D, .experts = E, .expert = {.hidden_dim = 4}, .normalize = false});
  soft.initialize(moxie::Rng{5});
  const auto mixed = run("soft_moe", "Soft MoE: every token mixes all slots", soft, in);
  check((mixed.colwise().sum().array() - 1).abs().maxCoeff() < 1e-12, "the weights of a token sum to 1");
  return right ? 0 : 1;
} catch (const std::exception& error) {  // no gnuplot, say
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}

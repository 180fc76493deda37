// SPDX-License-Identifier: MIT
//
// Lesson 8: a whole diffusion transformer with mixtures of experts. It learns to draw clothes in minutes.
//
// Rectified flow (Liu et al. 2022). A straight path leads from an image x at t = 0 to noise z at t = 1. A
// network v learns the velocity along the path. Drawing walks the path back, from noise to an image:
//
//     x_t = (1 - t) x + t z,   loss = mean (v(x_t, t, label) - (z - x))²,   x_{t-Δ} = x_t - Δ v
//
// The network is DiT (Peebles and Xie 2023) with the feed-forward of DiT-MoE (Fei et al. 2024). The patches
// of an image are its tokens:
//
//     x  = patches W + b + position,   c = silu(embedding of t + embedding of the label)
//     x += gate1 · attention(norm(x) (1 + scale1) + shift1)        in every block, with its six modulations
//     x += gate2 · moe(norm(x) (1 + scale2) + shift2)              shift1, scale1, gate1, ... = c W + b
//     v  = (norm(x) (1 + scale) + shift) W + b                     with two more modulations
//
//     moe(h)_t = Σ_{i in the K largest of s_t} s_ti f_i(h_t) + f_shared(h_t),   s = softmax(h Wgᵀ)
//
// B images of H x H pixels have L = (H / p)² patches each: T = B·L rows of width D. The modulations start at
// zero, so that every block starts as the identity ("adaLN-Zero"). Linear layers, norms, attention,
// embeddings and AdamW are in nn/, each with its gradient.
//
//     08_minimal_dit [FOLDER [STEPS]]      writes FOLDER/samples.png and FOLDER/routing.png
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <moxie/moxie.hpp>
#include <nn/nn.hpp>
#include <string>
#include <vector>

using moxie::Index;
using moxie::Layout;
using moxie::Matrix;
using moxie::Parameters;
using moxie::ParameterView;
using moxie::Rng;
using moxie::RowView;
using Images = Matrix<float>;  // (n,H·H), a row an image
using Weights = Parameters<float>;

struct Shape {
  Index image = 28, patch = 4, classes = 10;  // H, p; the label `classes` means "no class"
  Index dim = 128, depth = 4, heads = 4;      // D
  Index experts = 8, top_k = 2, hidden = 128;

  Index grid() const { return image / patch; }
  Index tokens() const { return grid() * grid(); }  // L
  Index pixels() const { return image * image; }
  Index patch_pixels() const { return patch * patch; }
};

/// Modulation i of the matrix m (B, 6D or 2D), which has them side by side: (B,D).
template <class T>
RowView<T> modulation(RowView<T> m, Index i, Index dim) {
  return {m.data() + i * dim, m.rows(), dim, m.stride()};
}

/// One block. It keeps what a forward computes for the backward that follows.
template <class S>
class Block {
 public:
  Block(Layout& layout, const std::string& name, const Shape& shape)
      : norm_{shape.tokens()},
        modulation_(layout, name + "modulation", shape.dim, 6 * shape.dim),
        attention_(layout, name + "attention.", shape.dim, shape.heads, shape.tokens(), false),
        moe_({.model_dim = shape.dim,
              .experts = shape.experts,
              .top_k = shape.top_k,
              .expert = {.hidden_dim = shape.hidden},
              .shared = {.hidden_dim = 2 * shape.hidden},
              .balance = {.expert_level = 0.01}}),
        moe_part_(layout.add_part(name + "moe.", moe_.layout())) {}

  /// The modulations stay zero.
  void initialize(ParameterView<S> p, const Rng& rng) const {
    attention_.initialize(p, rng);
    moe_.initialize(moe_part(p), rng.split(1));
  }

  /// x (T,D) after the block, from x (T,D) and the condition c (B,D).
  RowView<const S> forward(ParameterView<const S> p, RowView<const S> x, RowView<const S> c) {
    const Index D = x.cols();
    m_.resize(c.rows(), 6 * D);
    for (Matrix<S>* m : {&h1_, &attended_, &x1_, &h2_, &mixed_, &x2_}) {
      m->resize(x.rows(), D);
    }
    const auto m = [&](Index i) { return modulation<const S>(m_, i, D); };  // (B,D)
    modulation_.forward(p, c, m_);                                          // (B,D)(D,6D) -> (B,6D)

    norm_.forward(x, m(0), m(1), h1_, norm1_);                         // (T,D)
    attention_.forward(p, h1_, attended_, attention_tape_, scratch_);  // (T,D) -> (T,D)
    nn::add_gated<S>(x, m(2), attended_, x1_);                         // (T,D)

    norm_.forward(x1_, m(3), m(4), h2_, norm2_);                  // (T,D)
    moe_.forward(moe_part(p), h2_, mixed_, moe_tape_, scratch_);  // (T,D) -> (T,D)
    nn::add_gated<S>(x1_, m(5), mixed_, x2_);                     // (T,D)
    return x2_;
  }

  /// The same backwards. d (T,D), the gradient of the output, becomes that of x. dc (B,D) += that of c.
  void backward(ParameterView<const S> p, RowView<const S> c, RowView<S> d, RowView<S> dc, ParameterView<S> dp) {
    const Index D = d.cols();
    Matrix<S> dm_(c.rows(), 6 * D), df(d.rows(), D), dh(d.rows(), D);
    const auto m = [&](Index i) { return modulation<const S>(m_, i, D); };
    const auto dm = [&](Index i) { return modulation<S>(dm_, i, D); };

    nn::add_gated_backward<S>(m(5), mixed_, d, df, dm(5));
    moe_.backward(moe_part(p), h2_, df, {dh, moe_part(dp)}, moe_tape_, scratch_);
    norm_.backward(m(4), dh, dm(3), dm(4), d, norm2_);  // adds to d, which the residual path has

    nn::add_gated_backward<S>(m(2), attended_, d, df, dm(2));
    attention_.backward(p, h1_, df, dh, dp, attention_tape_, scratch_);
    norm_.backward(m(1), dh, dm(0), dm(1), d, norm1_);

    modulation_.backward(p, c, dm_, dc, dp, {}, true);
  }

  /// It is smallest when all experts have the same load. The gradient has it beside the loss.
  double balance_loss() const { return moe_tape_.balance_loss(); }
  /// The expert that counts most for a token of the last forward.
  Index first_choice(Index token) const {
    return moe_tape_.router().choices()[std::size_t(token * moe_.router().config().top_k)];
  }

 private:
  template <class T>
  ParameterView<T> moe_part(ParameterView<T> p) const {
    return p.part(moe_part_, moe_.layout());
  }

  nn::ModulatedNorm<S> norm_;
  nn::Linear<S> modulation_;
  nn::SelfAttention<S> attention_;
  moxie::SharedExpertMoE<S> moe_;
  Index moe_part_;
  // What the last forward computed:
  Matrix<S> m_, h1_, attended_, x1_, h2_, mixed_, x2_;
  typename nn::ModulatedNorm<S>::Tape norm1_, norm2_;
  typename nn::SelfAttention<S>::Tape attention_tape_;
  typename moxie::SharedExpertMoE<S>::Tape moe_tape_;
  moxie::Workspace scratch_;
};

/// The transformer: v(x_t, t, label).
template <class S>
class DiT {
 public:
  explicit DiT(const Shape& shape)
      : shape_(shape),
        norm_{shape.tokens()},
        patch_embedding_(layout_, "patches", shape.patch_pixels(), shape.dim),
        time_embedding_(layout_, "time", shape.dim),
        label_embedding_(layout_, "labels", shape.classes + 1, shape.dim),
        final_modulation_(layout_, "final_modulation", shape.dim, 2 * shape.dim),
        final_(layout_, "final", shape.dim, shape.patch_pixels()),
        position_(nn::position_embedding<S>(shape.grid(), shape.dim)) {
    for (Index i = 0; i < shape.depth; ++i) {
      blocks_.emplace_back(layout_, "blocks." + std::to_string(i) + ".", shape);
    }
  }

  const Shape& shape() const { return shape_; }
  const Layout& layout() const { return layout_; }
  const Block<S>& block(Index i) const { return blocks_[std::size_t(i)]; }

  /// The final layer stays zero, as the modulations do.
  Parameters<S> initial_weights(const Rng& rng) const {
    Parameters<S> p(layout_);
    patch_embedding_.initialize(p, rng);
    time_embedding_.initialize(p, rng);
    label_embedding_.initialize(p, rng);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      blocks_[i].initialize(p, rng.split(i));
    }
    return p;
  }

  /// The velocity v (B,H·H) of noisy images (B,H·H) at times t (B) with labels (B).
  Matrix<S> forward(ParameterView<const S> p, const Matrix<S>& images, const std::vector<S>& t,
                    const std::vector<Index>& labels) {
    const Index B = images.rows(), L = shape_.tokens(), D = shape_.dim;
    labels_ = labels;
    sum_.resize(B, D);
    c_.resize(B, D);
    time_embedding_.forward(p, t, sum_, time_tape_);  // (B) -> (B,D)
    label_embedding_.add(p, labels, sum_);            // (B) -> (B,D)
    nn::activate<moxie::Silu, S>(sum_, c_);           // (B,D)

    patches_.resize(B * L, shape_.patch_pixels());
    nn::patchify<S>(images, shape_.image, shape_.patch, patches_);  // (B,H·H) -> (T,p²)
    x0_.resize(B * L, D);
    patch_embedding_.forward(p, patches_, x0_);  // (T,p²)(p²,D) -> (T,D)
    for (Index b = 0; b < B; ++b) {
      x0_.middleRows(b * L, L) += position_;  // (L,D)
    }

    RowView<const S> x = x0_;
    for (Block<S>& block : blocks_) {
      x = block.forward(p, x, c_);  // (T,D) -> (T,D)
    }

    m_.resize(B, 2 * D);
    h_.resize(B * L, D);
    Matrix<S> out(B * L, shape_.patch_pixels()), v(B, shape_.pixels());
    final_modulation_.forward(p, c_, m_);  // (B,D)(D,2D) -> (B,2D)
    norm_.forward(x, modulation<const S>(m_, 0, D), modulation<const S>(m_, 1, D), h_, norm_tape_);
    final_.forward(p, h_, out);                             // (T,D)(D,p²) -> (T,p²)
    nn::unpatchify<S>(out, shape_.image, shape_.patch, v);  // (T,p²) -> (B,H·H)
    return v;
  }

  /// dp += the gradient of ⟨v, dv⟩ + the balance losses of the blocks, with the v of the last forward.
  void backward(ParameterView<const S> p, const Matrix<S>& dv, ParameterView<S> dp) {
    const Index B = dv.rows(), T = B * shape_.tokens(), D = shape_.dim;
    Matrix<S> dout(T, shape_.patch_pixels()), dh(T, D), d = Matrix<S>::Zero(T, D), dm(B, 2 * D), dc(B, D);
    nn::patchify<S>(dv, shape_.image, shape_.patch, dout);
    final_.backward(p, h_, dout, dh, dp);
    norm_.backward(modulation<const S>(m_, 1, D), dh, modulation<S>(dm, 0, D), modulation<S>(dm, 1, D), d, norm_tape_);
    final_modulation_.backward(p, c_, dm, dc, dp);
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      block->backward(p, c_, d, dc, dp);
    }
    patch_embedding_.backward(patches_, d, dp);
    nn::activate_backward<moxie::Silu, S>(sum_, dc);
    label_embedding_.backward(labels_, dc, dp);
    time_embedding_.backward(p, dc, dp, time_tape_, scratch_);
  }

 private:
  Shape shape_;
  Layout layout_;
  nn::ModulatedNorm<S> norm_;
  nn::Linear<S> patch_embedding_;
  nn::TimestepEmbedding<S> time_embedding_;
  nn::LabelEmbedding<S> label_embedding_;
  nn::Linear<S> final_modulation_, final_;
  Matrix<S> position_;
  std::vector<Block<S>> blocks_;
  // What the last forward computed:
  std::vector<Index> labels_;
  Matrix<S> sum_, c_, patches_, x0_, m_, h_;
  typename nn::TimestepEmbedding<S>::Tape time_tape_;
  typename nn::ModulatedNorm<S>::Tape norm_tape_;
  moxie::Workspace scratch_;
};

/// Trains on 48 random images a step. Returns the moving average of the weights.
Weights train(DiT<float>& model, const nn::ImageSet& data, Index steps) {
  constexpr Index B = 48;
  Weights weights = model.initial_weights(Rng{1}), grads = weights.zeros_like();
  const nn::TensorRule rule{.schedule = nn::cosine_decay(100, steps, 0.05)};
  nn::AdamW<float> adam({.rate = 2e-3}, weights, [&](auto&&) { return rule; });
  Images x(B, model.shape().pixels()), z = x, noisy = x;
  std::vector<float> times(B);
  std::vector<Index> labels(B);
  for (Index step = 1; step <= steps; ++step) {
    const Rng rng = Rng{2}.split(std::uint64_t(step));
    rng.split(0).fill_normal(RowView<float>(z));
    for (Index b = 0; b < B; ++b) {
      const auto i = std::uint64_t(b);
      const Index image = rng.split(1).below(data.count(), i);
      const bool dropped = rng.split(2).uniform(i) < 0.1;                 // the guidance needs v of no class too
      const auto t = float(1 / (1 + std::exp(-rng.split(3).normal(i))));  // mostly in the middle of the path
      times[std::size_t(b)] = t;
      labels[std::size_t(b)] = dropped ? model.shape().classes : Index(data.labels[std::size_t(image)]);
      x.row(b) = data.images.row(image);
      noisy.row(b) = (1 - t) * x.row(b) + t * z.row(b);
    }
    const Images error = model.forward(weights, noisy, times, labels) - (z - x);  // (B,H·H)
    grads.set_zero();
    model.backward(weights, error * (2 / float(error.size())), grads);
    adam.step(weights, grads);
    if (step % 50 == 0) {
      std::printf("step %4d of %d, loss %.3f\n", int(step), int(steps), double(error.cwiseAbs2().mean()));
    }
  }
  return adam.ema();
}

/// Draws an image for each label, in 25 Euler steps with classifier-free guidance (Ho and Salimans 2022):
///
///     v = v(no class) + 3 (v(label) - v(no class))
///
/// `watch(t, x, v)` sees x before each step.
template <class Watch>
Images sample(DiT<float>& model, const Weights& weights, const std::vector<Index>& labels, Watch&& watch) {
  constexpr Index steps = 25;
  const auto n = Index(labels.size());
  std::vector<Index> both = labels;
  both.resize(2 * labels.size(), model.shape().classes);
  Images x = moxie::random_normal<float>(n, model.shape().pixels(), Rng{3}), twice(2 * n, x.cols());
  for (Index i = steps; i >= 1; --i) {
    const float t = float(i) / float(steps);
    twice << x, x;
    const Images v = model.forward(weights, twice, std::vector<float>(both.size(), t), both);
    const Images guided = v.bottomRows(n) + 3 * (v.topRows(n) - v.bottomRows(n));
    watch(t, x, guided);
    x -= guided / float(steps);
  }
  return x;
}

/// samples.png: ten images of each class in a row. routing.png: for the first of them, at t = 1, .88, ..., .04,
/// the image that the network expects, x_t - t v, each patch in the color of the expert that counts most for
/// it in the second block.
void draw(DiT<float>& model, const Weights& weights, const std::filesystem::path& folder) {
  const Shape& shape = model.shape();
  const Index H = shape.image, g = shape.grid();
  std::vector<Index> labels;
  for (Index i = 0; i < 10 * shape.classes; ++i) {
    labels.push_back(i / 10);
  }
  nn::Picture samples(20 * H, 2 * shape.classes * H), routing(18 * H, 2 * shape.classes * H);
  Index step = 0;
  const auto watch = [&](float t, const Images& x, const Images& v) {
    if (step++ % 3 == 0) {
      const Images expected = x - t * v;
      for (Index b = 0; b < expected.rows(); b += 10) {
        routing.paint(b / 10, step / 3, &expected(b, 0), H, 2, [&](Index pixel) {
          const Index token = (b * g + pixel / H / shape.patch) * g + pixel % H / shape.patch;
          return nn::palette(model.block(1).first_choice(token));
        });
      }
    }
  };
  const Images images = sample(model, weights, labels, watch);
  for (Index b = 0; b < images.rows(); ++b) {
    samples.paint(b / 10, b % 10, &images(b, 0), H, 2);
  }
  std::filesystem::create_directories(folder);
  nn::write_png(folder / "samples.png", samples);
  nn::write_png(folder / "routing.png", routing);
}

int main(int argc, char** argv) {
  const nn::ImageSet data = nn::fashion_mnist_or_shapes();
  std::printf("%s\n", data.origin.c_str());
  DiT<float> model(Shape{});
  const Weights weights = train(model, data, argc > 2 ? std::atoi(argv[2]) : 1000);
  draw(model, weights, argc > 1 ? argv[1] : "out/minimal_dit");
  return weights.flat().isFinite().all() ? 0 : 1;
}

// SPDX-License-Identifier: MIT
#include "device_layer.hpp"

#include <moxie/cuda/cuda.hpp>

#include "../quick_gelu.hpp"

namespace moxie::test {
namespace {

#if defined(__CUDACC__)
cuda::DeviceExec& device() {
  static const cublasHandle_t handle = [] {
    cublasHandle_t made = nullptr;
    cuda::detail::expect_success(cublasCreate(&made), "cublasCreate");
    return made;
  }();
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    cuda::detail::expect_success(cudaStreamCreate(&made), "cudaStreamCreate");
    return made;
  }();
  static cuda::DeviceExec exec(stream, handle);
  return exec;
}
#else
cuda::DeviceExec& device() {
  static cuda::DeviceExec exec;
  return exec;
}
#endif

template <class T, class To>
void read(const T* from, Index n, std::vector<To>& to) {
  std::vector<T> numbers(static_cast<std::size_t>(n));
  device().read(from, numbers.data(), n);
  to.assign(numbers.begin(), numbers.end());
}

template <class Layer>
class Implementation final : public DeviceLayer<typename Layer::Scalar> {
 public:
  using Scalar = typename Layer::Scalar;

  explicit Implementation(const typename Layer::Config& config)
      : layer_(config), weights_(device(), layer_.layout()), grads_(device(), layer_.layout()) {}

  const Layout& layout() const override { return layer_.layout(); }

  void forward(const Scalar* p, const DeviceInput<Scalar>& input, Scalar* y, bool frozen) override {
    auto& exec = device();
    const Index tokens = input.sequences.tokens();
    weights_.upload(exec, p);
    const auto in = tokens_of(input);
    const cuda::DeviceRows<Scalar> out(y_.resize(exec, tokens * dim()), tokens, dim());
    exec.upload(y, out.data, tokens * dim());  // what must not be read
    if (frozen) {
      const auto packed = layer_.freeze(exec, weights_);
      weights_.set_zero(exec);  // nothing refers to these
      exec.reset_counts();
      layer_.forward(exec, packed, in, out, tape_);
    } else {
      exec.reset_counts();
      layer_.forward(exec, weights_, in, out, tape_);
    }
    take_cost();
    exec.read(out.data, y, tokens * dim());
  }

  void backward(const Scalar* p, const DeviceInput<Scalar>& input, const Scalar* dy, Scalar* dx, Scalar* grads) override {
    auto& exec = device();
    const Index tokens = input.sequences.tokens();
    weights_.upload(exec, p);
    grads_.upload(exec, grads);
    const auto in = tokens_of(input);
    const cuda::DeviceRows<Scalar> to(y_.resize(exec, tokens * dim()), tokens, dim());
    exec.upload(dx, to.data, tokens * dim());
    const cuda::DeviceRows<Scalar> from(dy_.resize(exec, tokens * dim()), tokens, dim());
    exec.upload(dy, from.data, tokens * dim());
    exec.reset_counts();
    layer_.backward(exec, weights_, in, from, {to, grads_}, tape_);
    take_cost();
    exec.read(to.data, dx, tokens * dim());
    grads_.download(exec, grads);
  }

  double balance_loss() override { return tape_.balance_loss(device()); }

  void expect_finite() override {
    if constexpr (requires { tape_.router().expect_finite(device()); }) {
      tape_.router().expect_finite(device());
    }
  }

  DeviceRouting<Scalar> routing() override {
    DeviceRouting<Scalar> out;
    const auto& plan = tape_.plan();
    out.tokens = plan.tokens();
    for (Index t = 0; t < plan.tokens(); ++t) {
      out.row.push_back(tape_.row(t));
    }
    if constexpr (requires { plan.slot_count(); }) {
      read(plan.dispatch().data, plan.tokens() * plan.slot_count(), out.dispatch);
      read(plan.combine().data, plan.tokens() * plan.slot_count(), out.combine);
    } else {
      read(plan.token(), plan.rows(), out.token);
      read(plan.expert(), plan.rows(), out.expert);
      read(plan.weight(), plan.rows(), out.weight);
      read(tape_.router().scores(), plan.tokens() * plan.experts(), out.scores);
      if constexpr (requires { tape_.router().top_k(); }) {
        const Index pairs = plan.tokens() * tape_.router().top_k();
        read(plan.rows_of_token().rows, pairs, out.row_of_pair);
        read(tape_.router().choices(), pairs, out.choices);
        if (tape_.router().places() != nullptr) {
          read(tape_.router().places(), pairs, out.places);
        }
      }
    }
    return out;
  }

  DeviceCost cost() const override { return cost_; }

 private:
  Index dim() const { return layer_.model_dim(); }

  cuda::DeviceTokens<Scalar> tokens_of(const DeviceInput<Scalar>& input) {
    auto& exec = device();
    const Index tokens = input.sequences.tokens();
    exec.upload(input.x, x_.resize(exec, tokens * dim()), tokens * dim());
    cuda::DeviceTokens<Scalar> in(cuda::DeviceRows<const Scalar>(x_.data(), tokens, dim()), input.sequences);
    in.mask = input.mask;
    in.training = input.training;
    in.rng = cuda::DeviceRng(input.seed, input.stream);
    in.top_k = input.top_k;
    if (input.noise != nullptr) {
      const Index n = tokens * layer_.router().experts();
      exec.upload(input.noise, noise_.resize(exec, n), n);
      in.noise = {noise_.data(), tokens, layer_.router().experts()};
    }
    return in;
  }
  void take_cost() {
    const cuda::DeviceCounts& c = device().counts();
    cost_ = {c.launches, c.products, c.allocations, c.bytes, c.synchronizations};
  }

  Layer layer_;
  typename Layer::Tape tape_;
  cuda::DeviceParameters<Scalar> weights_, grads_;
  cuda::DeviceBuffer<Scalar> x_, noise_, y_, dy_;
  DeviceCost cost_;
};

/// Nothing for options of other experts.
template <class Layer, class Config>
std::unique_ptr<DeviceLayer<typename Layer::Scalar>> make(const Config& config) {
  if constexpr (std::is_same_v<Config, typename Layer::Config>) {
    return std::make_unique<Implementation<Layer>>(config);
  } else {
    return nullptr;
  }
}

template <class S>
using Made = std::unique_ptr<DeviceLayer<S>>;

// The combinations that the tests look at: every layer, and every kind of expert once.
template <class S, class Expert>
Made<S> make_one(const TopKMoEConfig<Expert>& config, DeviceExperts experts, bool bfloat16) {
  if constexpr (std::is_same_v<S, float>) {
    if (bfloat16 && experts == DeviceExperts::swiglu) {
      return make<cuda::TopKMoE<S, cuda::SwiGluExperts<S, BFloat16>>>(config);
    }
    if (bfloat16 && experts == DeviceExperts::quick_glu) {
      return make<cuda::TopKMoE<S, cuda::GluExperts<S, QuickGelu, BFloat16>>>(config);
    }
  }
  if (experts == DeviceExperts::swiglu) {
    return make<cuda::TopKMoE<S>>(config);
  }
  if (experts == DeviceExperts::quick_glu) {
    return make<cuda::TopKMoE<S, cuda::GluExperts<S, QuickGelu>>>(config);
  }
  if (experts == DeviceExperts::clamped_swiglu) {
    return make<cuda::TopKMoE<S, cuda::ClampedSwiGluExperts<S>>>(config);
  }
  if (experts == DeviceExperts::quick_gelu) {
    return make<cuda::TopKMoE<S, cuda::MlpExperts<S, QuickGelu>>>(config);
  }
  return experts == DeviceExperts::gelu_tanh ? make<cuda::TopKMoE<S, cuda::GeluTanhExperts<S>>>(config) : nullptr;
}
template <class S, class Expert>
Made<S> make_one(const SharedExpertMoEConfig<Expert>& config, DeviceExperts experts, bool bfloat16) {
  if constexpr (std::is_same_v<S, float>) {
    if (bfloat16 && experts == DeviceExperts::gelu_tanh) {
      return make<cuda::SharedExpertMoE<S, cuda::GeluTanhExperts<S, BFloat16>>>(config);
    }
  }
  switch (experts) {
    case DeviceExperts::swiglu:
      return make<cuda::SharedExpertMoE<S, cuda::SwiGluExperts<S>>>(config);
    case DeviceExperts::geglu_tanh:
      return make<cuda::SharedExpertMoE<S, cuda::GegluTanhExperts<S>>>(config);
    case DeviceExperts::geglu_erf:
      return make<cuda::SharedExpertMoE<S, cuda::GegluErfExperts<S>>>(config);
    case DeviceExperts::reglu:
      return make<cuda::SharedExpertMoE<S, cuda::ReGluExperts<S>>>(config);
    case DeviceExperts::gelu_tanh:
      return make<cuda::SharedExpertMoE<S, cuda::GeluTanhExperts<S>>>(config);
    case DeviceExperts::gelu_erf:
      return make<cuda::SharedExpertMoE<S, cuda::GeluErfExperts<S>>>(config);
    case DeviceExperts::relu_squared:
      return make<cuda::SharedExpertMoE<S, cuda::ReluSquaredExperts<S>>>(config);
    case DeviceExperts::quick_glu:
    case DeviceExperts::clamped_swiglu:
    case DeviceExperts::quick_gelu:
      break;
  }
  return nullptr;
}
template <class S, class Expert>
Made<S> make_one(const ExpertChoiceMoEConfig<Expert>& config, DeviceExperts experts, bool /*bfloat16*/) {
  if (experts == DeviceExperts::swiglu) {
    return make<cuda::ExpertChoiceMoE<S>>(config);
  }
  return experts == DeviceExperts::gelu_tanh ? make<cuda::ExpertChoiceMoE<S, cuda::GeluTanhExperts<S>>>(config) : nullptr;
}
template <class S, class Expert>
Made<S> make_one(const SoftMoEConfig<Expert>& config, DeviceExperts experts, bool bfloat16) {
  if constexpr (std::is_same_v<S, float>) {
    if (bfloat16 && experts == DeviceExperts::gelu_tanh) {
      return make<cuda::SoftMoE<S, cuda::GeluTanhExperts<S, BFloat16>>>(config);
    }
  }
  return experts == DeviceExperts::gelu_tanh ? make<cuda::SoftMoE<S>>(config) : nullptr;
}

}  // namespace

template <class Scalar>
std::unique_ptr<DeviceLayer<Scalar>> make_device_layer(const DeviceConfig& config, DeviceExperts experts, bool bfloat16) {
  auto made = std::visit([&](const auto& c) { return make_one<Scalar>(c, experts, bfloat16); }, config);
  if (!made) {
    throw ValueError("make_device_layer: this combination of layer and experts is not compiled");
  }
  return made;
}
template std::unique_ptr<DeviceLayer<float>> make_device_layer(const DeviceConfig&, DeviceExperts, bool);
template std::unique_ptr<DeviceLayer<double>> make_device_layer(const DeviceConfig&, DeviceExperts, bool);

std::string device_name() {
#if defined(__CUDACC__)
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    return "";
  }
  cudaDeviceProp properties{};
  cuda::detail::expect_success(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return properties.name;
#else
  return "thrust-host";
#endif
}

}  // namespace moxie::test

// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <moxie/core/sequences.hpp>
#include <moxie/expert/config.hpp>
#include <moxie/kernel/gated_unit.hpp>
#include <moxie/layer/config.hpp>
#include <span>
#include <string>
#include <variant>
#include <vector>

/// The layers of the CUDA backend behind an interface of plain numbers of the host: `device_layer.cpp` may be compiled for the
/// host or by nvcc for a device, and the tests, which nvcc could not compile, are the same.
namespace moxie::test {

enum class DeviceExperts {
  swiglu,
  geglu_tanh,
  geglu_erf,
  reglu,
  quick_glu,
  clamped_swiglu,
  gelu_tanh,
  gelu_erf,
  relu_squared,
  quick_gelu
};

/// The options of the CPU's layers; the type says which layer.
using DeviceConfig =
    std::variant<TopKMoEConfig<GluConfig<>>, TopKMoEConfig<GluConfig<ClampedSwiGlu>>, TopKMoEConfig<HiddenConfig>,
                 SharedExpertMoEConfig<GluConfig<>>, SharedExpertMoEConfig<HiddenConfig>, ExpertChoiceMoEConfig<GluConfig<>>,
                 ExpertChoiceMoEConfig<HiddenConfig>, SoftMoEConfig<GluConfig<>>, SoftMoEConfig<HiddenConfig>>;

/// What a layer is given, in memory of the host.
template <class Scalar>
struct DeviceInput {
  const Scalar* x = nullptr;  // (T,D)
  Sequences sequences;
  std::span<const std::uint8_t> mask = {};
  bool training = false;
  std::uint64_t seed = 0;
  std::uint64_t stream = 0;
  const Scalar* noise = nullptr;  // (T,E)
  Index top_k = 0;
};

/// Where tokens went; those that a mask leaves.
template <class Scalar>
struct DeviceRouting {
  Index tokens = 0;
  std::vector<Index> row;            // of each token in x
  std::vector<Index> token, expert;  // of the rows
  std::vector<Scalar> weight;
  std::vector<Index> row_of_pair, choices, places;  // of token choice
  std::vector<Scalar> scores;
  std::vector<Scalar> dispatch, combine;  // of Soft MoE
};

struct DeviceCost {
  std::int64_t launches = 0;
  std::int64_t products = 0;
  std::int64_t allocations = 0;
  std::int64_t bytes = 0;
  std::int64_t synchronizations = 0;
};

/// A layer with one tape.
template <class Scalar>
class DeviceLayer {
 public:
  virtual ~DeviceLayer() = default;
  virtual const Layout& layout() const = 0;
  /// y (T,D) from x (T,D) and a block p, which `freeze` packs first with `frozen`.
  virtual void forward(const Scalar* p, const DeviceInput<Scalar>& in, Scalar* y, bool frozen = false) = 0;
  /// dx from dy; adds to the block of gradients.
  virtual void backward(const Scalar* p, const DeviceInput<Scalar>& in, const Scalar* dy, Scalar* dx, Scalar* grads) = 0;
  virtual double balance_loss() = 0;
  virtual DeviceRouting<Scalar> routing() = 0;
  /// Throws if logits of the last forward were not finite, where forward itself did not.
  virtual void expect_finite() = 0;
  /// Of the last forward or backward alone, without the copies from and to the host.
  virtual DeviceCost cost() const = 0;
};

/// With `bfloat16`, products of float layers are of such numbers. Throws ValueError for a combination that is not compiled.
template <class Scalar>
std::unique_ptr<DeviceLayer<Scalar>> make_device_layer(const DeviceConfig& config, DeviceExperts experts,
                                                       bool bfloat16 = false);
extern template std::unique_ptr<DeviceLayer<float>> make_device_layer(const DeviceConfig&, DeviceExperts, bool);
extern template std::unique_ptr<DeviceLayer<double>> make_device_layer(const DeviceConfig&, DeviceExperts, bool);

/// "thrust-host", or the name of the device; empty if there is none.
std::string device_name();

}  // namespace moxie::test

// SPDX-License-Identifier: MIT
//
// The half that nvcc compiles (as CUDA: `nvcc -x cu`, or CMake's LANGUAGE CUDA). Any other compiler makes the host build of it.
#include "device.hpp"

#include <moxie/cuda/cuda.hpp>

#include "config.hpp"

using moxie::Index;
namespace device = moxie::cuda;

// The stream and the cuBLAS handle are the program's.
#if defined(__CUDACC__)
struct Stream {
  cublasHandle_t handle = nullptr;
  Stream() { cublasCreate(&handle); }
  ~Stream() { cublasDestroy(handle); }
  device::DeviceExec exec() const { return device::DeviceExec(cudaStreamPerThread, handle); }
};
#else
struct Stream {
  static device::DeviceExec exec() { return device::DeviceExec(); }
};
#endif

Step step_on_device(const std::vector<float>& parameters, const std::vector<float>& x, const std::vector<float>& dy,
                    int length) {
  const Stream stream;
  device::DeviceExec exec = stream.exec();
  const device::SharedExpertMoE<float> layer(layer_config());
  const Index dim = layer.model_dim();
  const Index tokens = Index(x.size()) / dim;

  device::DeviceParameters<float> weights(exec, layer.layout());
  device::DeviceParameters<float> grads(exec, layer.layout());  // zeros
  weights.upload(exec, parameters.data());                      // one block, one copy

  device::DeviceBuffer<float> memory[4];
  const auto rows = [&](int i) { return device::DeviceRows<float>(memory[i].resize(exec, tokens * dim), tokens, dim); };
  const device::DeviceRows<float> in = rows(0), from = rows(1), y = rows(2), dx = rows(3);
  exec.upload(x.data(), in.data, tokens * dim);
  exec.upload(dy.data(), from.data, tokens * dim);

  auto tape = layer.make_tape();
  layer.forward(exec, weights, {in, length}, y, tape);
  layer.backward(exec, weights, {in, length}, from, {dx, grads}, tape);

  Step step{std::vector<float>(x.size()), std::vector<float>(x.size()), std::vector<float>(parameters.size())};
  exec.read(y.data, step.y.data(), tokens * dim);  // waits for the stream
  exec.read(dx.data, step.dx.data(), tokens * dim);
  grads.download(exec, step.grads.data());
  step.balance_loss = tape.balance_loss(exec);
  return step;
}

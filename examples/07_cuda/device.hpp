// SPDX-License-Identifier: MIT
#pragma once

#include <vector>

/// What main.cpp asks of the device: numbers in, numbers out, so that nvcc need not see Eigen and the CPU's kernels.
struct Step {
  std::vector<float> y, dx, grads;
  double balance_loss = 0;
};

/// A forward and a backward of the layer below over x (tokens, 64) in sequences of `length`, with parameters in the layout that
/// host and device share.
Step step_on_device(const std::vector<float>& parameters, const std::vector<float>& x, const std::vector<float>& dy,
                    int length);

// SPDX-License-Identifier: MIT
#pragma once

/// All of the optional CUDA backend; target `moxie::cuda`.
#include <moxie/cuda/layer.hpp>

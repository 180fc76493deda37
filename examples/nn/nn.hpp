// SPDX-License-Identifier: MIT
#pragma once

/// All of nn: docs/nn.md lists what there is. `fashion_mnist.hpp` and `png.hpp` need zlib.
#include <nn/activation.hpp>
#include <nn/adaln.hpp>
#include <nn/adamw.hpp>
#include <nn/attention.hpp>
#include <nn/embedding.hpp>
#include <nn/fashion_mnist.hpp>
#include <nn/generated_shapes.hpp>
#include <nn/idx.hpp>
#include <nn/image_set.hpp>
#include <nn/layer_norm.hpp>
#include <nn/linear.hpp>
#include <nn/patches.hpp>
#include <nn/png.hpp>

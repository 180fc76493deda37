// SPDX-License-Identifier: MIT
#pragma once

/// The whole library except its optional headers (moxie/io, moxie/testing, moxie/cuda). Every
/// header also compiles as the only include.
#include <moxie/core/parameters.hpp>
#include <moxie/expert/expert_bank.hpp>
#include <moxie/expert/glu.hpp>
#include <moxie/expert/linear.hpp>
#include <moxie/expert/mlp.hpp>
#include <moxie/expert/upcycle.hpp>
#include <moxie/kernel/instruction_set.hpp>
#include <moxie/layer/any_layer.hpp>
#include <moxie/layer/cost.hpp>
#include <moxie/layer/dense_feed_forward.hpp>
#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/layer.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/layer/shared_expert_moe.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/timestep_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/loss/balance.hpp>
#include <moxie/loss/diffusion_prior.hpp>
#include <moxie/loss/selection_bias.hpp>
#include <moxie/routing/cluster.hpp>
#include <moxie/routing/expert_choice.hpp>
#include <moxie/routing/given.hpp>
#include <moxie/routing/hash.hpp>
#include <moxie/routing/soft.hpp>
#include <moxie/routing/statistics.hpp>
#include <moxie/routing/top_k.hpp>
#include <moxie/routing/top_p.hpp>
#include <moxie/version.hpp>

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/field_count.hpp>
#include <moxie/expert/config.hpp>
#include <moxie/layer/config.hpp>

/// Which options of the CPU's layers a device has: all that are not refused here. `docs/cuda.md` has the table. Needs neither
/// CUDA nor Thrust, so that the half of a program which makes options can ask.
///
/// Each count of fields is that of a struct whose options have all been decided. A new option changes it: say here whether the
/// device has the option, then in the table.
namespace moxie::cuda {

/// The most groups of experts that a device can choose from.
inline constexpr Index most_groups = 64;

/// Throws ValueError that names the option if a device does not have it: more than 64 groups of experts.
inline void expect_supported(const TopKRouterConfig& config) {
  static_assert(field_count<TopKRouterConfig> == 13 && field_count<Balance> == 11 && field_count<ExpertGroups> == 3 &&
                field_count<Capacity> == 4 && field_count<GateNoise> == 2);
  if (config.groups.count > most_groups) {
    throw ValueError("moxie::cuda: groups.count is " + std::to_string(config.groups.count) + ", and a device has at most " +
                     std::to_string(most_groups) + " groups of experts");
  }
}
/// Refuses nothing.
inline void expect_supported(const ExpertChoiceRouterConfig& /*config*/) {
  static_assert(field_count<ExpertChoiceRouterConfig> == 4 && field_count<Capacity> == 4 && field_count<GateNoise> == 2);
}
/// Refuses nothing.
inline void expect_supported(const SoftRouterConfig& /*config*/) { static_assert(field_count<SoftRouterConfig> == 6); }
/// Of `GluExperts` and `MlpExperts`. Refuses nothing.
inline void expect_supported(const HiddenConfig& /*config*/) { static_assert(field_count<HiddenConfig> == 1); }
/// In the place of shared experts.
inline void expect_supported(const NoSharedExperts& /*config*/) {}

/// Throws what the options of its router and experts throw. There are no functions for the options of other layers, routers and
/// experts, which devices do not have.
template <class ExpertConfig, class SharedConfig>
void expect_supported(const TopKMoEConfig<ExpertConfig, SharedConfig>& config) {
  static_assert(field_count<TopKMoEConfig<HiddenConfig>> == 15);
  expect_supported(config.router());
  expect_supported(config.expert);
  expect_supported(config.shared);
}
template <class ExpertConfig>
void expect_supported(const ExpertChoiceMoEConfig<ExpertConfig>& config) {
  static_assert(field_count<ExpertChoiceMoEConfig<HiddenConfig>> == 5);
  expect_supported(ExpertChoiceRouterConfig{config.model_dim, config.experts, config.capacity, config.noise});
  expect_supported(config.expert);
}
template <class ExpertConfig>
void expect_supported(const SoftMoEConfig<ExpertConfig>& config) {
  static_assert(field_count<SoftMoEConfig<HiddenConfig>> == 7);
  expect_supported(SoftRouterConfig{config.model_dim, config.experts, config.slots_per_expert, config.normalize,
                                    config.dispatch, config.combine});
  expect_supported(config.expert);
}

}  // namespace moxie::cuda

// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/field_count.hpp>
#include <moxie/expert/config.hpp>
#include <moxie/layer/config.hpp>
#include <string>

/// Which options of the CPU's layers a device has: all that are not refused here. `docs/cuda.md` has the table. Needs neither
/// CUDA nor Thrust, so that the half of a program which makes options can ask.
///
/// Each count of fields is that of a struct whose options have all been decided. A new option changes it: say here whether the
/// device has the option, then in the table.
namespace moxie::inline MOXIE_NAMESPACE::cuda {

/// The most groups of experts that a device can choose from.
inline constexpr Index most_groups = 64;

namespace detail {

inline void refuse(bool used, const char* option) {
  if (used) {
    throw ValueError(std::string("moxie::cuda: a device does not have the option ") + option);
  }
}

}  // namespace detail

/// Throws ValueError that names the option if a device does not have it: `gate_dim`, `capacity.group`, more than 64 groups of
/// experts.
inline void expect_supported(const TopKRouterConfig& config) {
  static_assert(field_count<TopKRouterConfig> == 14 && field_count<Balance> == 11 && field_count<ExpertGroups> == 3 &&
                field_count<Capacity> == 5 && field_count<GateNoise> == 2);
  detail::refuse(config.gate_dim != 0, "gate_dim");
  detail::refuse(config.capacity.group != Grouping::sequence, "capacity.group");
  if (config.groups.count > most_groups) {
    throw ValueError("moxie::cuda: groups.count is " + std::to_string(config.groups.count) + ", and a device has at most " +
                     std::to_string(most_groups) + " groups of experts");
  }
}
/// Refuses `gate_dim`, `capacity.group` and `scale`.
inline void expect_supported(const ExpertChoiceRouterConfig& config) {
  static_assert(field_count<ExpertChoiceRouterConfig> == 6 && field_count<Capacity> == 5 && field_count<GateNoise> == 2);
  detail::refuse(config.gate_dim != 0, "gate_dim");
  detail::refuse(config.capacity.group != Grouping::sequence, "capacity.group");
  detail::refuse(config.scale != 1, "scale");
}
/// Refuses `gate_dim` and `scale`.
inline void expect_supported(const SoftRouterConfig& config) {
  static_assert(field_count<SoftRouterConfig> == 9);
  detail::refuse(config.gate_dim != 0, "gate_dim");
  detail::refuse(config.scale != 1, "scale");
}
/// Of `MlpExperts`. Refuses nothing.
inline void expect_supported(const HiddenConfig& /*config*/) { static_assert(field_count<HiddenConfig> == 1); }
/// Of `GluExperts`, with any gated unit. Refuses `bias`.
template <class Unit>
void expect_supported(const GluConfig<Unit>& config) {
  static_assert(field_count<GluConfig<Unit>> == (std::is_void_v<Unit> ? 2 : 3));
  detail::refuse(config.bias, "bias");
}
/// In the place of shared experts.
inline void expect_supported(const NoSharedExperts& /*config*/) {}

/// Throws what the options of its router and experts throw. There are no functions for the options of other layers, routers and
/// experts, which devices do not have.
template <class ExpertConfig, class SharedConfig>
void expect_supported(const TopKMoEConfig<ExpertConfig, SharedConfig>& config) {
  static_assert(field_count<TopKMoEConfig<HiddenConfig>> == 16);
  expect_supported(config.router());
  expect_supported(config.expert);
  expect_supported(config.shared);
}
template <class ExpertConfig>
void expect_supported(const ExpertChoiceMoEConfig<ExpertConfig>& config) {
  static_assert(field_count<ExpertChoiceMoEConfig<HiddenConfig>> == 7);
  expect_supported(config.router());
  expect_supported(config.expert);
}
template <class ExpertConfig>
void expect_supported(const SoftMoEConfig<ExpertConfig>& config) {
  static_assert(field_count<SoftMoEConfig<HiddenConfig>> == 10);
  expect_supported(config.router());
  expect_supported(config.expert);
}

}  // namespace moxie::inline MOXIE_NAMESPACE::cuda

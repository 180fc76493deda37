// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <limits>
#include <moxie/loss/config.hpp>

namespace {

using moxie::Balance;

TEST_CASE("balance: negative, infinite and NaN weights are refused, and devices that do not divide the experts") {
  const auto valid = [](const Balance& balance) {
    try {
      balance.expect_valid("f", 6);
      return true;
    } catch (const moxie::ValueError&) {
      return false;
    }
  };
  for (const double bad : {-0.1, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    CHECK_FALSE(valid({.expert_level = bad}));
    CHECK_FALSE(valid({.sequence_level = bad}));
    CHECK_FALSE(valid({.device_level = bad}));
    CHECK_FALSE(valid({.gshard = bad}));
    CHECK_FALSE(valid({.importance = bad}));
    CHECK_FALSE(valid({.load = bad}));
    CHECK_FALSE(valid({.z = bad}));
    CHECK_FALSE(valid({.mean_entropy = bad}));
    CHECK_FALSE(valid({.token_entropy = bad}));
  }
  CHECK_FALSE(valid({.devices = 4}));
  CHECK_FALSE(valid({.devices = 0}));
  CHECK(valid({.expert_level = 1, .devices = 3}));
}

}  // namespace

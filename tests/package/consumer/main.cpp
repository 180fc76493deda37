// SPDX-License-Identifier: MIT
#include <moxie/core/parameters.hpp>
#include <moxie/version.hpp>

int main() {
  moxie::Layout layout;
  layout.add("weight", {2, 3});
  const moxie::Parameters<float> parameters(layout);
  return parameters.count() == 6 && MOXIE_VERSION_MAJOR == 0 ? 0 : 1;
}

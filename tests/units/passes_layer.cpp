// SPDX-License-Identifier: MIT
// A layer that one unit makes (MAKES) and another one takes: linked together they fit only where both are compiled alike.
#include <moxie/moxie.hpp>

void take(const moxie::TopKMoE<float>& layer);

#if defined(MAKES)
int main() { take(moxie::TopKMoE<float>({.model_dim = 4, .experts = 2, .expert = {.hidden_dim = 4}})); }
#else
void take(const moxie::TopKMoE<float>& /*layer*/) {}
#endif

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <dit/reference_names.hpp>
#include <map>

using dit::Index;

TEST_CASE("file_tensors: most tensors keep their names, Switch-DiT's experts are stacked and transposed") {
  moxie::Layout layout;
  layout.add("blocks.0.attn.qkv.weight", {3, 2});
  for (const std::string block : {"routers.0.", "routers.11."}) {
    layout.add(block + "gate.weight", {2, 4});
    layout.add(block + "gate.bias", {2});
    for (const std::string expert : {"experts.0.", "experts.1."}) {
      layout.add(block + expert + "weight", {3, 4});
      layout.add(block + expert + "bias", {3});
    }
  }
  std::map<std::string, std::vector<Index>> shapes;
  Index elements = 0;
  for (const dit::FileTensor& tensor : dit::file_tensors(layout)) {
    shapes[tensor.name] = tensor.shape;
    for (const Index part : tensor.parts) {
      elements += layout.tensors()[std::size_t(part)].rows * layout.tensors()[std::size_t(part)].cols;
    }
  }
  CHECK(elements == layout.parameter_count());
  const std::map<std::string, std::vector<Index>> expected{
      {"blocks.0.attn.qkv.weight", {3, 2}}, {"routers.0.f_gate.1.weight", {2, 4}}, {"routers.0.f_gate.1.bias", {2}},
      {"routers.0.experts.w", {2, 4, 3}},   {"routers.0.experts.b", {2, 3}},       {"routers.11.f_gate.1.weight", {2, 4}},
      {"routers.11.f_gate.1.bias", {2}},    {"routers.11.experts.w", {2, 4, 3}},   {"routers.11.experts.b", {2, 3}}};
  CHECK(shapes == expected);
}

TEST_CASE("for_each_element: the file's order, expert after expert, each (in,out)") {
  moxie::Layout layout;
  layout.add("routers.0.experts.0.weight", {2, 3});
  layout.add("routers.0.experts.1.weight", {2, 3});
  moxie::Parameters<float> p(layout);
  p.view()[0].eigen() << 0, 1, 2, 3, 4, 5;
  p.view()[1].eigen() << 6, 7, 8, 9, 10, 11;
  const std::vector<dit::FileTensor> tensors = dit::file_tensors(layout);
  REQUIRE(tensors.size() == 1);
  std::vector<float> stacked(12);
  dit::for_each_element(tensors[0], p.view(), [&](Index i, float value) { stacked[std::size_t(i)] = value; });
  CHECK(stacked == std::vector<float>{0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11});
  moxie::Parameters<float> back(layout);
  dit::for_each_element(tensors[0], back.view(), [&](Index i, float& value) { value = stacked[std::size_t(i)]; });
  CHECK((back.flat() == p.flat()).all());
}

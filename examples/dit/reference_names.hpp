// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/parameters.hpp>
#include <string>
#include <string_view>
#include <vector>

/// How the checkpoints of the references store a model's parameters.
///
/// Most tensors are the model's own, under the same name. Switch-DiT's masks are not: the references keep all experts of a
/// block in one tensor, in by out, and call the gate otherwise:
///
///     routers.i.experts.e.weight (out,in), for e < E    routers.i.experts.w (E,in,out)
///     routers.i.experts.e.bias   (out)                  routers.i.experts.b (E,out)
///     routers.i.gate.*                                  routers.i.f_gate.1.*
namespace dit {

using moxie::Index;

/// A tensor of a checkpoint, and what it holds of a model's block of parameters.
struct FileTensor {
  std::string name;
  std::vector<Index> shape;
  std::vector<Index> parts;  ///< the model's tensors, one after the other
  bool transposed = false;   ///< each of them
};

/// The tensors of a model's checkpoint, without the fixed position embedding. They cover the layout.
inline std::vector<FileTensor> file_tensors(const moxie::Layout& layout) {
  std::vector<FileTensor> files;
  const auto& tensors = layout.tensors();
  for (Index i = 0; i < Index(tensors.size()); ++i) {
    const moxie::TensorInfo& tensor = tensors[std::size_t(i)];
    std::string name = tensor.name;
    if (!name.starts_with("routers.")) {
      files.push_back({name, tensor.shape, {i}});
      continue;
    }
    const std::size_t prefix = name.find('.', 8) + 1;  // behind "routers.i."
    const std::string_view rest = std::string_view(name).substr(prefix);
    if (rest.starts_with("gate.")) {
      files.push_back({name.insert(prefix, "f_").insert(prefix + 6, ".1"), tensor.shape, {i}});
      continue;
    }
    const bool weight = rest.ends_with(".weight");
    const std::string stacked = name.substr(0, prefix) + (weight ? "experts.w" : "experts.b");
    auto file = std::find_if(files.begin(), files.end(), [&](const FileTensor& f) { return f.name == stacked; });
    if (file == files.end()) {
      std::vector<Index> shape(tensor.shape.rbegin(), tensor.shape.rend());
      shape.insert(shape.begin(), 0);
      file = files.insert(files.end(), {stacked, shape, {}, weight});
    }
    ++file->shape.front();
    file->parts.push_back(i);
  }
  return files;
}

/// Calls `f(element of the file's tensor, element of the model's block)` for all elements, in the file's order.
template <class T, class F>
void for_each_element(const FileTensor& file, moxie::ParameterView<T> p, F&& f) {
  Index at = 0;
  for (const Index part : file.parts) {
    const moxie::RowView<T> m = p[part];
    const Index rows = file.transposed ? m.cols() : m.rows();
    const Index cols = file.transposed ? m.rows() : m.cols();
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < cols; ++c) {
        f(at++, file.transposed ? m(c, r) : m(r, c));
      }
    }
  }
}

}  // namespace dit

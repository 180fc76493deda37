// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <moxie/core/error.hpp>
#include <moxie/core/matrix.hpp>
#include <moxie/io/error.hpp>
#include <moxie/io/header_text.hpp>
#include <moxie/io/native_file.hpp>
#include <moxie/io/number_format.hpp>
#include <moxie/io/safetensors_header.hpp>
#include <moxie/io/tensor_names.hpp>
#include <moxie/io/text.hpp>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// A safetensors file, checked: 8 bytes of header length, a JSON header, the tensors without gaps
/// (https://github.com/huggingface/safetensors).
///
/// The constructor reads the header; each call that names a tensor reads it. Memory is that of the
/// header and of these tensors, whatever the file claims; `SafetensorsLimits` bounds the header.
/// The file stays open: a new file of the same name does not change what is read. Threads can read
/// tensors at once, and so can processes after a fork.
///
/// A file that breaks any rule of the format is refused: a duplicate key, an unknown field, a hole.
/// A tensor in a number format that `DType` does not have is kept as bytes, and refused only when
/// it is read as numbers.
///
///     const SafetensorsFile file("model.safetensors");
///     const std::vector<float> bias = file.read<float>("layer.0/bias");
class SafetensorsFile {
 public:
  /// Throws FileError.
  explicit SafetensorsFile(std::filesystem::path path) : path_(std::move(path)) {
    const Index size = open();
    const Index header_size = read_header_size(size);
    const Index data_size = size - prefix - header_size;
    detail::HeaderText text(header_size, [this](Index at, char* to, Index count) { read_at(prefix + at, to, count); });
    detail::SafetensorsHeader header;
    if (const std::string problem = header.parse(text, data_size); !problem.empty()) {
      fail(problem);
    }
    tensors_ = std::move(header.tensors);
    metadata_ = std::move(header.metadata);
    data_begin_ = size - data_size;
  }

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// Sorted, byte by byte.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    names.reserve(tensors_.size());
    for (const auto& [name, tensor] : tensors_) {
      names.push_back(name);
    }
    return names;
  }
  bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }

  /// Gives every tensor the name `f(name)`, for files whose names differ from those to load:
  ///
  ///     file.rename(without_wrappers);
  ///
  /// Throws FileError where two tensors would have one name; the names then stay as they were.
  template <class F>
  void rename(F&& f) {
    detail::StoredTensors renamed;
    for (const auto& [name, tensor] : tensors_) {
      const auto [position, inserted] = renamed.try_emplace(f(name), tensor);
      if (!inserted) {
        fail(tensor_named(name) + " and another would both be named '" + printable(position->first) + "'");
      }
    }
    tensors_ = std::move(renamed);
  }

  /// Throws FileError if there is no such tensor; the message names one that may be meant.
  const StoredTensor& info(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      fail(tensor_named(name) + " is missing" + detail::hint_for_missing(name, tensors_, metadata_));
    }
    return found->second;
  }

  /// The elements, row-major, as float, double, int32, int64 or uint8.
  ///
  /// F32, F64, F16 and BF16 read as floats, rounded to nearest where T is the narrower; I32, I64 and U8
  /// read as integers of the same or a larger size. Anything else, a name that is not there, and a file
  /// that has become shorter throw FileError.
  template <StoredScalar T>
  std::vector<T> read(std::string_view name) const {
    const StoredTensor& tensor = info(name);
    expect_type<T>(name, tensor);
    std::vector<T> values(static_cast<std::size_t>(tensor.count));
    copy(tensor, 0, tensor.count, values.data());
    return values;
  }

  /// The tensor's bytes as they are stored, of any number format. `SafetensorsWriter::add_bytes` writes
  /// them to another file. Throws FileError as `read` does.
  std::vector<std::byte> read_bytes(std::string_view name) const {
    const StoredTensor& tensor = info(name);
    std::vector<std::byte> bytes(static_cast<std::size_t>(tensor.bytes));
    read_at(data_begin_ + tensor.offset, bytes.data(), tensor.bytes);
    return bytes;
  }

  /// Reads a tensor into a row-major matrix or a view that has the tensor's shape as a layout reads it:
  /// shape[0] rows, a vector one row, a scalar (1,1). Throws FileError if it has another; `to` is then
  /// left as it was. A file that has become shorter since it was opened throws, too, and may leave `to`
  /// half read.
  template <class M>
  void read_into(std::string_view name, M&& to) const {
    using T = typename std::remove_cvref_t<M>::Scalar;
    const RowView<T> view(to);
    const StoredTensor& tensor = info(name);
    expect_type<T>(name, tensor);
    const Index rows = tensor.shape.size() > 1 ? tensor.shape.front() : 1;
    if (view.rows() != rows || view.size() != tensor.count) {
      fail(tensor_named(name) + " has the shape " + shape_text(tensor.shape) + ", and cannot be read into " +
           detail::dimensions(view.rows(), view.cols()));
    }
    if (view.stride() == view.cols()) {
      return copy(tensor, 0, view.size(), view.data());
    }
    for (Index i = 0; i < rows; ++i) {
      copy(tensor, i * view.cols(), view.cols(), view.row(i));
    }
  }

  /// Throws FileError if there is no such tensor, or it has another shape, or does not read as T.
  template <StoredScalar T>
  void expect(std::string_view name, std::span<const Index> shape) const {
    const StoredTensor& tensor = info(name);
    expect_type<T>(name, tensor);
    if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
      fail(tensor_named(name) + " has the shape " + shape_text(tensor.shape) + ", expected " + shape_text(shape));
    }
  }

 private:
  static constexpr Index prefix = sizeof(std::uint64_t);  // the header's length

  [[noreturn]] void fail(const std::string& problem) const { throw FileError(path_.string() + ": " + problem); }

  // Returns the size of the open file.
  Index open() {
    std::error_code ignored;
    const std::filesystem::file_status status = std::filesystem::status(path_, ignored);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
      fail("is not a regular file");  // opening a pipe would wait for ever
    }
    if (const int number = file_.open(path_); number != 0) {
      fail("cannot be opened: " + detail::system_message(number));
    }
    const Index size = file_.size();
    if (size < 0) {
      fail("cannot be read: it has no size");
    }
    return size;
  }

  Index read_header_size(Index size) const {
    if (size < prefix) {
      fail(size == 0 ? "is empty" : "is truncated: " + std::to_string(size) + " bytes are too few for a header's length");
    }
    std::uint64_t header_size = 0;
    read_at(0, &header_size, prefix);
    if (header_size > SafetensorsLimits::header_bytes) {
      fail("the header's length " + std::to_string(header_size) + " exceeds the format's limit of " +
           std::to_string(SafetensorsLimits::header_bytes) + ": is it a safetensors file?");
    }
    if (static_cast<Index>(header_size) > size - prefix) {
      fail("is truncated: the header's length is " + std::to_string(header_size) + ", but only " +
           std::to_string(size - prefix) + " bytes follow");
    }
    return static_cast<Index>(header_size);
  }

  void read_at(Index at, void* to, Index count) const {
    const int number = file_.read_at(at, to, count);
    if (number == detail::file_too_short) {
      fail("cannot be read to its end");
    }
    if (number != 0) {
      fail("cannot be read: " + detail::system_message(number));
    }
  }

  template <class T>
  void expect_type(std::string_view name, const StoredTensor& tensor) const {
    if (!reads_as<T>(tensor.dtype)) {
      fail(tensor_named(name) + " is " + printable(tensor.format) + ", which cannot be read as " +
           std::string(dtype_name(dtype_of<T>)));
    }
  }

  template <class T>
  void copy(const StoredTensor& tensor, Index first, Index count, T* to) const {
    const Index from = data_begin_ + tensor.offset + first * dtype_size(tensor.dtype);
    switch (tensor.dtype) {
      case DType::F32:
        return convert<float>(from, count, to);
      case DType::F64:
        return convert<double>(from, count, to);
      case DType::F16:
        return convert<detail::Float16>(from, count, to);
      case DType::BF16:
        return convert<detail::Bfloat16>(from, count, to);
      case DType::I32:
        return convert<std::int32_t>(from, count, to);
      case DType::I64:
        return convert<std::int64_t>(from, count, to);
      case DType::U8:
        return convert<std::uint8_t>(from, count, to);
      case DType::Other:
        break;  // expect_type has refused it
    }
  }
  template <class Stored, class T>
  void convert(Index from, Index count, T* to) const {
    if constexpr (std::is_same_v<Stored, T>) {
      read_at(from, to, count * Index{sizeof(T)});
    } else {
      constexpr Index piece = 1 << 14;
      std::vector<Stored> values(static_cast<std::size_t>((std::min)(count, piece)));
      for (Index done = 0; done < count; done += piece) {
        const Index n = (std::min)(piece, count - done);
        read_at(from + done * Index{sizeof(Stored)}, values.data(), n * Index{sizeof(Stored)});
        std::transform(values.begin(), values.begin() + n, to + done, [](Stored value) { return static_cast<T>(value); });
      }
    }
  }

  std::filesystem::path path_;
  detail::NativeFile file_;
  detail::StoredTensors tensors_;
  std::map<std::string, std::string> metadata_;
  Index data_begin_ = 0;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

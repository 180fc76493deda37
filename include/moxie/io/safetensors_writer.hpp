// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <moxie/core/error.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/io/error.hpp>
#include <moxie/io/header_text.hpp>
#include <moxie/io/number_format.hpp>
#include <moxie/io/replacement_file.hpp>
#include <moxie/io/text.hpp>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// Collects named tensors, and writes them to a file.
///
/// `add` keeps a view: the numbers have to live until `save`, which reads them. It throws ShapeError if
/// they do not fill the shape, and ValueError for a name that is taken, reserved ("__metadata__") or
/// not UTF-8.
///
///     SafetensorsWriter writer;
///     writer.add_parameters(layer.parameters(), "weights.");
///     writer.add_parameters(averages, "ema.");
///     writer.metadata("step", std::to_string(step));
///     writer.save("model.safetensors");
class SafetensorsWriter {
 public:
  void add(std::string name, std::vector<Index> shape, std::span<const float> values) {
    add_numbers(std::move(name), std::move(shape), values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const double> values) {
    add_numbers(std::move(name), std::move(shape), values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const std::int32_t> values) {
    add_numbers(std::move(name), std::move(shape), values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const std::int64_t> values) {
    add_numbers(std::move(name), std::move(shape), values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const std::uint8_t> values) {
    add_numbers(std::move(name), std::move(shape), values);
  }
  /// Stored as BF16, rounded to nearest, ties to even, when it is saved; a NaN stays one.
  void add_bf16(std::string name, std::vector<Index> shape, std::span<const float> values) {
    expect_count(name, shape, static_cast<Index>(values.size()), sizeof(float));
    add_entry(std::move(name), std::move(shape), dtype_name(DType::BF16), static_cast<Index>(values.size()) * 2,
              [values](ReplacementFile& file) { write_rounded(values, file); });
  }
  /// Bytes as they are stored, of any number format: `format` is its name in the file, "F8_E4M3". With
  /// `SafetensorsFile::read_bytes` it copies tensors from file to file:
  ///
  ///     writer.add_bytes(name, file.info(name).shape, file.info(name).format, bytes);
  ///
  /// Throws ShapeError if the bytes do not fill the shape, and ValueError if `format` is not UTF-8.
  void add_bytes(std::string name, std::vector<Index> shape, std::string_view format, std::span<const std::byte> bytes) {
    expect_bytes(name, shape, format, static_cast<Index>(bytes.size()));
    add_entry(std::move(name), std::move(shape), format, static_cast<Index>(bytes.size()),
              [bytes](ReplacementFile& file) { file.write(bytes.data(), bytes.size()); });
  }

  // A temporary would be gone by the time it is saved.
  template <class T>
  void add(std::string name, std::vector<Index> shape, std::vector<T>&& values) = delete;
  void add_bf16(std::string name, std::vector<Index> shape, std::vector<float>&& values) = delete;
  void add_bytes(std::string name, std::vector<Index> shape, std::string_view format, std::vector<std::byte>&& bytes) = delete;
  template <class Scalar>
  void add_parameters(Parameters<Scalar>&& block, std::string_view name_prefix = {}) = delete;
  template <class Scalar>
  void add_parameters(const Parameters<Scalar>&& block, std::string_view name_prefix = {}) = delete;

  /// All tensors of a block of parameters, their names prefixed.
  template <class Block>
  void add_parameters(const Block& block, std::string_view name_prefix = {}) {
    const auto view = detail::as_view(block);
    const std::vector<TensorInfo>& tensors = view.layout().tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      add_rows(std::string(name_prefix) + tensors[i].name, std::vector<Index>(tensors[i].shape), view[static_cast<Index>(i)]);
    }
  }

  /// Sets an entry of the file's `__metadata__`. Throws ValueError if either text is not UTF-8.
  void metadata(std::string key, std::string value) {
    detail::expect_value(is_utf8(key) && is_utf8(value), "SafetensorsWriter::metadata",
                         "'" + printable(key) + "' or its value is not UTF-8");
    metadata_[std::move(key)] = std::move(value);
  }

  /// Writes the file, byte for byte as the reference implementation would: wider numbers first, then by
  /// name, the data aligned to 8 bytes.
  ///
  /// `ReplacementFile` says how an existing file is replaced. Throws FileError if anything fails, or if
  /// the file would exceed `SafetensorsLimits`, and leaves the old file as it was.
  void save(const std::filesystem::path& path) const {
    expect_limits(path);
    const std::vector<const Entries::value_type*> order = file_order();
    std::string header = header_text(order);
    header.append((8 - header.size() % 8) % 8, ' ');
    const std::uint64_t header_size = header.size();
    if (header_size > SafetensorsLimits::header_bytes) {
      refuse(path, "its header would have " + std::to_string(header_size) + " bytes, the format's limit is " +
                       std::to_string(SafetensorsLimits::header_bytes));
    }
    ReplacementFile file(path);
    file.write(&header_size, sizeof header_size);
    file.write(header.data(), header.size());
    for (const auto* entry : order) {
      entry->second.write(file);
    }
    file.commit();
  }

 private:
  struct Entry {
    std::string format;
    std::vector<Index> shape;
    Index bytes;
    std::function<void(ReplacementFile&)> write;
  };
  using Entries = std::map<std::string, Entry>;
  static constexpr std::string_view where = "SafetensorsWriter::add";

  [[noreturn]] static void refuse(const std::filesystem::path& path, const std::string& problem) {
    throw FileError(path.string() + ": cannot be written: " + problem);
  }
  [[noreturn]] static void refuse_shape(const std::string& name, const std::vector<Index>& shape, Index given,
                                        std::string_view unit) {
    throw ShapeError(std::string(where) + ": " + tensor_named(name) + " of shape " + shape_text(shape) + " is given " +
                     std::to_string(given) + " " + std::string(unit));
  }

  static void expect_count(const std::string& name, const std::vector<Index>& shape, Index count, std::size_t size) {
    if (detail::element_count(shape, static_cast<Index>(size)) != count) {
      refuse_shape(name, shape, count, "elements");
    }
  }
  static void expect_bytes(const std::string& name, const std::vector<Index>& shape, std::string_view format, Index bytes) {
    detail::expect_value(is_utf8(std::string(format)), where, "the format '" + printable(format) + "' is not UTF-8");
    const Index known = detail::format_position(format);
    const Index bits = known < 0 ? 1 : detail::stored_formats[static_cast<std::size_t>(known)].bits;
    const Index count = detail::element_count(shape, (std::max)(bits / 8, Index{1}));
    const bool fits = known < 0 ? (count == 0) == (bytes == 0) : detail::packed_bytes(count, bits) == bytes;
    if (count < 0 || !fits) {
      refuse_shape(name, shape, bytes, "bytes of " + printable(format));
    }
  }

  template <class T>
  void add_numbers(std::string&& name, std::vector<Index>&& shape, std::span<const T> values) {
    expect_count(name, shape, static_cast<Index>(values.size()), sizeof(T));
    add_entry(std::move(name), std::move(shape), dtype_name(dtype_of<T>), static_cast<Index>(values.size_bytes()),
              [values](ReplacementFile& file) { file.write(values.data(), values.size_bytes()); });
  }
  template <class T>
  void add_rows(std::string&& name, std::vector<Index>&& shape, RowView<T> rows) {
    expect_count(name, shape, rows.size(), sizeof(T));
    add_entry(std::move(name), std::move(shape), dtype_name(dtype_of<std::remove_const_t<T>>), rows.size() * Index{sizeof(T)},
              [rows](ReplacementFile& file) {
                for (Index i = 0; i < rows.rows(); ++i) {
                  file.write(rows.row(i), static_cast<std::size_t>(rows.cols()) * sizeof(T));
                }
              });
  }

  void add_entry(std::string name, std::vector<Index> shape, std::string_view format, Index bytes,
                 std::function<void(ReplacementFile&)> write) {
    detail::expect_value(is_utf8(name), where, "the name '" + printable(name) + "' is not UTF-8");
    detail::expect_value(name != "__metadata__", where, "the name '__metadata__' is reserved");
    detail::expect_value(entries_.find(name) == entries_.end(), where, "there is a " + tensor_named(name) + " already");
    entries_.emplace(std::move(name), Entry{std::string(format), std::move(shape), bytes, std::move(write)});
  }

  // So that SafetensorsFile reads whatever is written.
  void expect_limits(const std::filesystem::path& path) const {
    using Limits = SafetensorsLimits;
    if (entries_.size() > Limits::tensors || metadata_.size() > Limits::metadata_entries) {
      refuse(path, "it would have " + std::to_string(entries_.size()) + " tensors and " + std::to_string(metadata_.size()) +
                       " entries of metadata, the limits are " + std::to_string(Limits::tensors) + " and " +
                       std::to_string(Limits::metadata_entries));
    }
    const auto fits = [](const std::string& text) { return json_text(text).size() - 2 < Limits::text_bytes; };
    for (const auto& [key, value] : metadata_) {
      if (!fits(key) || !fits(value)) {
        refuse(path, "its metadata '" + printable(key) + "' are longer than " + std::to_string(Limits::text_bytes) + " bytes");
      }
    }
    for (const auto& [name, entry] : entries_) {
      if (!fits(name) || entry.shape.size() > Limits::dimensions) {
        refuse(path, tensor_named(name) + " has more than " + std::to_string(Limits::dimensions) +
                         " dimensions or a name of more than " + std::to_string(Limits::text_bytes) + " bytes");
      }
    }
  }

  static bool is_utf8(const std::string& text) {
    try {
      static_cast<void>(json_text(text));
      return true;
    } catch (const nlohmann::json::type_error&) {
      return false;
    }
  }
  static std::string json_text(const std::string& text) { return nlohmann::json(text).dump(); }

  // Wider numbers first, so that every tensor is aligned; formats that are not known come last.
  std::vector<const Entries::value_type*> file_order() const {
    std::vector<const Entries::value_type*> order;
    order.reserve(entries_.size());
    for (const auto& entry : entries_) {
      order.push_back(&entry);
    }
    std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
      return detail::format_position(a->second.format) > detail::format_position(b->second.format);
    });
    return order;
  }

  std::string header_text(const std::vector<const Entries::value_type*>& order) const {
    std::string text = "{";
    if (!metadata_.empty()) {
      text += "\"__metadata__\":" + nlohmann::json(metadata_).dump();
    }
    Index offset = 0;
    for (const auto* entry : order) {
      const auto& [name, tensor] = *entry;
      const Index end = offset + tensor.bytes;
      text += text.size() > 1 ? "," : "";
      text += json_text(name) + ":{\"dtype\":" + json_text(tensor.format) +
              ",\"shape\":" + nlohmann::json(tensor.shape).dump() + ",\"data_offsets\":[" + std::to_string(offset) + "," +
              std::to_string(end) + "]}";
      offset = end;
    }
    return text + "}";
  }

  static void write_rounded(std::span<const float> values, ReplacementFile& file) {
    std::array<detail::Bfloat16, 4096> rounded;
    while (!values.empty()) {
      const std::span<const float> piece = values.first((std::min)(values.size(), rounded.size()));
      std::transform(piece.begin(), piece.end(), rounded.begin(), [](float x) { return detail::Bfloat16(x); });
      file.write(rounded.data(), piece.size() * sizeof(detail::Bfloat16));
      values = values.subspan(piece.size());
    }
  }

  Entries entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE

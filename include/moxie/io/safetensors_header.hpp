// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <moxie/core/error.hpp>
#include <moxie/io/header_text.hpp>
#include <moxie/io/number_format.hpp>
#include <moxie/io/text.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// One tensor, as a file describes it.
struct StoredTensor {
  DType dtype = DType::F32;
  std::vector<Index> shape;
  Index count = 0;     ///< elements: the product of the shape, 1 for a scalar
  Index offset = 0;    ///< in bytes, from the start of the file's data
  Index bytes = 0;     ///< the size of its data
  std::string format;  ///< the file's name for the number format: "F32", "F8_E4M3"
};

namespace detail {

using StoredTensors = std::map<std::string, StoredTensor, std::less<>>;

/// Parses a header as a stream of events and keeps only what the format allows. Anything else ends the
/// parse: it takes neither memory nor stack, however deep it is nested.
class SafetensorsHeader {
 public:
  using Json = nlohmann::json;

  /// Returns the problem, empty if there is none. `data_size` is the number of bytes after the header.
  std::string parse(HeaderText& text, Index data_size) {
    // The parser would skip white space and a byte-order mark, which the format does not allow.
    if (text.at_end() || text.current() != '{') {
      return "the header does not start with '{'";
    }
    text_ = &text;
    try {
      const bool parsed = Json::sax_parse(HeaderCharacters(text), HeaderCharacters(), this);
      return parsed ? check_offsets(data_size) : problem_;
    } catch (const HeaderExcess& excess) {
      return excess.what();
    }
  }

  StoredTensors tensors;
  std::map<std::string, std::string> metadata;

  // The parser calls these. Each returns whether to go on.
  bool null() { return unexpected("null"); }
  bool boolean(bool /*value*/) { return unexpected("a boolean"); }
  bool number_integer(Json::number_integer_t value) { return unexpected(std::to_string(value)); }
  bool number_float(Json::number_float_t /*value*/, const std::string& token) { return unexpected(printable(token)); }
  bool binary(Json::binary_t& /*value*/) { return unexpected("binary data"); }

  bool number_unsigned(Json::number_unsigned_t value) {
    if (place_ != Place::list || value > std::uint64_t{largest_number}) {
      return unexpected(std::to_string(value));
    }
    std::vector<Index>& list = key_ == "shape" ? tensor_->shape : offsets_;
    if (list.size() == SafetensorsLimits::dimensions) {
      return fail(where() + " has more than " + std::to_string(SafetensorsLimits::dimensions) + " numbers");
    }
    list.push_back(static_cast<Index>(value));
    return true;
  }

  bool string(std::string& value) {
    if (place_ == Place::metadata) {
      metadata[key_] = std::move(value);
      return true;
    }
    if (place_ != Place::tensor || key_ != "dtype") {
      return unexpected("a string");
    }
    tensor_->dtype = dtype_named(value);
    tensor_->format = std::move(value);
    return true;
  }

  bool start_object(std::size_t /*size*/) {
    if (place_ == Place::start) {
      place_ = Place::top;
    } else if (place_ == Place::top && name_ == "__metadata__") {
      place_ = Place::metadata;
    } else if (place_ == Place::top) {
      place_ = Place::tensor;
      fields_ = {};
      offsets_.clear();
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool key(std::string& key) {
    if (place_ == Place::top) {
      return start_entry(key);
    }
    key_ = std::move(key);
    return place_ == Place::metadata ? start_metadata() : start_field();
  }

  bool end_object() {
    const bool tensor = place_ == Place::tensor;
    place_ = Place::top;
    return !tensor || finish_tensor();
  }

  bool start_array(std::size_t /*size*/) {
    if (place_ != Place::tensor || key_ == "dtype") {
      return unexpected("an array");
    }
    place_ = Place::list;
    return true;
  }

  bool end_array() {
    place_ = Place::tensor;
    return true;
  }

  bool parse_error(std::size_t /*position*/, const std::string& /*token*/, const Json::exception& /*problem*/) {
    return fail("the header is not JSON in UTF-8: wrong at its byte " + std::to_string(text_->position()));
  }

 private:
  enum class Place { start, top, metadata, tensor, list };
  static constexpr std::array<std::string_view, 3> field_names{"dtype", "shape", "data_offsets"};
  static constexpr std::size_t largest_number{(std::numeric_limits<Index>::max)()};

  bool fail(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  std::string where() const {
    switch (place_) {
      case Place::start:
        return "the header";
      case Place::top:
        return name_ == "__metadata__" ? name_ : tensor_named(name_);
      case Place::metadata:
        return "metadata '" + printable(key_) + "'";
      case Place::tensor:
      case Place::list:
        break;
    }
    return tensor_named(name_) + ": " + printable(key_);
  }

  bool unexpected(const std::string& found) {
    std::string expected = "an object";
    if (place_ == Place::list) {
      expected = "integers from 0 to " + std::to_string(largest_number);
    } else if (place_ == Place::metadata || (place_ == Place::tensor && key_ == "dtype")) {
      expected = "a string";
    } else if (place_ == Place::tensor) {
      expected = "an array of integers";
    }
    return fail(where() + " has " + found + ", expected " + expected);
  }

  bool fresh(bool is) { return is || fail(where() + " is there twice"); }

  bool start_entry(std::string& name) {
    name_ = std::move(name);
    if (name_ == "__metadata__") {
      return fresh(!std::exchange(metadata_seen_, true));
    }
    if (tensors.size() == SafetensorsLimits::tensors) {
      return fail("the header has more than " + std::to_string(SafetensorsLimits::tensors) + " tensors");
    }
    const auto [position, inserted] = tensors.try_emplace(name_);
    tensor_ = &position->second;
    return fresh(inserted);
  }

  bool start_metadata() {
    if (metadata.size() == SafetensorsLimits::metadata_entries) {
      return fail("the header has more than " + std::to_string(SafetensorsLimits::metadata_entries) + " entries of metadata");
    }
    return fresh(metadata.try_emplace(key_).second);
  }

  bool start_field() {
    const auto* const field = std::find(field_names.begin(), field_names.end(), key_);
    if (field == field_names.end()) {
      return fail(where() + " is not a field of the format");
    }
    return fresh(!std::exchange(fields_[static_cast<std::size_t>(field - field_names.begin())], true));
  }

  bool finish_tensor() {
    const std::string tensor = tensor_named(name_);
    for (std::size_t i = 0; i < fields_.size(); ++i) {
      if (!fields_[i]) {
        return fail(tensor + " has no " + std::string(field_names[i]));
      }
    }
    if (offsets_.size() != 2) {
      return fail(tensor + ": data_offsets has " + std::to_string(offsets_.size()) + " elements, expected 2");
    }
    if (offsets_[0] > offsets_[1]) {
      return fail(tensor + ": data_offsets " + shape_text(offsets_) + " end before they begin");
    }
    tensor_->offset = offsets_[0];
    tensor_->bytes = offsets_[1] - offsets_[0];
    return check_size();
  }

  // The shape and the format have to give the bytes. Of a format that is not known, only that no element takes no bytes.
  bool check_size() {
    const Index format = format_position(tensor_->format);
    const Index bits = format < 0 ? 1 : stored_formats[static_cast<std::size_t>(format)].bits;
    const std::string tensor = tensor_named(name_) + ": shape " + shape_text(tensor_->shape);
    tensor_->count = element_count(tensor_->shape, (std::max)(bits / 8, Index{1}));
    if (tensor_->count < 0) {
      return fail(tensor + " has more bytes than can be counted");
    }
    const std::string span = "data_offsets " + shape_text(offsets_) + " hold " + std::to_string(tensor_->bytes);
    if (format < 0) {
      return (tensor_->count == 0) == (tensor_->bytes == 0) ||
             fail(tensor + " has " + std::to_string(tensor_->count) + " elements, but " + span + " bytes");
    }
    const Index bytes = packed_bytes(tensor_->count, bits);
    if (bytes < 0) {
      return fail(tensor + " of " + printable(tensor_->format) + " ends inside a byte");
    }
    return bytes == tensor_->bytes ||
           fail(tensor + " of " + printable(tensor_->format) + " takes " + std::to_string(bytes) + " bytes, but " + span);
  }

  // The tensors have to cover the data, each byte once.
  std::string check_offsets(Index data_size) const {
    std::vector<const StoredTensors::value_type*> order;
    order.reserve(tensors.size());
    for (const auto& entry : tensors) {
      order.push_back(&entry);
    }
    std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
      return std::pair(a->second.offset, a->second.bytes) < std::pair(b->second.offset, b->second.bytes);
    });
    Index covered = 0;
    for (const auto* entry : order) {
      const Index begin = entry->second.offset;
      const Index end = begin + entry->second.bytes;
      const std::string& name = entry->first;
      if (end > data_size) {
        return tensor_named(name) + " ends at byte " + std::to_string(end) + " of the data, but the file has only " +
               std::to_string(data_size);
      }
      if (begin != covered) {
        return tensor_named(name) + " begins at byte " + std::to_string(begin) + " of the data, but the one before ends at " +
               std::to_string(covered) + (begin < covered ? ": they overlap" : ": there is a hole");
      }
      covered = end;
    }
    if (covered != data_size) {
      return "there are " + std::to_string(data_size - covered) + " bytes of data that belong to no tensor";
    }
    return {};
  }

  const HeaderText* text_ = nullptr;
  Place place_ = Place::start;
  std::string name_;                // the key at the top: a tensor's name
  std::string key_;                 // the key one level below
  StoredTensor* tensor_ = nullptr;  // that of name_
  std::array<bool, 3> fields_{};    // which of field_names it has
  std::vector<Index> offsets_;
  bool metadata_seen_ = false;
  std::string problem_;
};

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE

// SPDX-License-Identifier: MIT
#pragma once

/// Safetensors files: all of io's headers for them. Needs nlohmann_json (the target moxie::io).
#include <moxie/io/error.hpp>
#include <moxie/io/number_format.hpp>
#include <moxie/io/parameters.hpp>
#include <moxie/io/replacement_file.hpp>
#include <moxie/io/safetensors_file.hpp>
#include <moxie/io/safetensors_header.hpp>
#include <moxie/io/safetensors_writer.hpp>
#include <moxie/io/tensor_names.hpp>
#include <moxie/io/text.hpp>

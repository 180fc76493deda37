// SPDX-License-Identifier: MIT
#pragma once

/// The version of the headers, for `#if` and for messages. CMake reads it from here.
#define MOXIE_VERSION_MAJOR 0
#define MOXIE_VERSION_MINOR 1
#define MOXIE_VERSION_PATCH 0
#define MOXIE_VERSION "0.1.0"

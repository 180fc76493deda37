# What the system has comes from find_package; what it lacks is fetched: the release tarballs that Debian 12 builds from, by
# their hashes. All of it is headers, so nothing of another project's build is run.
include(cmake/find_dependencies.cmake)
include(FetchContent)

# Makes `target` from the folder INCLUDE of a tarball in Debian's archive.
function(moxie_fetch_headers target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "FILE;SHA256;INCLUDE" "")
  message(STATUS "moxie: fetching ${arg_FILE}")
  string(REGEX REPLACE ".*/(.*)_.*" "moxie_\\1" name ${arg_FILE})
  FetchContent_Declare(
    ${name}
    URL https://deb.debian.org/debian/pool/main/${arg_FILE}
        https://snapshot.debian.org/archive/debian/20250520T000000Z/pool/main/${arg_FILE}
    URL_HASH SHA256=${arg_SHA256}
    DOWNLOAD_EXTRACT_TIMESTAMP OFF
    SOURCE_SUBDIR headers-only) # a folder that is not there: unpack, and add nothing to this build
  FetchContent_MakeAvailable(${name})
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${target} INTERFACE ${${name}_SOURCE_DIR}/${arg_INCLUDE})
endfunction()

if(NOT TARGET Eigen3::Eigen)
  moxie_fetch_headers(Eigen3::Eigen FILE e/eigen3/eigen3_3.4.0.orig.tar.bz2 INCLUDE .
    SHA256 b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626)
endif()
if(NOT TARGET moxie::xsimd)
  moxie_fetch_headers(moxie::xsimd FILE x/xsimd/xsimd_8.1.0.orig.tar.gz INCLUDE include
    SHA256 d52551360d37709675237d2a0418e28f70995b5b7cdad7c674626bcfbbf48328)
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  moxie_fetch_headers(nlohmann_json::nlohmann_json FILE n/nlohmann-json3/nlohmann-json3_3.11.2.orig.tar.gz INCLUDE single_include
    SHA256 d69f9deb6a75e2580465c6c4c5111b89c4dc2fa94e3a85fcd2ffcd9a143d9273)
endif()

if(MOXIE_BUILD_TESTS)
  find_package(doctest 2.4 QUIET)
  if(NOT TARGET doctest::doctest)
    moxie_fetch_headers(doctest::doctest FILE d/doctest/doctest_2.4.9~ds.orig.tar.xz INCLUDE .
      SHA256 7cc78169975bea36e70ab9d67e7de9b03d89b38653499ad03243e3944429b1ab)
  endif()
endif()

if(MOXIE_BUILD_EXAMPLES)
  find_package(ZLIB QUIET)
  find_package(CLI11 2 QUIET)
  if(NOT TARGET CLI11::CLI11)
    moxie_fetch_headers(CLI11::CLI11 FILE c/cli11/cli11_2.1.2+ds.orig.tar.xz INCLUDE include
      SHA256 8143d20b688e98ccce8e24562d3b68e5f47c12e896c42c7ca8553dbde5bed55d)
  endif()
endif()

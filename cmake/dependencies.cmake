# What the system has, or a project around this one brings, is taken; what is missing is fetched from the release page of its
# project. All of it is headers, so nothing of another project's build runs.
include(cmake/find_dependencies.cmake)
include(FetchContent)

# Makes `target` from the folder INCLUDE of a tarball. Where that fails, adds to the list `moxie_missing` what is missing and why.
# FETCHCONTENT_SOURCE_DIR_MOXIE_<NAME> and FETCHCONTENT_FULLY_DISCONNECTED have the meaning that FetchContent gives them.
function(moxie_fetch_headers target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "NAME;VERSION;ENOUGH;URL;SHA256;INCLUDE" "")
  string(TOLOWER "moxie_${arg_NAME}" name)
  string(TOUPPER "${name}" upper)
  cmake_path(GET arg_URL FILENAME file)
  set(folder ${FETCHCONTENT_BASE_DIR}/${name}-src)
  set(archive ${FETCHCONTENT_BASE_DIR}/moxie_archives/${arg_NAME}-${file})
  if(NOT FETCHCONTENT_SOURCE_DIR_${upper})
    set(problem "")
    if(FETCHCONTENT_FULLY_DISCONNECTED)
      if(NOT EXISTS ${folder}/${arg_INCLUDE})
        set(problem "FETCHCONTENT_FULLY_DISCONNECTED is set")
      endif()
    else()
      message(STATUS "moxie: fetching ${arg_NAME} ${arg_VERSION}")
      # FetchContent would end with the log of its own build; a download by hand says in one line why it failed.
      if(NOT EXISTS ${archive})
        file(DOWNLOAD ${arg_URL} ${archive} INACTIVITY_TIMEOUT 20 STATUS status)
        list(POP_FRONT status failed why)
        if(failed)
          set(problem ${why})
        else()
          file(SHA256 ${archive} sum)
          if(NOT sum STREQUAL arg_SHA256)
            set(problem "what came has the SHA-256 ${sum}")
          endif()
        endif()
        if(problem)
          file(REMOVE ${archive})
        endif()
      endif()
    endif()
    if(problem)
      string(CONCAT problem "  ${arg_NAME} ${arg_ENOUGH} or newer (${problem}): install it, or name its unpacked tarball in\n"
                            "    -DFETCHCONTENT_SOURCE_DIR_${upper}=FOLDER   (${arg_URL})")
      set(moxie_missing ${moxie_missing} "${problem}" PARENT_SCOPE)
      return()
    endif()
  endif()
  FetchContent_Declare(
    ${name}
    URL ${archive}
    URL_HASH SHA256=${arg_SHA256}
    DOWNLOAD_EXTRACT_TIMESTAMP OFF
    SOURCE_SUBDIR headers-only) # a folder that is not there: unpack, and add nothing to this build
  FetchContent_MakeAvailable(${name})
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${target} INTERFACE ${${name}_SOURCE_DIR}/${arg_INCLUDE})
endfunction()

# Ends the configuration if something is missing: one error for all of it.
function(moxie_stop_if_missing)
  if(moxie_missing)
    list(JOIN moxie_missing "\n" text)
    message(FATAL_ERROR "moxie: these are missing, and could not be fetched:\n${text}")
  endif()
endfunction()

# The hashes are those of the tarballs that the release pages hand out, as the recipes of Spack, Homebrew, MSYS2, xmake and
# several Bazel workspaces state them. Of Eigen, xsimd and nlohmann-json, Debian's .orig files are these tarballs, unchanged.
set(moxie_missing "")
if(NOT TARGET Eigen3::Eigen)
  moxie_fetch_headers(Eigen3::Eigen NAME eigen VERSION 3.4.0 ENOUGH 3.4 INCLUDE .
    URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.bz2
    SHA256 b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626)
endif()
if(NOT TARGET moxie::xsimd)
  moxie_fetch_headers(moxie::xsimd NAME xsimd VERSION 8.1.0 ENOUGH 8 INCLUDE include
    URL https://github.com/xtensor-stack/xsimd/archive/refs/tags/8.1.0.tar.gz
    SHA256 d52551360d37709675237d2a0418e28f70995b5b7cdad7c674626bcfbbf48328)
endif()

# Only moxie::io needs it.
macro(moxie_fetch_json)
  if(NOT TARGET nlohmann_json::nlohmann_json)
    moxie_fetch_headers(nlohmann_json::nlohmann_json NAME json VERSION 3.11.2 ENOUGH 3.9 INCLUDE single_include
      URL https://github.com/nlohmann/json/archive/refs/tags/v3.11.2.tar.gz
      SHA256 d69f9deb6a75e2580465c6c4c5111b89c4dc2fa94e3a85fcd2ffcd9a143d9273)
  endif()
endmacro()

# Sets `used` to whether a target of `folder`, or of a folder below it, names moxie::io.
function(moxie_find_io used folder)
  get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(libraries ${target} LINK_LIBRARIES)
    get_target_property(interface ${target} INTERFACE_LINK_LIBRARIES)
    if("${libraries};${interface}" MATCHES "moxie(::|_)io")
      set(${used} TRUE PARENT_SCOPE)
      return()
    endif()
  endforeach()
  get_property(folders DIRECTORY ${folder} PROPERTY SUBDIRECTORIES)
  foreach(below IN LISTS folders)
    moxie_find_io(found ${below})
    if(found)
      set(${used} TRUE PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${used} FALSE PARENT_SCOPE)
endfunction()

function(moxie_fetch_json_for_io)
  moxie_find_io(used ${CMAKE_SOURCE_DIR})
  if(used)
    set(moxie_missing "")
    moxie_fetch_json()
    moxie_stop_if_missing()
  endif()
endfunction()

if(MOXIE_BUILD_TESTS OR MOXIE_BUILD_EXAMPLES)
  moxie_fetch_json()
elseif(NOT TARGET nlohmann_json::nlohmann_json)
  # Who links moxie::io is known when all of the project has been read.
  cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL moxie_fetch_json_for_io)
endif()

if(MOXIE_BUILD_TESTS)
  find_package(doctest 2.4 QUIET)
  if(NOT TARGET doctest::doctest)
    moxie_fetch_headers(doctest::doctest NAME doctest VERSION 2.4.9 ENOUGH 2.4 INCLUDE .
      URL https://github.com/doctest/doctest/archive/refs/tags/v2.4.9.tar.gz
      SHA256 19b2df757f2f3703a5e63cee553d85596875f06d91a3333acd80a969ef210856)
  endif()
endif()

if(MOXIE_BUILD_EXAMPLES)
  find_package(ZLIB QUIET)
  find_package(CLI11 2 QUIET)
  if(NOT TARGET CLI11::CLI11)
    moxie_fetch_headers(CLI11::CLI11 NAME cli11 VERSION 2.1.2 ENOUGH 2 INCLUDE include
      URL https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.1.2.tar.gz
      SHA256 26291377e892ba0e5b4972cdfd4a2ab3bf53af8dac1f4ea8fe0d1376b625c8cb)
  endif()
endif()
moxie_stop_if_missing()

# What moxie's headers need, as targets: Eigen3::Eigen, moxie::xsimd, moxie::openmp and, for moxie::io, nlohmann_json, for
# moxie::cuda, moxie::thrust. This file serves the build and the installed package alike; what the system lacks is left undefined.

# Eigen 3.4 or 5: one call cannot ask for both.
find_package(Eigen3 3.4 QUIET)
if(NOT Eigen3_FOUND)
  find_package(Eigen3 5 QUIET)
endif()

# xsimd's target has a namespace in some releases and none in others, and Debian's asks for a library that is not there: all that
# is wanted is the folder of its headers.
if(NOT TARGET moxie::xsimd)
  find_package(xsimd QUIET)
  foreach(target xsimd::xsimd xsimd)
    if(TARGET ${target} AND NOT TARGET moxie::xsimd AND NOT xsimd_VERSION VERSION_LESS 8)
      get_target_property(folder ${target} INTERFACE_INCLUDE_DIRECTORIES)
      add_library(moxie::xsimd INTERFACE IMPORTED)
      target_include_directories(moxie::xsimd INTERFACE ${folder})
    endif()
  endforeach()
endif()

# Empty without OpenMP: the headers then run everything on one thread.
if(NOT TARGET moxie::openmp)
  add_library(moxie::openmp INTERFACE IMPORTED)
  if(MOXIE_OPENMP)
    find_package(OpenMP QUIET COMPONENTS CXX)
    if(TARGET OpenMP::OpenMP_CXX)
      target_link_libraries(moxie::openmp INTERFACE OpenMP::OpenMP_CXX)
    else()
      message(STATUS "moxie: no OpenMP for this compiler, everything will run on one thread")
    endif()
  endif()
endif()

find_package(nlohmann_json 3.9 QUIET)

# Thrust: of the CUDA toolkit, with CUDA's runtime and cuBLAS, or alone, which is enough where no compiler is nvcc.
if(NOT TARGET moxie::thrust)
  find_package(CUDAToolkit 12 QUIET)
  find_path(MOXIE_THRUST_INCLUDE thrust/version.h HINTS ${CUDAToolkit_INCLUDE_DIRS} PATH_SUFFIXES cccl)
  mark_as_advanced(MOXIE_THRUST_INCLUDE)
  if(MOXIE_THRUST_INCLUDE)
    add_library(moxie::thrust INTERFACE IMPORTED)
    target_include_directories(moxie::thrust INTERFACE ${MOXIE_THRUST_INCLUDE})
    if(TARGET CUDA::cublas)
      target_link_libraries(moxie::thrust INTERFACE CUDA::cudart CUDA::cublas)
    endif()
  endif()
endif()

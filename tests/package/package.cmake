# The package as those who use it meet it: one program, and three ways to the target moxie::moxie.
set(package_dir ${CMAKE_CURRENT_SOURCE_DIR}/package)
set(package_build ${CMAKE_CURRENT_BINARY_DIR}/package)

# moxie_package_test(NAME HOW OPTIONS what the consumer is configured with PROPERTIES of the test)
function(moxie_package_test name how)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "OPTIONS;PROPERTIES")
  moxie_test(package.${name}
    COMMAND ${CMAKE_COMMAND} -DBUILD=${package_build}/${name} -P ${package_dir}/consume.cmake --
            -G ${CMAKE_GENERATOR} -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER} -DCMAKE_PREFIX_PATH=${package_build}/prefix
            -DHOW=${how} -DMOXIE_SOURCE=${PROJECT_SOURCE_DIR} ${arg_OPTIONS}
    PROPERTIES ${arg_PROPERTIES})
endfunction()

moxie_test(package.install
  COMMAND ${CMAKE_COMMAND} -DBUILD=${PROJECT_BINARY_DIR} -DSOURCE=${PROJECT_SOURCE_DIR} -DPREFIX=${package_build}/prefix
          -P ${package_dir}/install.cmake
  PROPERTIES FIXTURES_SETUP installed)
moxie_package_test(find_package find_package OPTIONS -DCOMPONENTS=io PROPERTIES FIXTURES_REQUIRED installed)
if(TARGET moxie::cuda)
  moxie_package_test(find_package_cuda find_package OPTIONS -DCOMPONENTS=cuda PROPERTIES FIXTURES_REQUIRED installed)
endif()
moxie_package_test(find_package_without_options find_package
  OPTIONS -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON
  PROPERTIES FIXTURES_REQUIRED installed)
moxie_package_test(find_package_without_eigen find_package OPTIONS -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON
                   PROPERTIES FIXTURES_REQUIRED installed PASS_REGULAR_EXPRESSION "moxie needs Eigen3")
moxie_test(package.versions COMMAND ${CMAKE_COMMAND} -S ${package_dir}/versions -B ${package_build}/versions --fresh
                                    -G ${CMAKE_GENERATOR} -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
                                    -DCMAKE_PREFIX_PATH=${package_build}/prefix
           PROPERTIES FIXTURES_REQUIRED installed)
moxie_package_test(add_subdirectory add_subdirectory OPTIONS -DCOMPONENTS=io)
moxie_package_test(fetch_content fetch_content OPTIONS -DCOMPONENTS=io)

# A project around moxie that brings its own xsimd, under either name; no package is looked for, nothing is fetched.
get_target_property(xsimd_include moxie::xsimd INTERFACE_INCLUDE_DIRECTORIES)
list(GET xsimd_include 0 xsimd_include)
file(COPY ${xsimd_include}/xsimd DESTINATION ${package_build}/xsimd/include)
set(offline -DFETCHCONTENT_FULLY_DISCONNECTED=ON)
set(no_xsimd ${offline} -DCMAKE_DISABLE_FIND_PACKAGE_xsimd=ON)
moxie_package_test(xsimd_of_the_parent add_subdirectory
                   OPTIONS ${no_xsimd} -DPARENT_XSIMD=xsimd -DXSIMD_INCLUDE=${package_build}/xsimd/include)
moxie_package_test(xsimd_of_the_parent_with_namespace add_subdirectory
                   OPTIONS ${no_xsimd} -DPARENT_XSIMD=xsimd::xsimd -DXSIMD_INCLUDE=${package_build}/xsimd/include)
file(READ ${xsimd_include}/xsimd/config/xsimd_config.hpp old)
string(REGEX REPLACE "(define XSIMD_VERSION_MAJOR) +[0-9]+" "\\1 7" old "${old}")
file(WRITE ${package_build}/old_xsimd/include/xsimd/config/xsimd_config.hpp "${old}")
moxie_package_test(xsimd_of_the_parent_too_old add_subdirectory
                   OPTIONS ${no_xsimd} -DPARENT_XSIMD=xsimd -DXSIMD_INCLUDE=${package_build}/old_xsimd/include
                   PROPERTIES PASS_REGULAR_EXPRESSION "the target xsimd is xsimd 7, which is too old.*xsimd 8 or newer")

# Without a network: what is missing is named, with how to give it; what nobody asked for is not missed.
moxie_package_test(offline_names_all add_subdirectory
  OPTIONS ${no_xsimd} -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON
  PROPERTIES PASS_REGULAR_EXPRESSION "eigen 3.4 or newer.*FETCHCONTENT_SOURCE_DIR_MOXIE_EIGEN=.*xsimd 8 or newer.*FETCHCONTENT_SOURCE_DIR_MOXIE_XSIMD=")
moxie_package_test(offline_with_a_folder add_subdirectory
                   OPTIONS ${no_xsimd} -DFETCHCONTENT_SOURCE_DIR_MOXIE_XSIMD=${package_build}/xsimd)
set(no_json ${offline} -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON)
moxie_package_test(offline_without_json add_subdirectory OPTIONS ${no_json})
moxie_package_test(offline_io_names_json add_subdirectory OPTIONS ${no_json} -DCOMPONENTS=io
                   PROPERTIES PASS_REGULAR_EXPRESSION "json 3.9 or newer.*FETCHCONTENT_SOURCE_DIR_MOXIE_JSON=")

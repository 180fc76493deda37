# The package as those who use it meet it: one program, and three ways to the target moxie::moxie.
set(package_dir ${CMAKE_CURRENT_SOURCE_DIR}/package)
set(package_build ${CMAKE_CURRENT_BINARY_DIR}/package)

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

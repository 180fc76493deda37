# One ctest entry for each block of planted_bugs.txt. The same tests with nothing planted are those of the presets.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS planted_bugs.txt)
file(READ planted_bugs.txt table)
string(REGEX MATCHALL "\n(bug|test):[^\n]*" lines "\n${table}")

set(bug "")
foreach(line IN LISTS lines)
  string(REGEX REPLACE "^\n[a-z]+: *" "" value "${line}")
  if(line MATCHES "^\nbug:")
    if(bug)
      message(FATAL_ERROR "planted_bugs.txt: '${bug}' has no test")
    endif()
    set(bug "${value}")
  else()
    string(REGEX REPLACE "[^A-Za-z0-9]+" "_" name "${bug}")
    moxie_test(planted.${name}
      COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/planted_bug.sh "${bug}" "${value}"
              ${CMAKE_CXX_COMPILER} -std=c++20 -O0 ${OpenMP_CXX_FLAGS} -I${CMAKE_CURRENT_SOURCE_DIR} ${dependency_flags}
              -DMOXIE_GOLDEN_DIR="${CMAKE_CURRENT_SOURCE_DIR}/golden" $<TARGET_OBJECTS:moxie_test_main>)
    set(bug "")
  endif()
endforeach()

include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/moxie)
install(DIRECTORY include/moxie TYPE INCLUDE FILES_MATCHING PATTERN "*.hpp")
# Sets of their own, so that moxie::moxie can be had without nlohmann_json and Thrust.
install(TARGETS moxie moxie_native EXPORT moxie)
install(TARGETS moxie_io EXPORT moxie_io)
if(TARGET moxie_cuda)
  install(TARGETS moxie_cuda EXPORT moxie_cuda)
  install(EXPORT moxie_cuda NAMESPACE moxie:: FILE moxieCudaTargets.cmake DESTINATION ${package_dir})
endif()
install(EXPORT moxie NAMESPACE moxie:: FILE moxieTargets.cmake DESTINATION ${package_dir})
install(EXPORT moxie_io NAMESPACE moxie:: FILE moxieIoTargets.cmake DESTINATION ${package_dir})

configure_package_config_file(cmake/moxieConfig.cmake.in moxieConfig.cmake INSTALL_DESTINATION ${package_dir})
configure_file(cmake/moxieConfigVersion.cmake.in moxieConfigVersion.cmake @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/moxieConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/moxieConfigVersion.cmake
              cmake/find_dependencies.cmake DESTINATION ${package_dir})
install(FILES LICENSE TYPE DOC)

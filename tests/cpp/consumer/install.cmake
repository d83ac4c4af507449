# Installs the library twice: into WORK_DIR/prefix, and into a folder that is then moved to WORK_DIR/moved.
file(REMOVE_RECURSE "${WORK_DIR}")
foreach(place IN ITEMS prefix installed)
  execute_process(COMMAND "${CMAKE_COMMAND}" --install "${BUILD_DIR}" --config "${CONFIG}" --prefix "${WORK_DIR}/${place}"
                          COMMAND_ERROR_IS_FATAL ANY)
endforeach()
file(RENAME "${WORK_DIR}/installed" "${WORK_DIR}/moved")

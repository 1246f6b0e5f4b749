# SPDX-License-Identifier: Apache-2.0
# opmux_add_backend(<name> [OLD_GLIBC] PACKAGE <package> SOURCES <file>...)
#
# Builds _opmux_<name>.so: an op library over the LibTorch stable ABI that needs neither a Python
# version nor a torch version, and installs it with its static manifest into <package>. OLD_GLIBC:
# it links archives that use threads, see old_glibc.cmake.
#
# opmux_add_manifest(<target> PACKAGE <package>)
#
# The manifest alone, for a package whose module <target> was built in another way (pybind11).

# Compile time only: the newest headers know the most, the target decides what an old torch sees.
set(OPMUX_TORCH_INCLUDE "" CACHE PATH "folder that holds torch/csrc/stable (default: installed torch)")
set(OPMUX_TORCH_TARGET 0x020a000000000000 CACHE STRING "oldest torch that the library loads in")
# A newer compiler's new warning must not break the build of an sdist, which vendors this file, nor
# that of a backend outside this tree, which finds it in core's wheel.
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH _opmux_common)
cmake_path(GET CMAKE_CURRENT_SOURCE_DIR PARENT_PATH _opmux_tree)
cmake_path(COMPARE "${_opmux_tree}/common" EQUAL "${_opmux_common}" _opmux_own)
option(OPMUX_WERROR "treat warnings as errors" ${_opmux_own})

set(OPMUX_CMAKE_DIR "${CMAKE_CURRENT_LIST_DIR}")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH OPMUX_COMMON_DIR)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "build type" FORCE)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

find_package(Python REQUIRED COMPONENTS Interpreter)

# find_spec does not import torch: a CUDA build of it is enough on a machine without CUDA.
if(NOT OPMUX_TORCH_INCLUDE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent / 'include')"
    OUTPUT_VARIABLE OPMUX_TORCH_INCLUDE
    OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${OPMUX_TORCH_INCLUDE}/torch/csrc/stable/library.h")
  message(FATAL_ERROR "opmux: no stable torch headers in ${OPMUX_TORCH_INCLUDE}")
endif()

# Flags of every first-party object, also of those that see no torch header.
function(opmux_compile_options target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${OPMUX_WERROR}>>:-Werror>
    # Error texts carry file names: they must not carry the builder's folders.
    $<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=>
    $<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${OPMUX_COMMON_DIR}/=common/>
    $<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${OPMUX_TORCH_INCLUDE}/=>)
endfunction()

# An empty stand-in gives the DT_NEEDED entry; at run time libtorch.so is already loaded, and it in
# turn needs the CPU and device libraries of whatever torch that is.
function(opmux_link_torch target)
  if(NOT TARGET opmux_torch_stub)
    file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/empty.cpp CONTENT "")
    add_library(opmux_torch_stub SHARED ${CMAKE_CURRENT_BINARY_DIR}/empty.cpp)
    set_target_properties(opmux_torch_stub PROPERTIES
      OUTPUT_NAME torch LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)
  endif()
  target_link_options(${target} PRIVATE -Wl,--no-as-needed)
  target_link_libraries(${target} PRIVATE opmux_torch_stub)
endfunction()

# The loader reads the manifest before it imports or loads anything. Written by core, which
# compares the library's interface with its own schemas; a plain `cmake --build` does without.
function(opmux_add_manifest target)
  cmake_parse_arguments(ARG "" "PACKAGE" "" ${ARGN})
  # It holds the digest of the library as it was linked: installing must not change an RPATH.
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON)
  if(NOT SKBUILD)
    return()
  endif()
  set(manifest ${CMAKE_CURRENT_BINARY_DIR}/opmux-backend.json)
  add_custom_command(OUTPUT ${manifest}
    COMMAND "${Python_EXECUTABLE}" -m opmux.manifest
      --package ${CMAKE_CURRENT_SOURCE_DIR}/src/${ARG_PACKAGE}
      --library $<TARGET_FILE:${target}> --output ${manifest}
    DEPENDS ${target} VERBATIM)
  add_custom_target(${target}_manifest ALL DEPENDS ${manifest})
  install(FILES ${manifest} DESTINATION ${ARG_PACKAGE} COMPONENT opmux)
endfunction()

function(opmux_add_backend name)
  cmake_parse_arguments(ARG "OLD_GLIBC" "PACKAGE" "SOURCES" ${ARGN})
  set(target _opmux_${name})

  add_library(${target} MODULE ${ARG_SOURCES} ${OPMUX_CMAKE_DIR}/glibc_compat.cpp)
  set_target_properties(${target} PROPERTIES
    PREFIX "" SKIP_BUILD_RPATH ON SKIP_INSTALL_RPATH ON
    LINK_DEPENDS ${OPMUX_CMAKE_DIR}/opmux.map)
  opmux_compile_options(${target})
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-include${OPMUX_CMAKE_DIR}/dlsym_version.h>)
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=${OPMUX_TORCH_TARGET})
  target_include_directories(${target} PRIVATE ${OPMUX_COMMON_DIR}/include)
  target_include_directories(${target} SYSTEM PRIVATE ${OPMUX_TORCH_INCLUDE})
  # -z now: a torch without a needed symbol refuses at load, not at the first call.
  # libdl.so.2: where dlsym lives on glibc before 2.34.
  target_link_options(${target} PRIVATE
    -Wl,--version-script=${OPMUX_CMAKE_DIR}/opmux.map -Wl,-z,now)
  opmux_link_torch(${target})
  # Named, so that it is shared also where the compiler links its own statically: with a static
  # libstdc++ an exception may end the process.
  target_link_libraries(${target} PRIVATE stdc++)
  if(ARG_OLD_GLIBC)
    include(${OPMUX_CMAKE_DIR}/old_glibc.cmake)
    opmux_link_old_glibc(${target})
  else()
    target_link_libraries(${target} PRIVATE -l:libdl.so.2)
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION ${ARG_PACKAGE} COMPONENT opmux)

  opmux_add_manifest(${target} PACKAGE ${ARG_PACKAGE})
endfunction()

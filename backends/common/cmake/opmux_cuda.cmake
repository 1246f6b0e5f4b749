# SPDX-License-Identifier: Apache-2.0
# opmux_add_gpu_launchers(<target> <VENDOR> <file>...)  the tensor parts, by the C++ compiler
# opmux_add_cuda_kernels(<target> <file>...)            the device parts, by nvcc
#
# nvcc is called by hand: CMake's CUDA language wants a whole toolkit, which NVIDIA's packages on
# the Python index are not.

set(OPMUX_CUDA_ARCHS "" CACHE STRING
  "90a;120-virtual: machine code for 9.0, PTX of 12.0; default: as the environment says, or all")
set(_opmux_archs "${OPMUX_CUDA_ARCHS}")
if(NOT _opmux_archs)
  set(_opmux_archs "$ENV{OPMUX_CUDA_ARCHS}")
endif()
if(NOT _opmux_archs)
  # the PTX is what later GPUs compile at their first load
  set(_opmux_archs "80;89;90a;100a;120a;120-virtual")
endif()
# A variable beside the cache: a kept build folder follows the environment.
string(REGEX REPLACE "[, ]+" ";" OPMUX_CUDA_ARCHS "${_opmux_archs}")
set(OPMUX_CUDA_COMPILE_THREADS 1 CACHE STRING "archs that one nvcc compiles at a time")
option(OPMUX_CUDA_RESOURCES "print registers and spills of every kernel, see tools/gpu_resources.py")

function(opmux_add_gpu_launchers target vendor)
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX)
  target_sources(${target} PRIVATE ${ARGN})
  target_compile_definitions(${target} PRIVATE OPMUX_VENDOR_${vendor})
  target_include_directories(${target} PRIVATE ${OPMUX_COMMON_DIR}/gpu)
endfunction()

# On the PATH, or of NVIDIA's packages on the Python index, which share one folder.
function(_opmux_find_nvcc)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('nvidia'); print(';'.join(s.submodule_search_locations if s else []))"
    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(packaged)
  foreach(folder IN LISTS folders)
    file(GLOB found ${folder}/cu*/bin/nvcc)
    list(APPEND packaged ${found})
  endforeach()
  list(SORT packaged COMPARE NATURAL ORDER DESCENDING)
  list(TRANSFORM packaged REPLACE "/nvcc$" "")
  find_program(OPMUX_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin PATHS ${packaged} /usr/local/cuda)
  if(NOT OPMUX_NVCC)
    message(FATAL_ERROR "opmux: no nvcc found; install the CUDA toolkit, or pip install "
      "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl")
  endif()
endfunction()

_opmux_find_nvcc()
execute_process(COMMAND ${OPMUX_NVCC} --version
  OUTPUT_VARIABLE version COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${version}")
set(OPMUX_CUDA_TOOLKIT ${CMAKE_MATCH_1})
if(OPMUX_CUDA_TOOLKIT VERSION_LESS 12.8) # the first that knows Blackwell, and --compress-mode
  message(FATAL_ERROR "opmux: ${OPMUX_NVCC} is of CUDA ${OPMUX_CUDA_TOOLKIT}, 12.8 or later is "
    "needed; put a newer nvcc first on the PATH, or set CUDA_HOME")
endif()
# nvcc knows where its toolkit lies, also behind a wrapper script.
execute_process(COMMAND ${OPMUX_NVCC} --dryrun -x cu -c /dev/null -o /dev/null
  ERROR_VARIABLE dryrun OUTPUT_VARIABLE dryrun_out)
string(REGEX MATCH "#\\$ TOP=([^\r\n]+)" _ "${dryrun}${dryrun_out}")
set(top "${CMAKE_MATCH_1}")
find_library(OPMUX_CUDART cudart_static NO_DEFAULT_PATH REQUIRED
  PATHS ${top}/lib64 ${top}/lib ${top}/targets/x86_64-linux/lib ${top}/targets/sbsa-linux/lib)
message(STATUS "opmux: nvcc ${OPMUX_CUDA_TOOLKIT}, archs ${OPMUX_CUDA_ARCHS}")

set(_opmux_gencode)
foreach(arch IN LISTS OPMUX_CUDA_ARCHS)
  if(arch MATCHES "^([0-9]+[af]?)-virtual$")
    list(APPEND _opmux_gencode
      "-gencode=arch=compute_${CMAKE_MATCH_1},code=compute_${CMAKE_MATCH_1}")
  elseif(arch MATCHES "^[0-9]+[af]?$")
    list(APPEND _opmux_gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
  else()
    message(FATAL_ERROR "opmux: OPMUX_CUDA_ARCHS: ${arch} is no arch such as 90a or 120-virtual")
  endif()
endforeach()

function(opmux_add_cuda_kernels target)
  set(flags)
  if(OPMUX_WERROR)
    list(APPEND flags -Werror all-warnings -Xcompiler=-Werror)
  endif()
  if(OPMUX_CUDA_RESOURCES)
    list(APPEND flags -Xptxas=-v)
  endif()
  foreach(source IN LISTS ARGN)
    get_filename_component(source ${source} ABSOLUTE)
    get_filename_component(name ${source} NAME_WE)
    get_filename_component(folder ${source} DIRECTORY)
    get_filename_component(family ${folder} NAME)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/kernels/${family}/${name}.o)
    add_custom_command(OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/kernels/${family}
      # --compress-mode: the device code of five archs is most of the wheel
      COMMAND ${OPMUX_NVCC} -x cu -c ${source} -o ${object} -MD -MF ${object}.d -MT ${object}
        -std=c++17 -O3 -lineinfo --compress-mode=size --threads ${OPMUX_CUDA_COMPILE_THREADS}
        ${_opmux_gencode} -ccbin ${CMAKE_CXX_COMPILER} ${flags}
        -DOPMUX_GPU_KERNEL -DOPMUX_VENDOR_CUDA
        -I${OPMUX_COMMON_DIR}/include -I${OPMUX_COMMON_DIR}/gpu
        -Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall
        # Error texts and line tables must not carry the builder's folders.
        -Xcompiler=-ffile-prefix-map=${OPMUX_COMMON_DIR}/=common/
        -Xcompiler=-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=
      DEPENDS ${source} DEPFILE ${object}.d VERBATIM COMMAND_EXPAND_LISTS
      COMMENT "nvcc ${family}/${name}")
    target_sources(${target} PRIVATE ${object})
  endforeach()
  target_link_libraries(${target} PRIVATE ${OPMUX_CUDART})
endfunction()

# SPDX-License-Identifier: Apache-2.0
# opmux_link_old_glibc(<target>)
#
# glibc 2.34 moved threads, dlopen and shm_open into libc under a new symbol version. An archive
# that calls them, as the static CUDA runtime does, would tie the library to glibc >= 2.34. Linked
# against stand-ins that offer the old versions it keeps those, which every later glibc still has.

# A symbol is of version GLIBC_2.2.5, the first on x86-64, unless it says name@version.
function(_opmux_stand_in soname)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/old_glibc)
  string(MAKE_C_IDENTIFIER "old_${soname}" name)
  set(code "")
  set(map "GLIBC_2.2.5 { global: *; };\n")
  foreach(symbol IN LISTS ARGN)
    if(symbol MATCHES "^(.+)@(.+)$")
      set(symbol ${CMAKE_MATCH_1})
      string(APPEND map "${CMAKE_MATCH_2} { global: ${symbol}; };\n")
    endif()
    string(APPEND code "extern \"C\" void ${symbol}() {}\n")
  endforeach()
  file(CONFIGURE OUTPUT ${folder}/${name}.cpp CONTENT "${code}")
  file(CONFIGURE OUTPUT ${folder}/${name}.map CONTENT "${map}")
  add_library(${name} SHARED ${folder}/${name}.cpp)
  set_target_properties(${name} PROPERTIES CXX_VISIBILITY_PRESET default NO_SONAME ON
    LIBRARY_OUTPUT_DIRECTORY ${folder})
  target_compile_options(${name} PRIVATE -fno-builtin -w)
  target_link_options(${name} PRIVATE
    -nostdlib -Wl,-soname,${soname} -Wl,--version-script=${folder}/${name}.map)
endfunction()

function(opmux_link_old_glibc target)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    # other processors have other base versions: their wheels need an old build system
    target_link_libraries(${target} PRIVATE dl pthread rt)
    return()
  endif()
  set(pthread)
  foreach(call IN ITEMS create join detach kill once key_create key_delete getspecific setspecific
      mutex_trylock mutexattr_init mutexattr_destroy mutexattr_settype mutexattr_setpshared
      condattr_setpshared rwlock_init rwlock_destroy rwlock_rdlock rwlock_tryrdlock
      rwlock_timedrdlock rwlock_wrlock rwlock_trywrlock rwlock_timedwrlock rwlock_unlock
      rwlockattr_init rwlockattr_destroy rwlockattr_setpshared spin_init spin_destroy spin_lock
      spin_trylock spin_unlock)
    list(APPEND pthread pthread_${call})
  endforeach()
  list(APPEND pthread sem_init sem_destroy sem_wait sem_trywait sem_timedwait sem_post)
  _opmux_stand_in(libpthread.so.0 ${pthread})
  _opmux_stand_in(libdl.so.2 dlopen dlclose dlsym dlerror dlvsym dlmopen@GLIBC_2.3.4)
  _opmux_stand_in(librt.so.1 shm_open shm_unlink)
  target_link_libraries(${target} PRIVATE old_libpthread_so_0 old_libdl_so_2 old_librt_so_1)
endfunction()

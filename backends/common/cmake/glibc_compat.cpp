// SPDX-License-Identifier: Apache-2.0
// Lets a build on a newer Linux keep the symbol versions of glibc 2.28 and GCC 8, the floor of
// manylinux_2_28, without a container. Each definition replaces one newer symbol; the version
// script keeps them inside the library. Weak: a compiler that links parts of libstdc++ statically,
// as those for older systems do, brings its own.
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// GLIBC_2.32: shared_ptr asks it whether atomics are needed. 0 means yes.
extern "C" {
extern char __libc_single_threaded;
__attribute__((weak)) char __libc_single_threaded = 0;
}

namespace std {
// GLIBCXX_3.4.29: called for a negative or overflowing array size.
__attribute__((weak)) void __throw_bad_array_new_length() { __builtin_abort(); }
// GLIBCXX_3.4.26: the default constructors that torch's check macro uses.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();
}  // namespace std

#endif

// SPDX-License-Identifier: Apache-2.0
// Force-included: torch headers from 2.15 on call dlsym, which glibc 2.34 gave a new version.
#if defined(__linux__) && defined(__x86_64__)
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
#endif

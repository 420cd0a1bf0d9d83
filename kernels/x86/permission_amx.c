/* Linux gives the tile registers only to a process that asks for them (arch_prctl,
 * ARCH_REQ_XCOMP_PERM): the one system call of kernels/. It changes nothing but what this process
 * may execute, and asking again is harmless. */
#include "kernels/internal.h"

bool amx_request_permission(void) {
#if defined(__linux__)
    const long arch_prctl = 158, request_permission = 0x1023, tile_data = 18;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(arch_prctl), "D"(request_permission), "S"(tile_data)
                     : "rcx", "r11", "memory");
    return result == 0;
#else
    return false;
#endif
}

#define LVSPEC_ARCH avx2
#include "arch.inc"

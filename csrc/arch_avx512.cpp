#define LVSPEC_ARCH avx512
#include "arch.inc"

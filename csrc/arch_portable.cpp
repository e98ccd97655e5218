#define LVSPEC_ARCH portable
#include "arch.inc"

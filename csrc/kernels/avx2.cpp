#define HSR_LEVEL avx2
#include "kernels/loops.h"

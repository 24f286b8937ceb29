#define HSR_LEVEL avx512
#include "kernels/loops.h"

#define HSR_LEVEL scalar
#include "kernels/loops.h"

#define HSR_LEVEL avxvnni
#include "kernels/loops.h"

#define HSR_TREE_LEVEL avx512
#include "tree/kernel_loops.h"

#define HSR_TREE_LEVEL avx2
#include "tree/kernel_loops.h"

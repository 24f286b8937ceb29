#define HSR_TREE_LEVEL scalar
#include "tree/kernel_loops.h"

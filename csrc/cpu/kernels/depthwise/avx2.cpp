#define SE_EXT_ISA avx2
#include "table.h"

#define SE_EXT_ISA avx512
#include "table.h"

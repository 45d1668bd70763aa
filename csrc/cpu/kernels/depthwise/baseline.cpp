#define SE_EXT_ISA baseline
#include "table.h"

// The CPU operators for every machine that the compiler supports.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define LEDOM_ISA baseline
#define LEDOM_LANES 4
#include "operators.h"

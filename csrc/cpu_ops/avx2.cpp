// The CPU operators for x86-64 machines with AVX2. Standard headers come before the pragma, so that their code runs on all machines.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx2,fma")
#define LEDOM_ISA avx2
#define LEDOM_LANES 8
#include "operators.h"
#endif

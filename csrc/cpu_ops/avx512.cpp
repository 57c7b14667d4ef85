// The CPU operators for x86-64 machines with AVX512. Standard headers come before the pragma, so that their code runs on all machines.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define LEDOM_ISA avx512
#define LEDOM_LANES 16
#include "operators.h"
#endif

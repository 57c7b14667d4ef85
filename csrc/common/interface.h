// Shared by all C interfaces of kernels: element types, and the macro that exports a function. No torch, no CUDA.
#pragma once

#include <stdint.h>

#define LEDOM_BFLOAT16 0
#define LEDOM_FLOAT16 1

#ifdef __cplusplus
#define LEDOM_API extern "C" __attribute__((visibility("default")))
#else
#define LEDOM_API __attribute__((visibility("default")))
#endif

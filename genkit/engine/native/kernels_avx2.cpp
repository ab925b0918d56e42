// Kernels for x86 with AVX2.

#if defined(__x86_64__)
#define GENKIT_AVX2
#include "includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace genkit {
namespace avx2 {
#include "kernels.h"

#include "decoder.h"
#include "quantize.h"
}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels avx2_kernels = {avx2::round_rows, avx2::scale_sums, avx2::multiply,
                              avx2::quantize,   avx2::embed,      avx2::run};
}  // namespace genkit
#endif

// Kernels for x86 with AVX-512 and VNNI.

#if defined(__x86_64__)
#define GENKIT_VNNI
#define GENKIT_AVX2
#include "includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
#endif

namespace genkit {
namespace vnni {
#include "kernels.h"

#include "decoder.h"
#include "quantize.h"
}  // namespace vnni

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels vnni_kernels = {vnni::round_rows, vnni::scale_sums, vnni::multiply,
                              vnni::quantize,   vnni::embed,      vnni::run};
}  // namespace genkit
#endif

// What kernels include before their instructions are allowed, so that no other code gets these.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "shapes.h"
#include "threads.h"

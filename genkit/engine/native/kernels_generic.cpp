// Kernels for any CPU.

#include "includes.h"

namespace genkit {
namespace generic {
#include "kernels.h"

#include "decoder.h"
#include "quantize.h"
}  // namespace generic
const Kernels generic_kernels = {generic::round_rows, generic::scale_sums, generic::multiply,
                                 generic::quantize,   generic::embed,      generic::run};
}  // namespace genkit

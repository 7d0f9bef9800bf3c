// The header is valid C++ and its functions link with C names.
#include "pyccl.h"

#include <cstdio>
#include <cstring>

int main() {
    const bool named = std::strcmp(pyccl_status_name(PYCCL_ERR_FRAME), "PYCCL_ERR_FRAME") == 0;
    const pyccl_spec spec = {};
    const bool refused = pyccl_dtype_size(spec.dtype) == 0;
    const unsigned failed = (named ? 0u : 1u) + (refused ? 0u : 1u);
    std::printf("%u passed, %u failed\n", 2 - failed, failed);
    return failed != 0;
}

/* status.c: version, names of the statuses, and the end of a failed PYCCL_ASSERT. */
#include "status.h"

#include <stdio.h>
#include <stdlib.h>

#include "pyccl.h"

#ifndef PYCCL_VERSION
#error "PYCCL_VERSION comes from CMake, which reads it from pyproject.toml"
#endif

const char *pyccl_version(void) { return PYCCL_VERSION; }

/* A switch over the enum without `default`: -Wall reports a status that has no name here. */
const char *pyccl_status_name(int32_t status) {
#define NAME(code) case code: return #code
    switch ((pyccl_status)status) {
    NAME(PYCCL_OK);
    NAME(PYCCL_PENDING);
    NAME(PYCCL_ERR_NOMEM);
    NAME(PYCCL_ERR_OS);
    NAME(PYCCL_ERR_ARGUMENT);
    NAME(PYCCL_ERR_LIMIT);
    NAME(PYCCL_ERR_CLOSED);
    NAME(PYCCL_ERR_PEER_LOST);
    NAME(PYCCL_ERR_ALONE);
    NAME(PYCCL_ERR_EVICTED);
    NAME(PYCCL_ERR_DEADLINE);
    NAME(PYCCL_ERR_STALLED);
    NAME(PYCCL_ERR_CANCELLED);
    NAME(PYCCL_ERR_OUTCOME_UNKNOWN);
    NAME(PYCCL_ERR_MASTER_AWAY);
    NAME(PYCCL_ERR_MISMATCH);
    NAME(PYCCL_ERR_RESULT_DIFFERS);
    NAME(PYCCL_ERR_POISON);
    NAME(PYCCL_ERR_FRAME);
    }
#undef NAME
    return "?";
}

void pyccl_assert_failed(const char *file, int line, const char *text) {
    fprintf(stderr, "%s:%d: assertion failed: %s\n", file, line, text);
    fflush(stderr);
    abort();
}

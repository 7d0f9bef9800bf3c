/* The header alone is valid C11; its numbers fit each other; every status has its name. */
#include "pyccl.h"

#include "test.h"

_Static_assert(sizeof(pyccl_spec) == PYCCL_SPEC_SIZE, "a spec has no padding and its encoded size");
_Static_assert(sizeof(void *) == 8 && sizeof(long) == 8, "LP64");
_Static_assert(PYCCL_PIECE_MAX <= PYCCL_EAGER_MAX, "the eager window holds a piece");

TEST(header_status_names_are_those_of_the_enum) {
    CHECK(strcmp(pyccl_status_name(PYCCL_OK), "PYCCL_OK") == 0);
    CHECK(strcmp(pyccl_status_name(PYCCL_PENDING), "PYCCL_PENDING") == 0);
    CHECK(strcmp(pyccl_status_name(PYCCL_ERR_OUTCOME_UNKNOWN), "PYCCL_ERR_OUTCOME_UNKNOWN") == 0);
    CHECK(strcmp(pyccl_status_name(PYCCL_ERR_FRAME), "PYCCL_ERR_FRAME") == 0);
    CHECK(strcmp(pyccl_status_name(-3), "?") == 0);
    CHECK(strcmp(pyccl_status_name(INT32_MAX), "?") == 0);
    CHECK(strcmp(pyccl_status_name(INT32_MIN), "?") == 0);
}

TEST(header_statuses_fit_into_the_value_of_an_abort_frame) {
    unsigned names = 0;
    for (int32_t status = -1000; status < 1000; status++) {
        if (strcmp(pyccl_status_name(status), "?") == 0) continue;
        CHECK(status >= -255 && status <= PYCCL_PENDING);
        names++;
    }
    CHECK(names >= 17);
}

TEST(header_version_is_three_numbers) {
    int a, b, c, used = 0;
    CHECK(sscanf(pyccl_version(), "%d.%d.%d%n", &a, &b, &c, &used) == 3);
    CHECK_EQ(used, strlen(pyccl_version()));
}

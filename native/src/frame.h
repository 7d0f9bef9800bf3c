/* frame.h: the one rule book for specs, shared by the decoder (foreign specs) and by submit (the caller's own). */
#ifndef PYCCL_FRAME_H
#define PYCCL_FRAME_H

#include <stdbool.h>

#include "pyccl.h"

#define STATE_UNIT_BYTES 65536       /* parts of the answer to a STATE_ASK begin and end at multiples of this */

/* True when every field is within the limits of proto/wire.md 3.2. */
bool frame_spec_valid(const pyccl_spec *spec);

typedef struct frame_limits {        /* of a guard; 0: none */
    float peak, norm;
} frame_limits;
frame_limits frame_spec_limits(const pyccl_spec *spec);

/* True when every field is within what proto/wire.md 3 allows for the frame's type. */
bool frame_valid(const pyccl_frame *frame);

#endif

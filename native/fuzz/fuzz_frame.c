/* fuzz_frame.c: headers of frames and specs. What is accepted is within its limits and encodes to the same bytes; what
 * is not leaves zero. Input: any number of headers (64 bytes) and specs (40), a byte before each says which, and whether the
 * magic and the checksum are to be made right. */
#include "../src/frame.h"
#include "fuzz.h"

static void header(fuzz_input *in, bool repair) {
    static const pyccl_frame ZERO;
    uint8_t bytes[PYCCL_FRAME_SIZE], again[PYCCL_FRAME_SIZE];
    pyccl_frame frame;
    fuzz_take(in, bytes, sizeof bytes);
    if (repair) {
        memcpy(bytes, "PYC1", 4);
        const uint32_t sum = (uint32_t)pyccl_xxh3_64(bytes, 60, 0);
        for (int i = 0; i < 4; i++) bytes[60 + i] = (uint8_t)(sum >> (8 * i));
    }
    if (pyccl_frame_decode_untrusted(bytes, &frame) != PYCCL_OK) {
        HOLDS(memcmp(&frame, &ZERO, sizeof frame) == 0);
        return;
    }
    HOLDS(frame.length <= PYCCL_PIECE_MAX && frame_valid(&frame));
    pyccl_frame_encode(&frame, again);
    HOLDS(memcmp(bytes, again, sizeof bytes) == 0);
}

static void spec(fuzz_input *in) {
    uint8_t bytes[PYCCL_SPEC_SIZE], again[PYCCL_SPEC_SIZE];
    pyccl_spec decoded;
    fuzz_take(in, bytes, sizeof bytes);
    if (pyccl_spec_decode_untrusted(bytes, &decoded) != PYCCL_OK) {
        HOLDS(decoded.kind == 0 && decoded.count == 0);
        return;
    }
    HOLDS(frame_spec_valid(&decoded) && pyccl_dtype_size(decoded.dtype) > 0);
    pyccl_spec_encode(&decoded, again);
    HOLDS(memcmp(bytes, again, sizeof bytes) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    while (in.left > 0) {
        const uint8_t what = fuzz_u8(&in);
        if (what & 1) spec(&in);
        else header(&in, (what & 2) != 0);
    }
    return 0;
}

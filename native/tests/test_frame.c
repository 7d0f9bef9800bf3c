/* Frames and specs against the golden vectors, which tools/make_vectors.py writes with an encoder of its own. */
#include "test.h"

#include "frame.h"
#include "pyccl.h"
#include "vectors.h"

typedef struct vector_head {
    char name[128], verdict[16], hex[256];
    const char *fields;
    bool ok;
} vector_head;

static vector_head head_of(const char *line) {
    vector_head head = {0};
    int used = 0;
    REQUIRE(sscanf(line, "%127s %15s %255s%n", head.name, head.verdict, head.hex, &used) == 3);
    head.fields = line + used;
    head.ok = strcmp(head.verdict, "ok") == 0;
    REQUIRE(head.ok || strcmp(head.verdict, "refused") == 0);
    return head;
}

static bool all_zero(const void *data, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (((const uint8_t *)data)[i] != 0) return false;
    return true;
}

static void check_frame_fields(const pyccl_frame *frame, const char *fields) {
    CHECK(frame->type == field_number(fields, "type"));
    CHECK(frame->phase == field_number(fields, "phase"));
    CHECK(frame->space == field_number(fields, "space"));
    CHECK(frame->epoch_number == field_number(fields, "epoch_number"));
    CHECK(frame->epoch_tag == field_number(fields, "epoch_tag"));
    CHECK(frame->seq == field_number(fields, "seq"));
    CHECK(frame->tag == field_number(fields, "tag"));
    CHECK(frame->length == field_number(fields, "length"));
    CHECK(frame->offset == field_number(fields, "offset"));
    CHECK(frame->value == field_number(fields, "value"));
    CHECK(frame->spec_hash == field_number(fields, "spec_hash"));
}

TEST(frame_vectors_decode_to_their_fields_and_encode_back) {
    vector_file vectors = vectors_open("frames.txt");
    unsigned accepted = 0, refused = 0;
    while (vectors_next(&vectors)) {
        const vector_head head = head_of(vectors.line);
        const unsigned failures = test_failures;
        uint8_t bytes[64], again[64];
        pyccl_frame frame;
        REQUIRE(bytes_from_hex(head.hex, bytes, sizeof bytes));
        memset(&frame, 0xEE, sizeof frame);
        const pyccl_status rc = pyccl_frame_decode_untrusted(bytes, &frame);
        CHECK_EQ(rc, head.ok ? PYCCL_OK : PYCCL_ERR_FRAME);
        if (rc == PYCCL_OK && head.ok) {
            check_frame_fields(&frame, head.fields);
            pyccl_frame_encode(&frame, again);
            CHECK(memcmp(bytes, again, sizeof bytes) == 0);
            accepted++;
        } else {
            CHECK(all_zero(&frame, sizeof frame));
            refused++;
        }
        if (test_failures != failures) printf("  in vector %s\n", head.name);
    }
    CHECK(accepted >= 20);
    CHECK(refused >= 20);
}

TEST(frame_with_any_single_bit_flipped_is_refused) {
    vector_file vectors = vectors_open("frames.txt");
    while (vectors_next(&vectors)) {
        const vector_head head = head_of(vectors.line);
        if (!head.ok) continue;
        uint8_t bytes[64];
        pyccl_frame frame;
        REQUIRE(bytes_from_hex(head.hex, bytes, sizeof bytes));
        for (unsigned bit = 0; bit < 8 * sizeof bytes; bit++) {
            bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
            CHECK_EQ(pyccl_frame_decode_untrusted(bytes, &frame), PYCCL_ERR_FRAME);
            bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
    }
}

TEST(frame_decoder_survives_random_bytes_and_accepts_only_what_it_would_encode) {
    uint64_t state = test_seed();
    for (unsigned i = 0; i < 200000; i++) {
        uint8_t bytes[64], again[64];
        for (size_t k = 0; k < sizeof bytes; k += 8) {
            const uint64_t word = test_random(&state);
            memcpy(bytes + k, &word, sizeof word);
        }
        /* Half of them get past magic and checksum, with fields that are mostly small. */
        if (i % 2 == 0) {
            memcpy(bytes, "PYC1", 4);
            bytes[4] %= 13;
            bytes[5] %= 3;
            bytes[6] %= 3;
            bytes[7] = 0;
            for (size_t k = 8; k < 60; k++)
                if (test_random(&state) % 4 != 0) bytes[k] = 0;
            const uint32_t checksum = (uint32_t)pyccl_xxh3_64(bytes, 60, 0);
            memcpy(bytes + 60, &checksum, sizeof checksum);
        }
        pyccl_frame frame;
        if (pyccl_frame_decode_untrusted(bytes, &frame) != PYCCL_OK) continue;
        CHECK(frame_valid(&frame));
        pyccl_frame_encode(&frame, again);
        CHECK(memcmp(bytes, again, sizeof bytes) == 0);
    }
}

static void check_spec_fields(const pyccl_spec *spec, const char *fields) {
    uint8_t root[16];
    char root_hex[33] = {0};
    CHECK(spec->kind == field_number(fields, "kind"));
    CHECK(spec->dtype == field_number(fields, "dtype"));
    CHECK(spec->op == field_number(fields, "op"));
    CHECK(spec->codec == field_number(fields, "codec"));
    CHECK(spec->algorithm == field_number(fields, "algorithm"));
    CHECK(spec->retry == field_number(fields, "retry"));
    CHECK(spec->space == field_number(fields, "space"));
    CHECK(spec->guard == field_number(fields, "guard"));
    CHECK(spec->tag == field_number(fields, "tag"));
    CHECK(spec->block == field_number(fields, "block"));
    CHECK(spec->count == field_number(fields, "count"));
    memcpy(root_hex, field_text(fields, "root"), 32);
    REQUIRE(bytes_from_hex(root_hex, root, sizeof root));
    CHECK(memcmp(spec->root, root, sizeof root) == 0);
    CHECK(pyccl_spec_hash(spec) == field_number(fields, "hash"));
}

TEST(spec_vectors_decode_to_their_fields_and_encode_back) {
    vector_file vectors = vectors_open("specs.txt");
    unsigned accepted = 0, refused = 0;
    while (vectors_next(&vectors)) {
        const vector_head head = head_of(vectors.line);
        const unsigned failures = test_failures;
        uint8_t bytes[40], again[40];
        pyccl_spec spec;
        REQUIRE(bytes_from_hex(head.hex, bytes, sizeof bytes));
        memset(&spec, 0xEE, sizeof spec);
        const pyccl_status rc = pyccl_spec_decode_untrusted(bytes, &spec);
        CHECK_EQ(rc, head.ok ? PYCCL_OK : PYCCL_ERR_FRAME);
        if (rc == PYCCL_OK && head.ok) {
            CHECK(frame_spec_valid(&spec));
            check_spec_fields(&spec, head.fields);
            pyccl_spec_encode(&spec, again);
            CHECK(memcmp(bytes, again, sizeof bytes) == 0);
            accepted++;
        } else {
            CHECK(all_zero(&spec, sizeof spec));
            refused++;
        }
        if (test_failures != failures) printf("  in vector %s\n", head.name);
    }
    CHECK(accepted >= 30);
    CHECK(refused >= 50);
}

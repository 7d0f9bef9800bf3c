/* vectors.h: reads the lines of proto/vectors. Include after test.h. */
#ifndef PYCCL_TEST_VECTORS_H
#define PYCCL_TEST_VECTORS_H

#include <stdbool.h>

#include "test.h"

typedef struct vector_file {
    FILE *file;
    char line[1024];
} vector_file;

__attribute__((unused)) static vector_file vectors_open(const char *name) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", PYCCL_VECTORS, name);
    vector_file vectors = {.file = fopen(path, "r")};
    if (vectors.file == NULL) printf("  cannot open %s\n", path);
    REQUIRE(vectors.file != NULL);
    return vectors;
}

/* The next line that is no comment, without its newline; false at the end, where the file is closed. */
__attribute__((unused)) static bool vectors_next(vector_file *vectors) {
    while (fgets(vectors->line, sizeof vectors->line, vectors->file) != NULL) {
        vectors->line[strcspn(vectors->line, "\n")] = '\0';
        if (vectors->line[0] != '#' && vectors->line[0] != '\0') return true;
    }
    fclose(vectors->file);
    return false;
}

__attribute__((unused)) static bool bytes_from_hex(const char *hex, uint8_t *out, size_t size) {
    if (strlen(hex) != 2 * size) return false;
    for (size_t i = 0; i < size; i++) {
        unsigned byte;
        if (sscanf(hex + 2 * i, "%2x", &byte) != 1) return false;
        out[i] = (uint8_t)byte;
    }
    return true;
}

/* The text of `key=` in a line of fields; REQUIREs that it is there. */
__attribute__((unused)) static const char *field_text(const char *fields, const char *key) {
    const size_t length = strlen(key);
    for (const char *at = fields; at != NULL; at = strchr(at, ' ')) {
        at += strspn(at, " ");
        if (strncmp(at, key, length) == 0 && at[length] == '=') return at + length + 1;
    }
    printf("  no field %s in: %s\n", key, fields);
    REQUIRE(!"field present");
    return NULL;
}

__attribute__((unused)) static uint64_t field_number(const char *fields, const char *key) {
    return strtoull(field_text(fields, key), NULL, 10);
}

#endif

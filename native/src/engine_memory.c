/* engine_memory.c: buffers that are used again, because fresh pages cost as much as the copy into them.
 *
 * copy_past: for bytes that nobody reads soon. A usual store reads the line it fills from memory first.
 * Pieces: one contribution until it is folded; few live at a time and stay in the cache. Scratch: whole results.
 * Threads: the engine's thread only. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "engine.h"

#define LINE_BYTES 64
#define PIECE_POOLED_MIN (SCHEDULE_PIECE_BYTES / 2) /* smaller ones: exact, so that early pieces cost what they count */
#define HUGE_BYTES ((size_t)2 << 20)
#define AHEAD_BYTES 2048             /* read ahead: the CPU's own reading ahead stops at each page */

uint8_t *piece_alloc(pyccl_engine *engine, uint32_t bytes) {
    PYCCL_ASSERT(bytes > 0 && bytes <= PYCCL_PIECE_MAX);
    if (bytes < PIECE_POOLED_MIN) return malloc(bytes);
    if (engine->piece_count > 0) return engine->pieces[--engine->piece_count];
    void *memory = NULL;
    return posix_memalign(&memory, 4096, PYCCL_PIECE_MAX) == 0 ? memory : NULL;
}

void piece_free(pyccl_engine *engine, uint8_t *memory, uint32_t bytes) {
    if (memory == NULL) return;
    if (bytes < PIECE_POOLED_MIN || engine->piece_count == PIECES_KEPT) free(memory);
    else engine->pieces[engine->piece_count++] = memory;
}

void copy_past(void *to, const void *from, size_t bytes) {
#if defined(__SSE2__)
    uint8_t *out = to;
    const uint8_t *in = from;
    const size_t head = (size_t)(-(uintptr_t)out & (LINE_BYTES - 1));
    if (bytes >= head + LINE_BYTES) {
        memcpy(out, in, head);
        out += head, in += head, bytes -= head;
        for (; bytes >= LINE_BYTES; out += LINE_BYTES, in += LINE_BYTES, bytes -= LINE_BYTES) {
            _mm_prefetch((const char *)((uintptr_t)in + AHEAD_BYTES), _MM_HINT_T0);
            __m128i line[4];
            for (int i = 0; i < 4; i++) line[i] = _mm_loadu_si128((const __m128i *)(const void *)in + i);
            for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)(void *)out + i, line[i]);
        }
    }
    memcpy(out, in, bytes);
#else
    memcpy(to, from, bytes);
#endif
}

void copy_past_end(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

static void *scratch_new(size_t bytes, size_t *taken_bytes) {
    void *memory = NULL;
    if (bytes < HUGE_BYTES) {
        *taken_bytes = bytes;
        return malloc(bytes);
    }
    if (bytes > SIZE_MAX - HUGE_BYTES) return NULL;
    *taken_bytes = (bytes + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);
    if (posix_memalign(&memory, HUGE_BYTES, *taken_bytes) != 0) return NULL;
    (void)madvise(memory, *taken_bytes, MADV_HUGEPAGE);
    return memory;
}

void *scratch_take(pyccl_engine *engine, size_t bytes, size_t *taken_bytes) {
    int best = -1;
    for (int i = 0; i < SCRATCH_KEPT; i++) {
        const size_t kept = engine->scratch[i].bytes;
        if (engine->scratch[i].memory == NULL || kept < bytes || kept / 16 > bytes) continue;
        if (best < 0 || kept < engine->scratch[best].bytes) best = i;
    }
    if (best < 0) return scratch_new(bytes, taken_bytes);
    void *memory = engine->scratch[best].memory;
    *taken_bytes = engine->scratch[best].bytes;
    engine->scratch[best].memory = NULL;
    engine->scratch[best].bytes = 0;
    return memory;
}

void scratch_give(pyccl_engine *engine, void *memory, size_t taken_bytes) {
    if (memory == NULL) return;
    int smallest = 0;
    for (int i = 1; i < SCRATCH_KEPT; i++)
        if (engine->scratch[i].bytes < engine->scratch[smallest].bytes) smallest = i;
    if (taken_bytes < HUGE_BYTES || engine->scratch[smallest].bytes >= taken_bytes) {
        free(memory);
        return;
    }
    free(engine->scratch[smallest].memory);
    engine->scratch[smallest].memory = memory;
    engine->scratch[smallest].bytes = taken_bytes;
}

void memory_fini(pyccl_engine *engine) {
    for (int i = 0; i < SCRATCH_KEPT; i++) free(engine->scratch[i].memory);
    free(engine->tile);
    while (engine->piece_count > 0) free(engine->pieces[--engine->piece_count]);
}

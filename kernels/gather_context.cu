// gather_context: brings together keys and values that lie apart, and queries as often as they are asked for.
//
// keys, values: (slots, width), contiguous; slots: (tokens,); key, value: (tokens, width). query: rows at a
// stride; rows: (queries,); queries: (queries, query_width). Widths are multiples of 8, all are aligned to
// 16 bytes. Bound: bytes of what is gathered, read once and written once.
// Grid: tokens * width / 8,192, rounded up, then the same of queries; 256 threads.
#include "ptx.cuh"

struct Gather {  // the same in device/step_parameters.py: GATHER
    const u16 *keys, *values, *query;
    const u32 *slots, *rows;
    u16 *key, *value, *queries;
    u32 tokens, width, query_rows, query_width, query_stride;
};

const u32 THREADS = 256, VECTORS = 4;  // VECTORS: of 8 elements, of a thread

__device__ __forceinline__ void copy(
    u16 *to, const u16 *from, const u32 *rows, u32 count, u32 width, u32 stride, u32 block) {
    const u32 vectors = width / 8, all = count * vectors, first = block * THREADS * VECTORS + threadIdx.x;
    uint4 kept[VECTORS];
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        const u32 i = first + v * THREADS;
        if (i < all) kept[v] = *(const uint4 *)(from + (u64)rows[i / vectors] * stride + i % vectors * 8);
    }
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        const u32 i = first + v * THREADS;
        if (i < all) *(uint4 *)(to + (u64)i * 8) = kept[v];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_context(const __grid_constant__ Gather g) {
    let_next_start();
    wait_for_prior();
    const u32 tile = THREADS * VECTORS, blocks = (g.tokens * (g.width / 8) + tile - 1) / tile;
    if (blockIdx.x < blocks) {
        copy(g.key, g.keys, g.slots, g.tokens, g.width, g.width, blockIdx.x);
        copy(g.value, g.values, g.slots, g.tokens, g.width, g.width, blockIdx.x);
    } else {
        copy(g.queries, g.query, g.rows, g.query_rows, g.query_width, g.query_stride, blockIdx.x - blocks);
    }
}

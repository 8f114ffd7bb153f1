// paged_attention: attention of one new token a session over a paged KV cache, on tensor cores.
//
// query, output: (sessions, heads, HEAD); keys, values: (slots, kv heads, HEAD), slot = block * block_tokens +
// offset; tables: (sessions, blocks) i32; lengths: (sessions,) i32, with the new token, whose key and value are
// in the cache already; a length of 0 gives zeros. A window counts the new token too.
// Bound: bytes of keys and values within the window, moved in once, whatever the number of heads that share.
// Grid: (kv heads, splits, sessions), 128 threads. GROUPS_OF_8: of heads that share keys and values.
//
// A warp takes tiles of 16 tokens in turn, alone: keys as the left side (tokens x HEAD) times queries (HEAD x 8
// heads), then the weights, turned within the warp, as the right side of (values turned) times (weights).
// Both sides of a product may take the inner dimension in any order, and rows may have any order: so lanes
// load 16 bytes of a token's key or value at once, straight from the cache, and nothing goes through shared
// memory. Values of a tile and keys of the next are on their way while scores are computed. A warp's first
// tile is on its way before the kernel before is done, unless the new token is in it: so nothing that lets
// this kernel start early may write lengths, tables, or keys and values of older tokens.
// The warps of a block are added up in their order, and so are the splits of a session, by the block that
// ends last: the result depends on length and splits only.
#include "attention_sums.cuh"

struct Work {  // of a warp
    u32 begin, end;         // tokens that may be looked at
    u32 tile, tiles, step;  // its first tile, the one behind the last of all, from one of its tiles to the next
    u32 splits;             // that have any tiles
};

struct Queries {
    uint4 at[NT][STEPS ? STEPS : 1];
    uint2 half[NT];
};

struct Keys {  // of tokens g and g + 8
    uint4 at[2][STEPS ? STEPS : 1];
    uint2 half[2];
};

struct Values {  // of tokens 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t
    uint4 at[4][PARTS ? PARTS : 1];
    uint2 rest[4];
};

__device__ __forceinline__ Work work_of(const Attention &a, u32 warp) {
    const u32 length = (u32)a.lengths[blockIdx.z];
    Work work;
    work.begin = a.window && length > a.window ? length - a.window : 0;
    work.end = length;
    const u32 first = work.begin / TILE;
    work.tiles = (length + TILE - 1) / TILE;
    work.splits = min(gridDim.y, (work.tiles - first + WARPS - 1) / WARPS);
    work.step = work.splits * WARPS;
    work.tile = first + blockIdx.y * WARPS + warp;
    return work;
}

// The slot of token `lane` % 16 of a tile; tokens outside are replaced by the nearest inside.
__device__ __forceinline__ u32 slot_of(const Attention &a, const Work &work, u32 tile, u32 lane) {
    const u32 token = min(max(tile * TILE + lane % TILE, work.begin), work.end - 1);
    const u32 block = token / a.block_tokens;
    const u32 number = (u32)a.tables[(u64)blockIdx.z * a.table_stride + block];
    return number * a.block_tokens + (token - block * a.block_tokens);
}

__device__ __forceinline__ const u16 *row_of(const u16 *cache, const Attention &a, u32 slot) {
    return cache + ((u64)slot * a.kv_heads + blockIdx.x) * HEAD;
}

// Where there are registers enough, loads stay where they are written.
__device__ __forceinline__ uint4 load_16(const u16 *from) {
    return IS_EARLY ? load_once(from) : *(const uint4 *)from;
}

__device__ __forceinline__ void load(Keys &keys, const Attention &a, u32 slot, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u16 *row = row_of(a.keys, a, __shfl_sync(ALL_LANES, slot, g + 8 * i));
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) keys.at[i][s] = load_16(row + 32 * s + 8 * t);
        if (HALF_STEP) keys.half[i] = *(const uint2 *)(row + 32 * STEPS + 4 * t);
    }
}

__device__ __forceinline__ void load(Values &values, const Attention &a, u32 slot, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u16 *row = row_of(a.values, a, __shfl_sync(ALL_LANES, slot, 2 * t + i % 2 + i / 2 * 8));
#pragma unroll
        for (u32 p = 0; p < PARTS; p++) values.at[i][p] = load_16(row + 64 * p + 8 * g);
        if (REST == 32) values.rest[i] = *(const uint2 *)(row + 64 * PARTS + 4 * g);
        if (REST == 16) values.rest[i].x = *(const u32 *)(row + 64 * PARTS + 2 * g);
    }
}

__device__ __forceinline__ void load(Queries &queries, const Attention &a, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
        const bool is_there = 8 * n + g < a.group;
        const u32 head = blockIdx.x * a.group + (is_there ? 8 * n + g : 0);
        const u16 *row = a.query + (u64)blockIdx.z * a.query_stride + head * HEAD;
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) queries.at[n][s] = *(const uint4 *)(row + 32 * s + 8 * t);
        if (HALF_STEP) queries.half[n] = *(const uint2 *)(row + 32 * STEPS + 4 * t);
        if (is_there) continue;
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) queries.at[n][s] = make_uint4(0, 0, 0, 0);
        queries.half[n] = make_uint2(0, 0);
    }
}

// Scores of tokens g, g + 8 (i / 2) and heads 2 t, 2 t + 1 (i % 2).
__device__ __forceinline__ void multiply_keys(float (&scores)[4], const Keys &keys, const Queries &q, u32 n) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) scores[i] = 0;
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        const uint4 a = keys.at[0][s], b = keys.at[1][s], c = q.at[n][s];
        multiply(scores, a.x, b.x, a.y, b.y, c.x, c.y);
        multiply(scores, a.z, b.z, a.w, b.w, c.z, c.w);
    }
    if (HALF_STEP)
        multiply(scores, keys.half[0].x, keys.half[1].x, keys.half[0].y, keys.half[1].y, q.half[n].x,
                 q.half[n].y);
}

// Squash, mask and scale scores, so that weights are powers of two of them.
__device__ __forceinline__ void prepare(
    float (&scores)[4], const Attention &a, const Work &work, u32 tile, u32 g) {
    const float LOG2E = 1.4426950409f;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        float score = scores[i] * a.scale;
        if (a.softcap > 0)  // tanh x = 1 - 2 / (exp 2 x + 1)
            score = a.softcap - 2 * a.softcap / (power_of_two(2 * LOG2E / a.softcap * score) + 1);
        const u32 token = tile * TILE + g + i / 2 * 8;
        scores[i] = token >= work.begin && token < work.end ? score * LOG2E : -__int_as_float(0x7f800000);
    }
}

// Make scores into weights, and all that was added up before refer to the same largest score.
__device__ __forceinline__ void weigh(float (&scores)[4], Sums &sums, u32 n) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        float largest = fmaxf(scores[i], scores[i + 2]);
#pragma unroll
        for (u32 step = 4; step < 32; step *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        largest = fmaxf(largest, sums.largest[n][i]);
        const float factor = power_of_two(sums.largest[n][i] - largest);
        sums.largest[n][i] = largest;
        scores[i] = power_of_two(scores[i] - largest);
        scores[i + 2] = power_of_two(scores[i + 2] - largest);
        sums.weights[n][i] = sums.weights[n][i] * factor + scores[i] + scores[i + 2];
#pragma unroll
        for (u32 j = 0; j < TILES; j++) {
            sums.at[n][j][i] *= factor;
            sums.at[n][j][i + 2] *= factor;
        }
    }
}

// Add two elements, a word of each of four tokens, times their weights: rows g and g + 8 of a product.
__device__ __forceinline__ void multiply_words(
    Sums &sums, u32 j, u32 v0, u32 v1, u32 v2, u32 v3, const u32 (&weights)[NT][2]) {
    const u32 a0 = __byte_perm(v0, v1, 0x5410), a1 = __byte_perm(v0, v1, 0x7632);
    const u32 a2 = __byte_perm(v2, v3, 0x5410), a3 = __byte_perm(v2, v3, 0x7632);
#pragma unroll
    for (u32 n = 0; n < NT; n++) multiply(sums.at[n][j], a0, a1, a2, a3, weights[n][0], weights[n][1]);
}

__device__ __forceinline__ void multiply_values(
    Sums &sums, const Values &values, const u32 (&weights)[NT][2]) {
#pragma unroll
    for (u32 p = 0; p < PARTS; p++) {  // elements 64 p + 8 g + 2 j, and the next
        const uint4 a = values.at[0][p], b = values.at[1][p], c = values.at[2][p], d = values.at[3][p];
        multiply_words(sums, 4 * p, a.x, b.x, c.x, d.x, weights);
        multiply_words(sums, 4 * p + 1, a.y, b.y, c.y, d.y, weights);
        multiply_words(sums, 4 * p + 2, a.z, b.z, c.z, d.z, weights);
        multiply_words(sums, 4 * p + 3, a.w, b.w, c.w, d.w, weights);
    }
    const uint2 a = values.rest[0], b = values.rest[1], c = values.rest[2], d = values.rest[3];
    if (REST >= 16) multiply_words(sums, 4 * PARTS, a.x, b.x, c.x, d.x, weights);
    if (REST == 32) multiply_words(sums, 4 * PARTS + 1, a.y, b.y, c.y, d.y, weights);
}

// Waits for the kernel before; nothing is added for a warp without tiles.
__device__ __forceinline__ void attend(Sums &sums, const Attention &a, const Work &work, u32 lane) {
    u32 tile = work.tile, slot = 0;
    const bool is_there = blockIdx.y < work.splits && tile < work.tiles;
    const bool is_old = IS_EARLY && is_there && (tile + 1) * TILE < work.end;  // the new token is elsewhere
    Keys keys;
    Values values;
    if (is_there) slot = slot_of(a, work, tile, lane);
    if (is_old) {
        load(keys, a, slot, lane);
        load(values, a, slot, lane);
    }
    wait_for_prior();
    if (!is_there) return;
    Queries queries;
    load(queries, a, lane);
    if (!is_old) load(keys, a, slot, lane);
    u32 next_slot = slot_of(a, work, tile + work.step, lane);
    for (bool has_values = is_old; tile < work.tiles; tile += work.step, has_values = false) {
        if (!has_values) load(values, a, slot, lane);
        float scores[NT][4];
#pragma unroll
        for (u32 n = 0; n < NT; n++) multiply_keys(scores[n], keys, queries, n);
        slot = next_slot;
        if (IS_EARLY && tile + work.step < work.tiles) load(keys, a, slot, lane);
        next_slot = slot_of(a, work, tile + 2 * work.step, lane);
        u32 weights[NT][2];
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
            prepare(scores[n], a, work, tile, lane / 4);
            weigh(scores[n], sums, n);
            weights[n][0] = transposed(packed(scores[n][0], scores[n][1]));
            weights[n][1] = transposed(packed(scores[n][2], scores[n][3]));
        }
        multiply_values(sums, values, weights);
        if (!IS_EARLY) load(keys, a, slot, lane);  // there are no registers for both
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) paged_attention(
    const __grid_constant__ Attention attention) {
    __shared__ Shared shared;
    let_next_start();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Work work = work_of(attention, warp);
    Sums sums;
    clear(sums);
    attend(sums, attention, work, lane);
    if (work.end == 0 && blockIdx.y == 0) store_zeros(attention);
    if (blockIdx.y >= work.splits) return;
    gather(shared, attention, sums, work.splits, warp, lane);
    if (work.splits > 1) combine(shared, attention, work.splits, warp, lane);
}

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
// memory. Values of a tile and keys of the next are on their way while scores are computed.
// The warps of a block are added up in their order, and so are the splits of a session, by the block that
// ends last: the result depends on length and splits only.
#include "ptx.cuh"

#ifndef HEAD
#define HEAD 128
#endif
#ifndef GROUPS_OF_8
#define GROUPS_OF_8 1
#endif

typedef int i32;

struct Attention {  // the same in device/step_parameters.py: ATTENTION
    const u16 *query, *keys, *values;
    const i32 *tables, *lengths;
    u16 *output;
    float *sums;     // (sessions, kv heads, splits, group, HEAD), for splits > 1
    float2 *scales;  // (sessions, kv heads, splits, group): largest score, sum of weights
    u32 *arrived;    // (sessions, kv heads), zero; left zero
    u32 kv_heads, group, block_tokens, table_stride, window, query_stride, output_stride;
    float scale, softcap;  // softcap: 0 for none
};

const u32 WARPS = 4, TILE = 16;
const u32 NT = GROUPS_OF_8;
const u32 STEPS = HEAD / 32;           // of 32 elements, 16 bytes a lane
const bool HALF_STEP = HEAD % 32;      // and one of 16 elements
const u32 PARTS = HEAD / 64;           // of 64 elements of a value, 16 bytes a lane
const u32 REST = HEAD % 64;            // 0, 16 or 32: 4 or 8 bytes a lane
const u32 TILES = HEAD / 16;           // of the output
const u32 HEADS = 8 * NT;
const float LOWEST = -1e30f;           // below every score; not infinite, so that differences are numbers
static_assert(HEAD % 16 == 0 && HEAD % 64 != 48, "a head of this size is not split into lanes");

struct Work {  // of a thread block
    u32 begin, end;             // tokens that may be looked at
    u32 tile, tiles, splits;    // first tile, tile behind the last, splits that have any
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

struct Sums {  // with g = lane / 4, t = lane % 4: head 2 t + i % 2, elements as in multiply_values
    float at[NT][TILES][4];
    float largest[NT][2], weights[NT][2];  // of heads 2 t, 2 t + 1; weights: of this lane's tokens
};

__device__ __forceinline__ Work work_of(const Attention &a) {
    const u32 length = (u32)a.lengths[blockIdx.z];
    Work work;
    work.begin = a.window && length > a.window ? length - a.window : 0;
    work.end = length;
    const u32 first = work.begin / TILE, all = (length + TILE - 1) / TILE - first;
    const u32 share = max(WARPS, (all + gridDim.y - 1) / gridDim.y);
    work.splits = (all + share - 1) / share;
    work.tile = first + min(all, blockIdx.y * share);
    work.tiles = first + min(all, (blockIdx.y + 1) * share);
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

__device__ __forceinline__ void load(Keys &keys, const Attention &a, u32 slot, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u16 *row = row_of(a.keys, a, __shfl_sync(ALL_LANES, slot, g + 8 * i));
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) keys.at[i][s] = *(const uint4 *)(row + 32 * s + 8 * t);
        if (HALF_STEP) keys.half[i] = *(const uint2 *)(row + 32 * STEPS + 4 * t);
    }
}

__device__ __forceinline__ void load(Values &values, const Attention &a, u32 slot, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u16 *row = row_of(a.values, a, __shfl_sync(ALL_LANES, slot, 2 * t + i % 2 + i / 2 * 8));
#pragma unroll
        for (u32 p = 0; p < PARTS; p++) values.at[i][p] = *(const uint4 *)(row + 64 * p + 8 * g);
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

// The first of the two elements that a lane has in tile j of the output.
__device__ __forceinline__ u32 element(u32 j, u32 g) {
    if (j < 4 * PARTS) return 64 * (j / 4) + 8 * g + 2 * (j % 4);
    return 64 * PARTS + REST / 8 * g + 2 * (j - 4 * PARTS);
}

__device__ __forceinline__ void clear(Sums &sums) {
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            sums.largest[n][i] = LOWEST;
            sums.weights[n][i] = 0;
        }
#pragma unroll
        for (u32 j = 0; j < TILES; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums.at[n][j][i] = 0;
    }
}

__device__ __forceinline__ void attend(Sums &sums, const Attention &a, const Work &work, u32 warp, u32 lane) {
    if (work.tile + warp >= work.tiles) return;
    Queries queries;
    load(queries, a, lane);
    u32 tile = work.tile + warp;
    u32 slot = slot_of(a, work, tile, lane);
    u32 next_slot = slot_of(a, work, min(tile + WARPS, work.tiles - 1), lane);
    Keys keys;
    Values values;
    load(keys, a, slot, lane);
    for (; tile < work.tiles; tile += WARPS) {
        load(values, a, slot, lane);
        float scores[NT][4];
#pragma unroll
        for (u32 n = 0; n < NT; n++) multiply_keys(scores[n], keys, queries, n);
        slot = next_slot;
        load(keys, a, slot, lane);  // behind the last tile: one of its tokens, for nothing
        next_slot = slot_of(a, work, min(tile + 2 * WARPS, work.tiles - 1), lane);
        u32 weights[NT][2];
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
            prepare(scores[n], a, work, tile, lane / 4);
            weigh(scores[n], sums, n);
            weights[n][0] = transposed(packed(scores[n][0], scores[n][1]));
            weights[n][1] = transposed(packed(scores[n][2], scores[n][3]));
        }
        multiply_values(sums, values, weights);
    }
}

struct Shared {
    float sums[HEADS][HEAD + 4];
    float largest[WARPS][HEADS], weights[WARPS][HEADS];
    float top[HEADS], total[HEADS];
    u32 is_last;
};

// Add the warps up, in their order.
__device__ __forceinline__ void gather(Shared &shared, Sums &sums, u32 warp, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 n = 0; n < NT; n++)
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float weights = sums.weights[n][i];
#pragma unroll
            for (u32 step = 4; step < 32; step *= 2)
                weights += __shfl_xor_sync(ALL_LANES, weights, step);
            if (g) continue;
            shared.largest[warp][8 * n + 2 * t + i] = sums.largest[n][i];
            shared.weights[warp][8 * n + 2 * t + i] = weights;
        }
    __syncthreads();
    if (threadIdx.x < HEADS) {
        const u32 head = threadIdx.x;
        float top = LOWEST, total = 0;
        for (u32 w = 0; w < WARPS; w++) top = fmaxf(top, shared.largest[w][head]);
        for (u32 w = 0; w < WARPS; w++)
            total += shared.weights[w][head] * power_of_two(shared.largest[w][head] - top);
        shared.top[head] = top;
        shared.total[head] = total;
    }
    __syncthreads();
    for (u32 w = 0; w < WARPS; w++) {
        if (warp == w) {
#pragma unroll
            for (u32 n = 0; n < NT; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 head = 8 * n + 2 * t + i % 2;
                    const float factor = power_of_two(sums.largest[n][i % 2] - shared.top[head]);
#pragma unroll
                    for (u32 j = 0; j < TILES; j++) {
                        float &sum = shared.sums[head][element(j, g) + i / 2];
                        sum = (w ? sum : 0) + sums.at[n][j][i] * factor;
                    }
                }
        }
        __syncthreads();
    }
}

__device__ __forceinline__ u16 *output_of(const Attention &a, u32 head) {
    return a.output + (u64)blockIdx.z * a.output_stride + (blockIdx.x * a.group + head) * HEAD;
}

__device__ __forceinline__ void store_zeros(const Attention &a) {
    for (u32 e = threadIdx.x; e < a.group * HEAD; e += 32 * WARPS) output_of(a, e / HEAD)[e % HEAD] = 0;
}

// Keep what this split has; the block that comes last adds up all of them.
__device__ __forceinline__ void combine(Shared &shared, const Attention &a, const Work &work) {
    const u64 pair = (u64)blockIdx.z * a.kv_heads + blockIdx.x;
    float *sums = a.sums + pair * gridDim.y * a.group * HEAD;
    float2 *scales = a.scales + pair * gridDim.y * a.group;
    const u32 size = a.group * HEAD;
    for (u32 e = threadIdx.x; e < size; e += 32 * WARPS)
        sums[blockIdx.y * size + e] = shared.sums[e / HEAD][e % HEAD];
    if (threadIdx.x < a.group)
        scales[blockIdx.y * a.group + threadIdx.x] =
            make_float2(shared.top[threadIdx.x], shared.total[threadIdx.x]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = atomicInc(a.arrived + pair, work.splits - 1) == work.splits - 1;
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    for (u32 e = threadIdx.x; e < size; e += 32 * WARPS) {
        const u32 head = e / HEAD;
        float top = LOWEST, total = 0, sum = 0;
        for (u32 s = 0; s < work.splits; s++) top = fmaxf(top, __ldcg(scales + s * a.group + head).x);
#pragma unroll 4
        for (u32 s = 0; s < work.splits; s++) {
            const float2 scale = __ldcg(scales + s * a.group + head);
            const float factor = power_of_two(scale.x - top);
            total += scale.y * factor;
            sum += __ldcg(sums + s * size + e) * factor;
        }
        output_of(a, head)[e % HEAD] = to_half(sum / total);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) paged_attention(
    const __grid_constant__ Attention attention) {
    __shared__ Shared shared;
    let_next_start();
    wait_for_prior();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Work work = work_of(attention);
    if (work.end == 0 && blockIdx.y == 0) store_zeros(attention);
    if (blockIdx.y >= work.splits) return;
    Sums sums;
    clear(sums);
    attend(sums, attention, work, warp, lane);
    gather(shared, sums, warp, lane);
    if (work.splits > 1) {
        combine(shared, attention, work);
        return;
    }
    for (u32 e = threadIdx.x; e < attention.group * HEAD; e += 32 * WARPS) {
        const u32 head = e / HEAD;
        output_of(attention, head)[e % HEAD] = to_half(shared.sums[head][e % HEAD] / shared.total[head]);
    }
}

// What attention adds up: a warp's sums, those of the warps of a block, those of the splits of a session.
//
// Sums are kept in the order in which lanes have them (`place`), so that they go through memory in whole lines.
#pragma once

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
const u32 QUADS = HEAD / 4;            // of sums of a head, 16 bytes a thread
const u32 PITCH = HEAD + 8;            // floats of a head in shared memory, so that lanes hit different banks
const u32 SPLITS_MAX = 128;            // the same in engine/paged_attention.py
const bool IS_EARLY = HEAD <= 128;     // the first tile comes before the kernel before is done
const u32 BATCH = 8;                   // splits whose sums a thread has on their way
const float LOWEST = -1e30f;           // below every score; not infinite, so that differences are numbers
static_assert(HEAD % 16 == 0 && HEAD % 64 != 48, "a head of this size is not split into lanes");

struct Sums {  // with g = lane / 4, t = lane % 4: head 2 t + i % 2, elements as in multiply_values
    float at[NT][TILES][4];
    float largest[NT][2], weights[NT][2];  // of heads 2 t, 2 t + 1; weights: of this lane's tokens
};

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

struct Shared {
    union {
        float sums[WARPS][8][PITCH];        // of 8 heads at a time
        float2 scales[SPLITS_MAX * HEADS];  // of all splits; then their factors
    };
    float largest[WARPS][HEADS], weights[WARPS][HEADS];
    float total[HEADS];
    u32 is_last;
};

// Where the first of two elements of tile j is kept; those of lanes follow each other.
__device__ __forceinline__ u32 place(u32 j, u32 g) { return 16 * j + 2 * g; }

__device__ __forceinline__ void share_weights(Shared &shared, const Sums &sums, u32 warp, u32 lane) {
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
}

__device__ __forceinline__ void share_sums(Shared &shared, const Sums &sums, u32 n, u32 warp, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 j = 0; j < TILES; j++)
            *(float2 *)(shared.sums[warp][2 * t + i] + place(j, g)) =
                make_float2(sums.at[n][j][i], sums.at[n][j][i + 2]);
}

__device__ __forceinline__ void add(float4 &sum, float4 more, float factor) {
    sum.x += more.x * factor;
    sum.y += more.y * factor;
    sum.z += more.z * factor;
    sum.w += more.w * factor;
}

__device__ __forceinline__ void store(const Attention &a, u32 head, u32 quad, float4 sum, float total) {
    u16 *output = a.output + (u64)blockIdx.z * a.output_stride + (blockIdx.x * a.group + head) * HEAD;
    const u32 j = quad / 4, g = quad % 4 * 2;
    *(u32 *)(output + element(j, g)) = packed(sum.x / total, sum.y / total);
    *(u32 *)(output + element(j, g + 1)) = packed(sum.z / total, sum.w / total);
}

__device__ __forceinline__ void store_zeros(const Attention &a) {
    for (u32 f = threadIdx.x; f < a.group * QUADS; f += 32 * WARPS)
        store(a, f / QUADS, f % QUADS, make_float4(0, 0, 0, 0), 1);
}

// This split's sums and scales among those of a session and a head of keys.
__device__ __forceinline__ u64 part_of(const Attention &a, u32 split) {
    const u64 pair = (u64)blockIdx.z * a.kv_heads + blockIdx.x;
    return (pair * gridDim.y + split) * a.group;
}

// Add the warps up, in their order, and keep or store what comes out.
__device__ __forceinline__ void gather(
    Shared &shared, const Attention &a, const Sums &sums, u32 splits, u32 warp, u32 lane) {
    share_weights(shared, sums, warp, lane);
#pragma unroll
    for (u32 n = 0; n < NT; n++) {
        if (8 * n >= a.group) break;
        if (n) __syncthreads();
        share_sums(shared, sums, n, warp, lane);
        __syncthreads();
        for (u32 f = threadIdx.x; f < min(8u, a.group - 8 * n) * QUADS; f += 32 * WARPS) {
            const u32 head = 8 * n + f / QUADS, quad = f % QUADS;
            float top = LOWEST, total = 0;
            float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) top = fmaxf(top, shared.largest[w][head]);
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) {
                const float factor = power_of_two(shared.largest[w][head] - top);
                total += shared.weights[w][head] * factor;
                add(sum, *(const float4 *)(shared.sums[w][f / QUADS] + 4 * quad), factor);
            }
            if (splits == 1) {
                store(a, head, quad, sum, total);
                continue;
            }
            const u64 part = part_of(a, blockIdx.y) + head;
            ((float4 *)a.sums)[part * QUADS + quad] = sum;
            if (quad == 0) a.scales[part] = make_float2(top, total);
        }
    }
}

__device__ __forceinline__ bool is_last(Shared &shared, const Attention &a, u32 splits) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        u32 *arrived = a.arrived + blockIdx.z * a.kv_heads + blockIdx.x;
        shared.is_last = atomicInc(arrived, splits - 1) == splits - 1;
        __threadfence();
    }
    __syncthreads();
    return shared.is_last;
}

// Make the scales of all splits into factors, and add up their weights: a warp a head.
__device__ __forceinline__ void make_factors(
    Shared &shared, const Attention &a, u32 splits, u32 warp, u32 lane) {
    const float2 *scales = a.scales + part_of(a, 0);
    for (u32 i = threadIdx.x; i < splits * a.group; i += 32 * WARPS) shared.scales[i] = __ldcg(scales + i);
    __syncthreads();
    for (u32 head = warp; head < a.group; head += WARPS) {
        float top = LOWEST, total = 0;
        for (u32 s = lane; s < splits; s += 32) top = fmaxf(top, shared.scales[s * a.group + head].x);
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
        for (u32 s = lane; s < splits; s += 32) {
            float2 &scale = shared.scales[s * a.group + head];
            scale.x = power_of_two(scale.x - top);
            total += scale.x * scale.y;
        }
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
        if (lane == 0) shared.total[head] = total;
    }
    __syncthreads();
}

__device__ __forceinline__ void read(
    float4 (&sums)[BATCH], const float4 *from, u32 split, u32 splits, u32 size) {
#pragma unroll
    for (u32 i = 0; i < BATCH; i++) sums[i] = __ldcg(from + min(split + i, splits - 1) * size);
}

// The block that comes last adds up all splits, in their order.
__device__ __forceinline__ void combine(Shared &shared, const Attention &a, u32 splits, u32 warp, u32 lane) {
    if (!is_last(shared, a, splits)) return;
    const u32 size = a.group * QUADS;
    const float4 *sums = (const float4 *)a.sums + part_of(a, 0) * QUADS;
    float4 batch[BATCH];  // the first is on its way while factors are made
    read(batch, sums + min(threadIdx.x, size - 1), 0, splits, size);
    make_factors(shared, a, splits, warp, lane);
    for (u32 f = threadIdx.x; f < size; f += 32 * WARPS) {
        float4 sum = make_float4(0, 0, 0, 0);
        for (u32 split = 0; split < splits; split += BATCH) {
            if (split || f != threadIdx.x) read(batch, sums + f, split, splits, size);
#pragma unroll
            for (u32 i = 0; i < BATCH; i++)
                if (split + i < splits) add(sum, batch[i], shared.scales[(split + i) * a.group + f / QUADS].x);
        }
        store(a, f / QUADS, f % QUADS, sum, shared.total[f / QUADS]);
    }
}

// rope_kv: rotates queries and keys by their positions, and puts keys and values into a paged KV cache.
//
// query: (tokens, heads, size), rotated in place; key, value: (tokens, kv heads, size); cosines, sines: (tokens,
// rotary), as transformers makes them, f32 or floats of 16 bits; of a head the first `rotary` elements are
// rotated, element i with i + rotary / 2; slots: (tokens,) i32, below 0 for a token that is not kept.
// query_norm, key_norm: (size,), weights of an RMSNorm of each head before that, or 0.
// Slots and norms are read before the kernel before is done: it must not write them.
// Bound: none, it is small: a memory's latency or two. Grid: (thread blocks of 4 warps, a head each, tokens).
#include "ptx.cuh"

typedef int i32;

struct Rotation {  // the same in device/step_parameters.py: ROTATION
    u16 *query;
    const u16 *key, *value, *query_norm, *key_norm;
    const void *cosines, *sines;
    const i32 *slots;
    u16 *keys, *values;
    u32 heads, kv_heads, size, rotary, query_stride, key_stride, value_stride, angle_stride;
    u32 angles_are_f32;
    float epsilon, norm_offset;
};

const u32 WARPS = 4, HEAD_MAX = 256;
const u32 PARTS = HEAD_MAX / 32;  // elements of a lane

struct Part {  // of a head, that a lane has: elements `lane`, 32 + `lane` and so on; 0 beyond the head
    float at[PARTS];
};

__device__ __forceinline__ void read(Part &part, const u16 *from, u32 size, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < PARTS; i++) part.at[i] = lane + 32 * i < size ? to_float(from[lane + 32 * i]) : 0;
}

__device__ __forceinline__ void read(Part &part, const void *angles, const Rotation &r, u32 lane) {
    const u32 at = blockIdx.y * r.angle_stride;
    if (!r.angles_are_f32) {
        read(part, (const u16 *)angles + at, r.rotary, lane);
        return;
    }
    const float *from = (const float *)angles + at;
#pragma unroll
    for (u32 i = 0; i < PARTS; i++) part.at[i] = lane + 32 * i < r.rotary ? from[lane + 32 * i] : 0;
}

__device__ __forceinline__ void normalise(Part &head, const Part &norm, const Rotation &r) {
    float squares = 0;
#pragma unroll
    for (u32 i = 0; i < PARTS; i++) squares += head.at[i] * head.at[i];
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(ALL_LANES, squares, step);
    const float factor = rsqrtf(squares / r.size + r.epsilon);
#pragma unroll
    for (u32 i = 0; i < PARTS; i++) head.at[i] *= factor * (norm.at[i] + r.norm_offset);
}

// Norm a head if there are weights, rotate it, and put it where it belongs. `shared`: room for it.
__device__ __forceinline__ void rotate(
    u16 *to, const u16 *from, const Part &norm, bool is_normed, float *shared, const Rotation &r, u32 lane) {
    Part head, cosines, sines;  // all of them on their way at once
    read(head, from, r.size, lane);
    read(cosines, r.cosines, r, lane);
    read(sines, r.sines, r, lane);
    if (is_normed) normalise(head, norm, r);
#pragma unroll
    for (u32 i = 0; i < PARTS; i++) shared[lane + 32 * i] = head.at[i];
    __syncwarp();
    const u32 half = r.rotary / 2;
#pragma unroll
    for (u32 i = 0; i < PARTS; i++) {
        const u32 element = lane + 32 * i;
        if (element >= r.size) break;
        float x = head.at[i];
        if (element < r.rotary) {
            const float other = element < half ? -shared[element + half] : shared[element - half];
            x = x * cosines.at[i] + other * sines.at[i];
        }
        to[element] = to_half(x);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) rope_kv(const __grid_constant__ Rotation r) {
    __shared__ float heads[WARPS][HEAD_MAX];
    let_next_start();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.y;
    const u32 number = blockIdx.x * WARPS + warp;  // of queries, then keys, then values
    const bool is_query = number < r.heads, is_key = !is_query && number < r.heads + r.kv_heads;
    const u32 head = number - (is_query ? 0 : is_key ? r.heads : r.heads + r.kv_heads);
    const u16 *weights = is_query ? r.query_norm : r.key_norm;
    const bool is_normed = weights && (is_query || is_key);
    Part norm;
    if (is_normed) read(norm, weights, r.size, lane);
    const i32 slot = r.slots[token];
    wait_for_prior();
    if (!is_query && (head >= r.kv_heads || slot < 0)) return;
    const u64 place = ((u64)slot * r.kv_heads + head) * r.size;
    if (is_query || is_key) {
        u16 *query = r.query + (u64)token * r.query_stride + head * r.size;
        const u16 *key = r.key + (u64)token * r.key_stride + head * r.size;
        u16 *to = is_query ? query : r.keys + place;
        rotate(to, is_query ? query : key, norm, is_normed, heads[warp], r, lane);
        return;
    }
    Part value;
    read(value, r.value + (u64)token * r.value_stride + head * r.size, r.size, lane);
#pragma unroll
    for (u32 i = 0; i < PARTS; i++)
        if (lane + 32 * i < r.size) r.values[place + lane + 32 * i] = to_half(value.at[i]);
}

// rope_kv: rotates queries and keys by their positions, and puts keys and values into a paged KV cache.
//
// query: (tokens, heads, size), rotated in place; key, value: (tokens, kv heads, size); cosines, sines: (tokens,
// rotary), as transformers makes them, f32 or floats of 16 bits; of a head the first `rotary` elements are
// rotated, element i with i + rotary / 2; slots: (tokens,) i32, below 0 for a token that is not kept.
// query_norm, key_norm: (size,), weights of an RMSNorm of each head before that, or 0.
// Bound: none, it is small. Grid: (thread blocks of 4 warps, a head each, tokens).
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

__device__ __forceinline__ float angle(const void *from, u32 at, u32 is_f32) {
    return is_f32 ? ((const float *)from)[at] : to_float(((const u16 *)from)[at]);
}

// Read a head into shared memory, normed if there are weights.
__device__ __forceinline__ void read_head(
    float *head, const u16 *from, const u16 *norm, const Rotation &r, u32 lane) {
    float squares = 0;
    for (u32 i = lane; i < r.size; i += 32) {
        const float x = to_float(from[i]);
        head[i] = x;
        squares += x * x;
    }
    if (norm) {
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(ALL_LANES, squares, step);
        const float factor = rsqrtf(squares / r.size + r.epsilon);
        for (u32 i = lane; i < r.size; i += 32) head[i] *= factor * (to_float(norm[i]) + r.norm_offset);
    }
    __syncwarp();
}

__device__ __forceinline__ void write_rotated(
    u16 *to, const float *head, const Rotation &r, u32 token, u32 lane) {
    const u32 half = r.rotary / 2;
    for (u32 i = lane; i < r.size; i += 32) {
        float x = head[i];
        if (i < r.rotary) {
            const u32 at = token * r.angle_stride + i;
            const float other = i < half ? -head[i + half] : head[i - half];
            x = x * angle(r.cosines, at, r.angles_are_f32) + other * angle(r.sines, at, r.angles_are_f32);
        }
        to[i] = to_half(x);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) rope_kv(const __grid_constant__ Rotation r) {
    __shared__ float heads[WARPS][HEAD_MAX];
    let_next_start();
    wait_for_prior();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.y;
    u32 head = blockIdx.x * WARPS + warp;
    if (head < r.heads) {
        u16 *query = r.query + (u64)token * r.query_stride + head * r.size;
        read_head(heads[warp], query, r.query_norm, r, lane);
        write_rotated(query, heads[warp], r, token, lane);
        return;
    }
    head -= r.heads;
    const i32 slot = r.slots[token];
    if (head >= 2 * r.kv_heads || slot < 0) return;
    const bool is_key = head < r.kv_heads;
    if (!is_key) head -= r.kv_heads;
    const u64 place = ((u64)slot * r.kv_heads + head) * r.size;
    if (is_key) {
        read_head(heads[warp], r.key + (u64)token * r.key_stride + head * r.size, r.key_norm, r, lane);
        write_rotated(r.keys + place, heads[warp], r, token, lane);
        return;
    }
    const u16 *value = r.value + (u64)token * r.value_stride + head * r.size;
    for (u32 i = lane; i < r.size; i += 32) r.values[place + i] = value[i];
}

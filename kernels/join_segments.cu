// join_segments: puts together what queries gave over parts of their context, by the logarithms of sums.
//
// near, output: (tokens, heads, size), tokens at strides; far: (rows, heads, size), contiguous; size is a
// multiple of 8, all are aligned to 16 bytes. near_logs, far_logs: fp32, a row of tokens or rows for each
// head. places: (3, tokens): of each token its first row in far, how many there are, how far apart.
// Bound: bytes of near, far and output, once each. Grid: (heads * size / 2,048, rounded up, tokens), 256
// threads.
#include "ptx.cuh"

struct Join {  // the same in device/step_parameters.py: JOIN
    const u16 *near_part, *far_parts;
    const float *near_logs, *far_logs;
    const u32 *places;
    u16 *output;
    u32 heads, size, tokens, near_stride, output_stride, near_logs_stride, far_logs_stride;
};

__device__ __forceinline__ void add(float *sums, const u16 *from, float weight) {
    const uint4 part = *(const uint4 *)from;
    sums[0] += weight * low_float(part.x), sums[1] += weight * high_float(part.x);
    sums[2] += weight * low_float(part.y), sums[3] += weight * high_float(part.y);
    sums[4] += weight * low_float(part.z), sums[5] += weight * high_float(part.z);
    sums[6] += weight * low_float(part.w), sums[7] += weight * high_float(part.w);
}

extern "C" __global__ void __launch_bounds__(256) join_segments(const __grid_constant__ Join j) {
    let_next_start();
    wait_for_prior();
    const u64 token = blockIdx.y, width = (u64)j.heads * j.size;
    const u32 i = (blockIdx.x * 256 + threadIdx.x) * 8;
    if (i >= width) return;
    const u64 head = i / j.size;
    const u64 first = j.places[token], apart = j.places[2 * (u64)j.tokens + token];
    const u32 count = j.places[j.tokens + token];
    const float *logs = j.far_logs + head * j.far_logs_stride + first;
    const float own = j.near_logs[head * j.near_logs_stride + token];
    float most = own;
    for (u32 s = 0; s < count; s++) most = fmaxf(most, logs[s * apart]);
    float sums[8] = {}, total = power_of_two(1.4426950409f * (own - most));
    add(sums, j.near_part + token * j.near_stride + i, total);
    for (u32 s = 0; s < count; s++) {
        const float weight = power_of_two(1.4426950409f * (logs[s * apart] - most));
        add(sums, j.far_parts + (first + s * apart) * width + i, weight);
        total += weight;
    }
    const float share = 1.f / total;
    *(uint4 *)(j.output + token * j.output_stride + i) =
        make_uint4(packed(sums[0] * share, sums[1] * share), packed(sums[2] * share, sums[3] * share),
                   packed(sums[4] * share, sums[5] * share), packed(sums[6] * share, sums[7] * share));
}

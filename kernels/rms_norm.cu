// rms_norm: adds a delta to rows of a residual, and norms the sum by the root of its mean square.
//
// x, delta, sum, output: (rows, size), delta and sum may be 0, and sum may be x; norm: (size,).
// output = sum / sqrt(mean(sum^2) + epsilon) * (norm + norm_offset), of the sum as it is kept, in 16 bits.
// Bound: bytes of x, delta, sum and output, once each; norm comes before the kernel before is done.
// Grid: a thread block of 256 for each row.
// size is a multiple of 8 up to 16,384; all are aligned to 16 bytes.
#include "ptx.cuh"

struct Norm {  // the same in device/step_parameters.py: NORM
    const u16 *x, *delta, *norm;
    u16 *sum, *output;
    u32 size, x_stride, delta_stride, sum_stride, output_stride;
    float epsilon, norm_offset;
};

const u32 THREADS = 256, VECTORS = 8;  // VECTORS: of 8 elements, of a thread

__device__ __forceinline__ u32 added(u32 x, u32 delta) {
    return packed(low_float(x) + low_float(delta), high_float(x) + high_float(delta));
}

__device__ __forceinline__ float square(u32 x) {
    return low_float(x) * low_float(x) + high_float(x) * high_float(x);
}

__device__ __forceinline__ u32 scaled(u32 x, u32 norm, float factor, float offset) {
    return packed(low_float(x) * factor * (low_float(norm) + offset),
                  high_float(x) * factor * (high_float(norm) + offset));
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const __grid_constant__ Norm n) {
    __shared__ float squares[THREADS / 32];
    let_next_start();
    for (u32 i = 64 * threadIdx.x; i < n.size; i += 64 * THREADS) prefetch(n.norm + i);
    wait_for_prior();
    const u64 row = blockIdx.x;
    uint4 x[VECTORS];
    float sum = 0;
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        const u32 i = (v * THREADS + threadIdx.x) * 8;
        if (i >= n.size) break;
        x[v] = *(const uint4 *)(n.x + row * n.x_stride + i);
        if (n.delta) {
            const uint4 delta = *(const uint4 *)(n.delta + row * n.delta_stride + i);
            x[v] = make_uint4(added(x[v].x, delta.x), added(x[v].y, delta.y), added(x[v].z, delta.z),
                              added(x[v].w, delta.w));
        }
        if (n.sum) *(uint4 *)(n.sum + row * n.sum_stride + i) = x[v];
        sum += square(x[v].x) + square(x[v].y) + square(x[v].z) + square(x[v].w);
    }
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (u32 w = 0; w < THREADS / 32; w++) sum += squares[w];
    const float factor = rsqrtf(sum / n.size + n.epsilon);
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        const u32 i = (v * THREADS + threadIdx.x) * 8;
        if (i >= n.size) break;
        const uint4 norm = *(const uint4 *)(n.norm + i);
        *(uint4 *)(n.output + row * n.output_stride + i) = make_uint4(
            scaled(x[v].x, norm.x, factor, n.norm_offset), scaled(x[v].y, norm.y, factor, n.norm_offset),
            scaled(x[v].z, norm.z, factor, n.norm_offset), scaled(x[v].w, norm.w, factor, n.norm_offset));
    }
}

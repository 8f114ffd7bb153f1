// gemv: y = x W^T for few rows of x, up to 8 TILES_N, on tensor cores; W is (out, inner), row by row.
//
// In one launch: up to three matrices that share x (q, k, v), each with a bias; x may be normed on the way
// (RMSNorm: NORM), a residual may be added, and two matrices may be gate and up of a gated unit (GATED):
// y = act(x gate^T) * (x up^T).
// Bound: bytes of the weights, moved in once; x is small and comes out of the caches.
// Grid: thread blocks of 32 WARPS that take tiles of 16 TILES_M outputs (GATED: 8 TILES_M) in turn.
// inner is a multiple of 8; weights and rows of x are aligned to 16 bytes.
//
// The warps of a block share the inner dimension, in groups of 32 STEPS elements that they take in turn, and
// add up their sums through shared memory. A product may take the inner dimension in any order as long as
// both sides do: so a lane loads 16 bytes of two rows of W, and of one row of x at the same place, and has
// what two products of 16 want. While a group is multiplied, the weights of the next one are on their way,
// over the borders of tiles. The first two groups are loaded before the kernel before is done, AHEAD more are
// brought into the L2 cache, and so are the norm's weights, for which every warp would wait in each of its
// first groups: weights must not be what that kernel writes.
//
// RMSNorm's factor is the same for the whole row, so it is applied to the sums, and x is only multiplied by
// the norm's weights; that keeps the range of x, which is no matter for bf16 (fp16 is not offered).
#include "ptx.cuh"

#ifndef WARPS
#define WARPS 8
#endif
#ifndef STEPS
#define STEPS 4
#endif
#ifndef TILES_M
#define TILES_M 1
#endif
#ifndef TILES_N
#define TILES_N 1
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef NORM
#define NORM 0
#endif
#ifndef AHEAD
#define AHEAD 0  // groups that are brought into the L2 cache before the kernel before is done
#endif
#ifndef BLOCKS
#define BLOCKS 2  // of threads, on a multiprocessor: the bound on registers
#endif

struct Matrix {  // the same in device/step_parameters.py: MATRIX
    const u16 *weight, *bias;  // bias: may be 0
    u16 *output;
    u32 rows, output_stride;  // rows: outputs
};

struct Product {  // the same in device/step_parameters.py: PRODUCT
    const u16 *x, *norm, *residual;  // residual: may be 0, and may be the output
    Matrix matrix[3];                // those not there have 0 rows
    u32 rows, inner, x_stride, residual_stride, tiles, is_gelu;
    float epsilon, norm_offset;
};

const u32 COLUMNS = 8 * TILES_N;
const u32 PITCH = 20;  // floats of 16 outputs, so that lanes hit different banks
const u32 OUTPUTS = GATED ? 8 : 16;

struct Rows {  // of W, that a lane reads
    const u16 *at[2 * TILES_M];
};

struct Group {
    uint4 weights[STEPS][2 * TILES_M];
};

struct Sums {
    float at[TILES_M][TILES_N][4];
    float squares[TILES_N];
};

struct Place {  // of a tile among the matrices
    u32 matrix, row;
};

__device__ __forceinline__ Place find(const Product &product, u32 tile) {
    const u32 height = OUTPUTS * TILES_M;
    u32 matrix = 0;
    if (!GATED) {
        for (; matrix < 2; matrix++) {
            const u32 tiles = (product.matrix[matrix].rows + height - 1) / height;
            if (tile < tiles) break;
            tile -= tiles;
        }
    }
    return {matrix, tile * height};
}

__device__ __forceinline__ Rows rows_of(const Product &product, u32 tile, u32 g) {
    const Place place = find(product, tile);
    Rows rows;
#pragma unroll
    for (u32 i = 0; i < 2 * TILES_M; i++) {
        const Matrix &matrix = product.matrix[GATED ? i % 2 : place.matrix];
        const u32 row = place.row + g + (GATED ? i / 2 : i) * 8;
        rows.at[i] = matrix.weight + (u64)min(row, matrix.rows - 1) * product.inner;
    }
    return rows;
}

__device__ __forceinline__ void load(Group &group, const Rows &rows, u32 start, u32 inner) {
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        const u32 k = min(start + 32 * s, inner - 8);  // no branches: what is beyond meets zeros of x
#pragma unroll
        for (u32 i = 0; i < 2 * TILES_M; i++) group.weights[s][i] = load_once(rows.at[i] + k);
    }
}

// The groups of a tile that follow its first two: 128 bytes a lane.
__device__ __forceinline__ void prefetch_groups(const Rows &rows, u32 first, u32 inner, u32 t) {
    if (t >= STEPS / 2) return;
#pragma unroll 1
    for (u32 group = 2; group < 2 + AHEAD; group++) {
        const u32 k = first + group * 32 * STEPS * WARPS + 64 * t;
        if (k >= inner) return;
#pragma unroll
        for (u32 i = 0; i < 2 * TILES_M; i++) prefetch(rows.at[i] + k);
    }
}

// A few thread blocks do it for all.
__device__ __forceinline__ void prefetch_norm(const Product &product) {
    if (!NORM || blockIdx.x >= 4) return;
    for (u32 k = 64 * threadIdx.x; k < product.inner; k += 64 * 32 * WARPS) prefetch(product.norm + k);
}

__device__ __forceinline__ u32 normed(u32 x, u32 norm, float offset, float &squares) {
    const float low = low_float(x), high = high_float(x);
    squares = fmaf(low, low, fmaf(high, high, squares));
    return packed(low * (low_float(norm) + offset), high * (high_float(norm) + offset));
}

__device__ __forceinline__ void multiply_group(
    Sums &sums, const Group &group, const Product &product, const u16 *const (&x)[TILES_N], u32 start) {
    uint4 columns[STEPS][TILES_N];
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        const bool is_there = start + 32 * s < product.inner;
        const u32 k = min(start + 32 * s, product.inner - 8);
#pragma unroll
        for (u32 n = 0; n < TILES_N; n++) {
            const uint4 c = *(const uint4 *)(x[n] + k);
            columns[s][n] = make_uint4(is_there ? c.x : 0, is_there ? c.y : 0, is_there ? c.z : 0,
                                       is_there ? c.w : 0);
        }
#if NORM
        const uint4 norm = *(const uint4 *)(product.norm + k);
#pragma unroll
        for (u32 n = 0; n < TILES_N; n++) {
            uint4 &c = columns[s][n];
            c.x = normed(c.x, norm.x, product.norm_offset, sums.squares[n]);
            c.y = normed(c.y, norm.y, product.norm_offset, sums.squares[n]);
            c.z = normed(c.z, norm.z, product.norm_offset, sums.squares[n]);
            c.w = normed(c.w, norm.w, product.norm_offset, sums.squares[n]);
        }
#endif
    }
#pragma unroll
    for (u32 s = 0; s < STEPS; s++)
#pragma unroll
        for (u32 m = 0; m < TILES_M; m++)
#pragma unroll
            for (u32 n = 0; n < TILES_N; n++) {
                const uint4 a = group.weights[s][2 * m], b = group.weights[s][2 * m + 1];
                const uint4 c = columns[s][n];
                multiply(sums.at[m][n], a.x, b.x, a.y, b.y, c.x, c.y);
                multiply(sums.at[m][n], a.z, b.z, a.w, b.w, c.z, c.w);
            }
}

struct Shared {  // sums of the warps; two, so that one is written while the other is read
    float at[2][WARPS][TILES_M][COLUMNS][PITCH];
    float squares[2][WARPS][COLUMNS];
};

__device__ __forceinline__ void share(Shared &shared, const Sums &sums, u32 buffer, u32 warp, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 m = 0; m < TILES_M; m++)
#pragma unroll
        for (u32 n = 0; n < TILES_N; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                shared.at[buffer][warp][m][8 * n + 2 * t + i % 2][g + i / 2 * 8] = sums.at[m][n][i];
#if NORM
#pragma unroll
    for (u32 n = 0; n < TILES_N; n++) {
        float squares = sums.squares[n];
        squares += __shfl_xor_sync(ALL_LANES, squares, 1);
        squares += __shfl_xor_sync(ALL_LANES, squares, 2);
        if (t == 0) shared.squares[buffer][warp][8 * n + g] = squares;
    }
#endif
}

__device__ __forceinline__ float activated(float x, u32 is_gelu) {
    // gelu by tanh: x * sigmoid(2 u)
    const float u = is_gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
    return x / (1.f + power_of_two(-1.4426950409f * u));
}

__device__ __forceinline__ float sum_of(
    const Shared &shared, u32 buffer, u32 m, u32 column, u32 row, float factor) {
    float sum = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) sum += shared.at[buffer][w][m][column][row];
    return sum * factor;
}

__device__ __forceinline__ float with_bias(float sum, const Matrix &matrix, u32 row) {
    return matrix.bias ? sum + to_float(matrix.bias[row]) : sum;
}

__device__ __forceinline__ void store(const Shared &shared, const Product &product, u32 tile, u32 buffer) {
    const Place place = find(product, tile);
    const Matrix &matrix = product.matrix[place.matrix];
    for (u32 e = threadIdx.x; e < TILES_M * COLUMNS * OUTPUTS; e += 32 * WARPS) {
        const u32 row = e % OUTPUTS, column = e / OUTPUTS % COLUMNS, m = e / (OUTPUTS * COLUMNS);
        const u32 output = place.row + m * OUTPUTS + row;
        if (column >= product.rows || output >= matrix.rows) continue;
        float factor = 1;
#if NORM
        float squares = 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) squares += shared.squares[buffer][w][column];
        factor = rsqrtf(squares / product.inner + product.epsilon);
#endif
        float y = with_bias(sum_of(shared, buffer, m, column, row, factor), matrix, output);
#if GATED
        const float up = sum_of(shared, buffer, m, column, row + 8, factor);
        y = activated(y, product.is_gelu) * with_bias(up, product.matrix[1], output);
#endif
        if (product.residual) y += to_float(product.residual[column * product.residual_stride + output]);
        matrix.output[(u64)column * matrix.output_stride + output] = to_half(y);
    }
}

__device__ __forceinline__ void clear(Sums &sums) {
#pragma unroll
    for (u32 n = 0; n < TILES_N; n++) {
        sums.squares[n] = 0;
#pragma unroll
        for (u32 m = 0; m < TILES_M; m++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums.at[m][n][i] = 0;
    }
}

// Where a warp is: which of its groups of which tile.
struct Position {
    u32 tile, group;

    __device__ __forceinline__ void advance(u32 groups) {
        if (++group == groups) {
            group = 0;
            tile += gridDim.x;
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) gemv(
    const __grid_constant__ Product product) {
    __shared__ Shared shared;
    let_next_start();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const u32 width = 32 * STEPS, inner = product.inner;
    const u32 groups = (inner + width * WARPS - 1) / (width * WARPS);
    const u32 first = warp * width + lane % 4 * 8;
    const u16 *x[TILES_N];
#pragma unroll
    for (u32 n = 0; n < TILES_N; n++)
        x[n] = product.x + (u64)min(8 * n + g, product.rows - 1) * product.x_stride;

    Position here = {blockIdx.x, 0}, ahead = here;
    Rows rows = rows_of(product, here.tile, g);
    Group even, odd;
    Sums sums;
    clear(sums);
    u32 buffer = 0;
    auto load_ahead = [&](Group &group) {
        ahead.advance(groups);
        if (ahead.tile >= product.tiles) return;
        if (ahead.group == 0) rows = rows_of(product, ahead.tile, g);
        load(group, rows, first + ahead.group * width * WARPS, inner);
    };
    load(even, rows, first, inner);
    prefetch_norm(product);
    load_ahead(odd);
    if (AHEAD) prefetch_groups(rows_of(product, here.tile, g), warp * width, inner, lane % 4);
    wait_for_prior();

    auto work = [&](Group &group) {
        multiply_group(sums, group, product, x, first + here.group * width * WARPS);
        load_ahead(group);
        if (here.group == groups - 1) {
            share(shared, sums, buffer, warp, lane);
            __syncthreads();  // the next tile goes to the other buffer: one barrier a tile is enough
            store(shared, product, here.tile, buffer);
            buffer ^= 1;
            clear(sums);
        }
        here.advance(groups);
    };
    while (true) {
        work(even);
        if (here.tile >= product.tiles) break;
        work(odd);
        if (here.tile >= product.tiles) break;
    }
}

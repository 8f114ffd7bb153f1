// Runs kernels on the CPU: a fiber a thread, one thread block after another, warps in step where they meet.
//
// Included before a kernel's source, with this folder's ptx.cuh in place of the kernels' own. What it cannot
// show: races between thread blocks, the order of memory, registers, speed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static const
#define __grid_constant__
#define __launch_bounds__(...)

typedef unsigned int emulated_u32;
struct uint2 { emulated_u32 x, y; };
struct uint4 { emulated_u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { emulated_u32 x, y, z; };
static uint2 make_uint2(emulated_u32 x, emulated_u32 y) { return {x, y}; }
static uint4 make_uint4(emulated_u32 x, emulated_u32 y, emulated_u32 z, emulated_u32 w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

static dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulated {

struct Barrier {
    int here = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool is_done = false;
};

static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static Barrier block;
static std::vector<uint32_t> exchanged;
static ucontext_t main_context;
static size_t current;
static int alive;
static void (*body)();

static void yield() {
    const dim3 mine = threadIdx;
    const size_t self = current;
    swapcontext(&fibers[self].context, &main_context);
    current = self;
    threadIdx = mine;
}

static void meet(Barrier &barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.here >= count) {
        barrier.here = 0;
        barrier.generation++;
        return;
    }
    while (barrier.generation == generation) yield();
}

static void enter() {
    body();
    fibers[current].is_done = true;
    alive--;
    if (block.here && block.here >= alive) {  // those that are gone are not waited for
        block.here = 0;
        block.generation++;
    }
}

static void run_block(uint32_t threads) {
    block = Barrier();
    warps.assign(threads / 32, Barrier());
    exchanged.assign(threads * 8, 0);
    fibers.resize(threads);
    alive = threads;
    for (uint32_t i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        fiber.stack.resize(1 << 16);
        fiber.is_done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &main_context;
        makecontext(&fiber.context, enter, 0);
    }
    for (int rounds = 0; alive; rounds++) {
        if (rounds > 1000000) abort();  // nobody will come
        for (uint32_t i = 0; i < threads; i++) {
            if (fibers[i].is_done) continue;
            current = i;
            threadIdx = {i, 0, 0};
            swapcontext(&main_context, &fibers[i].context);
        }
    }
}

static void run(void (*kernel)(), const uint32_t *grid, uint32_t threads) {
    body = kernel;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    for (uint32_t z = 0; z < grid[2]; z++)
        for (uint32_t y = 0; y < grid[1]; y++)
            for (uint32_t x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                run_block(threads);
            }
}

}  // namespace emulated

static emulated_u32 lane_id() { return threadIdx.x % 32; }

// What every lane of a warp has, to every lane.
template <int COUNT>
static void exchange(const emulated_u32 (&mine)[COUNT], emulated_u32 (&all)[32][COUNT]) {
    emulated::Barrier &warp = emulated::warps[threadIdx.x / 32];
    emulated_u32 *table = emulated::exchanged.data() + threadIdx.x / 32 * 256;
    for (int i = 0; i < COUNT; i++) table[lane_id() * 8 + i] = mine[i];
    emulated::meet(warp, 32);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < COUNT; i++) all[lane][i] = table[lane * 8 + i];
    emulated::meet(warp, 32);
}

template <class T>
static T __shfl_sync(emulated_u32, T value, emulated_u32 lane) {
    static_assert(sizeof(T) == 4, "");
    emulated_u32 mine[1], all[32][1];
    memcpy(mine, &value, 4);
    exchange(mine, all);
    memcpy(&value, all[lane % 32], 4);
    return value;
}

template <class T>
static T __shfl_xor_sync(emulated_u32 mask, T value, emulated_u32 step) {
    return __shfl_sync(mask, value, lane_id() ^ step);
}

static void __syncthreads() { emulated::meet(emulated::block, emulated::alive); }
static void __syncwarp() { emulated::meet(emulated::warps[threadIdx.x / 32], 32); }
static void __threadfence() {}
template <class T>
static T __ldcg(const T *from) { return *from; }
static emulated_u32 atomicInc(emulated_u32 *at, emulated_u32 limit) {
    const emulated_u32 old = *at;
    *at = old >= limit ? 0 : old + 1;
    return old;
}
static float __uint_as_float(emulated_u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static float __int_as_float(int bits) { float f; memcpy(&f, &bits, 4); return f; }
static float rsqrtf(float x) { return 1 / sqrtf(x); }
static emulated_u32 __byte_perm(emulated_u32 x, emulated_u32 y, emulated_u32 selector) {
    const uint64_t both = x | (uint64_t)y << 32;
    emulated_u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (emulated_u32)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
}

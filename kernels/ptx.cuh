// The instructions that C++ has no word for: products on tensor cores, conversions, streaming loads,
// waiting for the kernel before. All are there from sm_80 on; what only later ones have is left out there.
#pragma once

#include "integers.cuh"

#ifndef F16
#define F16 0  // 0: floats of 16 bits are bf16, 1: fp16
#endif

// Let the next kernel of the stream start while this one runs: it waits itself for what it reads.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Wait until all kernels before are done. Every thread calls it before it touches what others touch, and
// no kernel leaves it out: so whoever has waited may rely on all kernels before, not just the last.
__device__ __forceinline__ void wait_for_prior() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16 bytes of weights, which nobody reads twice and no kernel beside this one writes. Not .nc: the
// assembler moves such loads behind wait_for_prior.
__device__ __forceinline__ uint4 load_once(const u16 *from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

// Bring the 128 bytes around an address into the L2 cache.
__device__ __forceinline__ void prefetch(const u16 *from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

__device__ __forceinline__ float low_float(u32 pair) {
#if F16
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
    return value;
#else
    return __uint_as_float(pair << 16);
#endif
}

__device__ __forceinline__ float high_float(u32 pair) {
#if F16
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
    return value;
#else
    return __uint_as_float(pair & 0xffff0000u);
#endif
}

// Two floats, rounded to the nearest.
__device__ __forceinline__ u32 packed(float low, float high) {
    u32 pair;
#if F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ float to_float(u16 bits) { return low_float(bits); }

__device__ __forceinline__ u16 to_half(float value) { return (u16)packed(value, 0.f); }

__device__ __forceinline__ float power_of_two(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// sums (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4, t = lane % 4: a0 and a1 hold columns 2 t, 2 t + 1
// of rows g and g + 8, a2 and a3 columns 8 further; b0 and b1 rows 2 t, 2 t + 1 and 8 further of column g;
// sums 0, 1 are columns 2 t, 2 t + 1 of row g, sums 2, 3 of row g + 8.
__device__ __forceinline__ void multiply(
    float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if F16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16 bits, of which a lane holds columns 2 t, 2 t + 1 of row g, turned.
__device__ __forceinline__ u32 transposed(u32 pair) {
    u32 turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
}

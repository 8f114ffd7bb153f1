// Stands in for kernels/ptx.cuh when kernels are compiled for the CPU: see emulator.h.
#pragma once

#include "integers.cuh"

#ifndef F16
#define F16 0
#endif

static void let_next_start() {}
static void wait_for_prior() {}
static uint4 load_once(const u16 *from) { return *(const uint4 *)from; }
static void prefetch(const u16 *from) { (void)*(const volatile u16 *)from; }
static float to_float(u16 bits) {
#if F16
    _Float16 value;
    __builtin_memcpy(&value, &bits, 2);
    return (float)value;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}
static u16 to_half(float value) {
    u16 bits;
#if F16
    const _Float16 half = (_Float16)value;
    __builtin_memcpy(&bits, &half, 2);
#else
    u32 word;
    __builtin_memcpy(&word, &value, 4);
    bits = value != value ? 0x7fff : (u16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
#endif
    return bits;
}
static float low_float(u32 pair) { return to_float((u16)pair); }
static float high_float(u32 pair) { return to_float((u16)(pair >> 16)); }
static u32 packed(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
static float power_of_two(float x) { return exp2f(x); }

static void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    u32 all[32][6];
    exchange(mine, all);
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    for (u32 i = 0; i < 4; i++) {
        const u32 column = 2 * t + i % 2, lower = i / 2;  // row g + 8 * lower
        for (u32 k = 0; k < 16; k++) {
            const u32 pair = k % 8 / 2, far = k / 8;
            const u32 a = all[4 * g + pair][2 * far + lower], b = all[4 * column + pair][4 + far];
            sums[i] += k % 2 ? high_float(a) * high_float(b) : low_float(a) * low_float(b);
        }
    }
}

static u32 transposed(u32 pair) {
    const u32 mine[1] = {pair};
    u32 all[32][1];
    exchange(mine, all);
    const u32 g = lane_id() / 4, t = lane_id() % 4;  // (row 2 t, column g), (row 2 t + 1, column g)
    const u32 low = all[8 * t + g / 2][0], high = all[8 * t + 4 + g / 2][0];
    return (low >> g % 2 * 16 & 0xffff) | (high >> g % 2 * 16 & 0xffff) << 16;
}

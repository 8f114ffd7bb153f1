// decode_rans: the candidate Rans of codec_candidates.py on a GPU, for the comparison.
//
// A warp decodes a block of 16,384 bf16 elements, a lane every 32nd of them. jobs: (gridDim.y,) Job.
// Grid: (blocks of a chunk / 8, chunks), 256 threads; shared: the table of 4,096 slots.
#include "integers.cuh"

struct Job {
    const u16 *frequencies;  // (256,)
    const u8 *rest;          // (elements,)
    const u32 *states;       // (blocks, 32)
    const u32 *places;       // (blocks,) of each block's first word
    const u16 *words;
    u8 *output;
    u64 blocks, words_count;
};

extern "C" __global__ void __launch_bounds__(256) decode_rans(const Job *jobs) {
    __shared__ u32 slots[4096];  // symbol, frequency - 1 (12 bits), slot - start (12 bits)
    __shared__ u32 starts[257];
    const Job job = jobs[blockIdx.y];
    if (threadIdx.x == 0) {
        starts[0] = 0;
        for (u32 i = 0; i < 256; i++) starts[i + 1] = starts[i] + job.frequencies[i];
    }
    __syncthreads();
    const u32 frequency = job.frequencies[threadIdx.x];
    for (u32 i = 0; i < frequency; i++)
        slots[starts[threadIdx.x] + i] = threadIdx.x << 24 | (frequency - 1) << 12 | i;
    __syncthreads();
    const u32 lane = threadIdx.x % 32, below = (1u << lane) - 1;
    const u64 block = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (block >= job.blocks) return;
    u32 state = job.states[block * 32 + lane];
    u64 place = job.places[block];
    const u64 first = block * 16384;
    for (u32 step = 0; step < 512; step += 4) {
        u32 tops[4], rests[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) rests[i] = job.rest[first + (step + i) * 32 + lane];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 slot = slots[state & 4095];
            tops[i] = slot >> 24;
            state = ((slot >> 12 & 4095) + 1) * (state >> 12) + (slot & 4095);
            const bool is_low = state < 1u << 16;
            const u32 low = __ballot_sync(ALL_LANES, is_low);
            if (is_low) {
                const u64 from = place + __popc(low & below);
                state = state << 16 | (from < job.words_count ? job.words[from] : 0);
            }
            place += __popc(low);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            // The sign that went round is the neighbour's: even and odd lanes exchange it.
            const u32 bits = tops[i] << 8 | rests[i];
            const u32 other = __shfl_xor_sync(ALL_LANES, bits, 1);
            ((u16 *)job.output)[first + (step + i) * 32 + lane] = (u16)(bits >> 1 | (other & 1) << 15);
        }
    }
}

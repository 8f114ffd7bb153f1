// checksum_chunks: xxh3_64 (seed 0) of many pieces of device memory in one launch.
//
// pieces: gridDim.x Piece, digests: (gridDim.x,) u64; host memory will do. Grid: a thread block of 288 for each piece.
// Sizes and addresses are multiples of 64, sizes not 0 nor below 256; any other piece has digest 0.
// Moves the bytes in, once.
//
// XXH3 adds up stripes of 64 bytes within blocks of 1 KiB, in any order, and scrambles its eight sums
// after each block. So eight warps add up blocks, 32 blocks a tile, and the ninth goes from block to
// block, one tile behind: 32 short steps, in the time in which the next tile comes. That chain of steps is
// what bounds one piece; the pieces of a launch go side by side.
#include "integers.cuh"

struct Piece {  // the same in device/kernels.py: PIECE
    const u8 *bytes;
    u64 size;
};

struct Pieces {  // a parameter, of which gridDim.x are there
    Piece at[CHUNKS_MAX];
};

const u32 PRODUCERS = 8;  // warps
const u32 TILE = 32;      // blocks
const u32 WORDS = 128;    // of 8 bytes, in a block
const u32 STRIPES = 16;   // in a block
const u64 PRIME32_1 = 0x9e3779b1ull, PRIME32_2 = 0x85ebca77ull, PRIME32_3 = 0xc2b2ae3dull;
const u64 PRIME64_1 = 0x9e3779b185ebca87ull, PRIME64_2 = 0xc2b2ae3d27d4eb4full;
const u64 PRIME64_3 = 0x165667b19e3779f9ull, PRIME64_4 = 0x85ebca77c2b2ae63ull;
const u64 PRIME64_5 = 0x27d4eb2f165667c5ull, PRIME_END = 0x165667919e3779f9ull;

__constant__ u64 START[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                             PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
__constant__ u64 SECRET[25] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull, 0};

// Eight bytes of the secret from any byte on.
__device__ __forceinline__ u64 secret_at(u32 byte) {
    const u32 word = byte / 8, bits = byte % 8 * 8;
    return bits ? SECRET[word] >> bits | SECRET[word + 1] << (64 - bits) : SECRET[word];
}

__device__ __forceinline__ u64 product(u64 keyed) { return (keyed & 0xffffffffull) * (keyed >> 32); }

__device__ __forceinline__ u64 scrambled(u64 sum, u64 key) { return (sum ^ sum >> 47 ^ key) * PRIME32_1; }

__device__ __forceinline__ u64 folded(u64 a, u64 b) { return a * b ^ __umul64hi(a, b); }

struct Words {  // what a lane holds of a block: words 2 l, 2 l + 1 of each half
    ulonglong2 near, far;
};

__device__ __forceinline__ Words load(const u64 *block, u32 lane) {
    return {((const ulonglong2 *)block)[lane], ((const ulonglong2 *)(block + WORDS / 2))[lane]};
}

// The eight sums of a block; lanes that are equal modulo 4 have the same two.
__device__ __forceinline__ void add_up(const Words &words, const u64 (&key)[4], u32 lane, u64 *sums) {
    const ulonglong2 near = words.near, far = words.far;
    u64 even = near.y + far.y + product(near.x ^ key[0]) + product(far.x ^ key[2]);
    u64 odd = near.x + far.x + product(near.y ^ key[1]) + product(far.y ^ key[3]);
#pragma unroll
    for (u32 step = 4; step < 32; step *= 2) {
        even += __shfl_xor_sync(ALL_LANES, even, step);
        odd += __shfl_xor_sync(ALL_LANES, odd, step);
    }
    if (lane < 4) {
        sums[2 * lane] = even;
        sums[2 * lane + 1] = odd;
    }
}

// What follows the last whole block, and the digest; lane i has sum i, of eight lanes.
__device__ __forceinline__ u64 finished(u64 sum, const u64 *words, u64 size, u64 blocks, u32 i) {
    const u32 EIGHT = 0xff;
    const u64 *tail = words + blocks * WORDS;
    const u32 stripes = (u32)((size - 1 - blocks * 8 * WORDS) / 64);
    for (u32 s = 0; s < stripes; s++)
        sum += tail[8 * s + (i ^ 1)] + product(tail[8 * s + i] ^ SECRET[s + i]);
    const u64 *last = words + size / 8 - 8;
    sum += last[i ^ 1] + product(last[i] ^ secret_at(121 + 8 * i));
    const u64 keyed = sum ^ secret_at(11 + 8 * i);
    u64 digest = folded(keyed, __shfl_xor_sync(EIGHT, keyed, 1));
    digest += __shfl_xor_sync(EIGHT, digest, 2);
    digest += __shfl_xor_sync(EIGHT, digest, 4);
    digest += size * PRIME64_1;
    digest = (digest ^ digest >> 37) * PRIME_END;
    return digest ^ digest >> 32;
}

extern "C" __global__ void __launch_bounds__(288) checksum_chunks(
    const __grid_constant__ Pieces pieces, u64 *digests) {
    __shared__ u64 sums[2][TILE][8];
    const Piece piece = pieces.at[blockIdx.x];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (((u64)piece.bytes | piece.size) & 63 || piece.size < 256) {
        if (threadIdx.x == 0) digests[blockIdx.x] = 0;
        return;
    }
    const u64 *words = (const u64 *)piece.bytes;
    const u32 blocks = (u32)((piece.size - 1) / (8 * WORDS));  // up to 4 TiB
    const u32 tiles = (blocks + TILE - 1) / TILE;
    const u32 place = lane / 4 + 2 * (lane % 4);
    const u64 key[4] = {SECRET[place], SECRET[place + 1], SECRET[place + 8], SECRET[place + 9]};
    const u64 scramble = SECRET[STRIPES + lane % 8];
    u64 sum = START[lane % 8];
    Words next[TILE / PRODUCERS];  // loaded one tile ahead
#pragma unroll 1
    for (u32 tile = 0; tile <= tiles + 1; tile++) {
        if (warp < PRODUCERS) {
#pragma unroll
            for (u32 i = 0; i < TILE / PRODUCERS; i++) {
                const u32 row = warp + i * PRODUCERS;
                if (tile && (tile - 1) * TILE + row < blocks) add_up(next[i], key, lane, sums[tile & 1][row]);
                if (tile * TILE + row < blocks) next[i] = load(words + (u64)(tile * TILE + row) * WORDS, lane);
            }
        } else if (tile > 1 && lane < 8) {
            const u32 left = blocks - (tile - 2) * TILE;
            const u64(*from)[8] = sums[(tile - 1) & 1];
            if (left >= TILE) {
#pragma unroll 8
                for (u32 i = 0; i < TILE; i++) sum = scrambled(sum + from[i][lane], scramble);
            } else {
                for (u32 i = 0; i < left; i++) sum = scrambled(sum + from[i][lane], scramble);
            }
        }
        __syncthreads();
    }
    if (warp == PRODUCERS && lane < 8) {
        const u64 digest = finished(sum, words, piece.size, blocks, lane);
        if (lane == 0) digests[blockIdx.x] = digest;
    }
}

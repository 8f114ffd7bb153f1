// The exponent codec's decoder, for every float format: see sllm_node/codec/exponent.py, the reference.
//
// Bound: bytes moved, encoded once in and decoded once out (1.67 bytes for each byte of bf16 output).
// A warp decodes a block of 4,096 elements in tiles of 512: a lane has elements 8 l .. 8 l + 7 of each
// half of the tile, so that what the warp stores at once is 512 bytes without gaps for two-byte floats.
// The lanes' places among the second codes come from one prefix sum for both halves of a tile. Nothing is
// looked up in memory: bytes and nibbles are selected by __byte_perm, four at a time.
//
// Nothing outside the encoded chunk is read and nothing outside the output is written, whatever the
// encoded bytes are: offsets follow from the header's counts, which are compared with the chunk's size;
// ranks are compared with the counts. What does not fit sets the chunk's error flag.
#pragma once

#include "integers.cuh"

const u32 MAGIC = 0x31584c53u;  // "SLX1"
const u32 HEADER_BYTES = 64;
const u32 DECODED_MAX = 1u << 28;  // so that all counts of bits fit 32 bits
const u32 BLOCK = 4096;
const u32 TILE = 512;
const u32 HALF = 256;
const u32 LANE_ELEMENTS = 8;
const u32 WARPS = 8;  // of a thread block; each decodes a block of its own

enum DecodeError { HEADER_IS_WRONG = 1, CODES_ARE_WRONG = 2 };

struct EncodedChunk {  // the same in device/kernels.py: CHUNK
    const u8 *encoded;
    u64 encoded_size;
    u8 *output;
    u64 output_size;
};

struct EncodedChunks {  // a parameter of the kernels, of which gridDim.y are there
    EncodedChunk at[CHUNKS_MAX];
};

// 8 bytes of a lane, or fewer for narrower planes.
struct Pair {
    u32 low, high;
};

__device__ __forceinline__ u32 aligned(u32 size) { return (size + 15) & ~15u; }

__device__ __forceinline__ u32 plane_bytes(u32 count, u32 bits) {
    return aligned((count + 15) / 16 * 2 * bits);
}

// Eight 2-bit numbers in 16 bits to eight nibbles.
__device__ __forceinline__ u32 nibbles_of_pairs(u32 x) {
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    return (x | x << 2) & 0x33333333u;
}

// Eight bits to eight nibbles.
__device__ __forceinline__ u32 nibbles_of_bits(u32 x) {
    x = (x | x << 12) & 0x000f000fu;
    x = (x | x << 6) & 0x03030303u;
    return (x | x << 3) & 0x11111111u;
}

// Four nibbles in the low 16 bits to four bytes.
__device__ __forceinline__ u32 bytes_of_nibbles(u32 x) {
    x &= 0xffffu;
    x = (x | x << 8) & 0x00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0fu;
}

__device__ __forceinline__ u32 rotated_right(u32 x) { return __funnelshift_r(x, x, 1); }

// One lane's eight elements, from their top bytes and from the planes of the rest.
// `rest` is the first plane, `count` elements are in the chunk, `first` is the lane's first element.

struct Bf16 {
    static const u32 NUMBER = 1, WIDTH = 2, SHIFT = 0;
    static __device__ u32 rest_bytes(u32 n) { return plane_bytes(n, 8); }
    struct Rest {
        uint2 low;
    };
    static __device__ __forceinline__ Rest load(const u8 *rest, u32 count, u32 first) {
        return {__ldg((const uint2 *)(rest + first))};
    }
    static __device__ __forceinline__ void join(const Rest &rest, Pair top, u32 *out) {
        out[0] = __byte_perm(rest.low.x, top.low, 0x5140);
        out[1] = __byte_perm(rest.low.x, top.low, 0x7362);
        out[2] = __byte_perm(rest.low.y, top.high, 0x5140);
        out[3] = __byte_perm(rest.low.y, top.high, 0x7362);
    }
};

struct ThreeBits {  // a plane of 2 bits, then one of 1 bit
    u32 two, one;
    static __device__ __forceinline__ ThreeBits load(const u8 *rest, u32 count, u32 first) {
        const u8 *ones = rest + plane_bytes(count, 2);
        return {__ldg((const u16 *)(rest + first / 4)), __ldg(ones + first / 8)};
    }
    __device__ __forceinline__ Pair bytes() const {
        u32 nibbles = nibbles_of_pairs(two) | nibbles_of_bits(one) << 2;
        return {bytes_of_nibbles(nibbles), bytes_of_nibbles(nibbles >> 16)};
    }
};

struct F16 {
    static const u32 NUMBER = 2, WIDTH = 2, SHIFT = 3;
    static __device__ u32 rest_bytes(u32 n) {
        return plane_bytes(n, 8) + plane_bytes(n, 2) + plane_bytes(n, 1);
    }
    struct Rest {
        Bf16::Rest low;
        ThreeBits high;
    };
    static __device__ __forceinline__ Rest load(const u8 *rest, u32 count, u32 first) {
        return {Bf16::load(rest, count, first), ThreeBits::load(rest + plane_bytes(count, 8), count, first)};
    }
    static __device__ __forceinline__ void join(const Rest &rest, Pair top, u32 *out) {
        Pair high = rest.high.bytes();
        Bf16::join(rest.low, {top.low | high.low, top.high | high.high}, out);
    }
};

struct F32 {
    static const u32 NUMBER = 3, WIDTH = 4, SHIFT = 0;
    static __device__ u32 rest_bytes(u32 n) { return plane_bytes(n, 16) + plane_bytes(n, 8); }
    struct Rest {
        uint4 low;
        uint2 middle;
    };
    static __device__ __forceinline__ Rest load(const u8 *rest, u32 count, u32 first) {
        const u8 *middle = rest + plane_bytes(count, 16);
        return {__ldg((const uint4 *)(rest + 2 * first)), __ldg((const uint2 *)(middle + first))};
    }
    static __device__ __forceinline__ void join_four(u32 low, u32 next, u32 middle, u32 top, u32 *out) {
        u32 high = __byte_perm(middle, top, 0x5140), higher = __byte_perm(middle, top, 0x7362);
        out[0] = __byte_perm(low, high, 0x5410);
        out[1] = __byte_perm(low, high, 0x7632);
        out[2] = __byte_perm(next, higher, 0x5410);
        out[3] = __byte_perm(next, higher, 0x7632);
    }
    static __device__ __forceinline__ void join(const Rest &rest, Pair top, u32 *out) {
        join_four(rest.low.x, rest.low.y, rest.middle.x, top.low, out);
        join_four(rest.low.z, rest.low.w, rest.middle.y, top.high, out + 4);
    }
};

struct F8e4m3 {
    static const u32 NUMBER = 4, WIDTH = 1, SHIFT = 4;
    static __device__ u32 rest_bytes(u32 n) { return plane_bytes(n, 4); }
    struct Rest {
        u32 nibbles;
    };
    static __device__ __forceinline__ Rest load(const u8 *rest, u32 count, u32 first) {
        return {__ldg((const u32 *)(rest + first / 2))};
    }
    static __device__ __forceinline__ void join(const Rest &rest, Pair top, u32 *out) {
        out[0] = top.low | bytes_of_nibbles(rest.nibbles);
        out[1] = top.high | bytes_of_nibbles(rest.nibbles >> 16);
    }
};

struct F8e5m2 {
    static const u32 NUMBER = 5, WIDTH = 1, SHIFT = 3;
    static __device__ u32 rest_bytes(u32 n) { return plane_bytes(n, 2) + plane_bytes(n, 1); }
    struct Rest {
        ThreeBits high;
    };
    static __device__ __forceinline__ Rest load(const u8 *rest, u32 count, u32 first) {
        return {ThreeBits::load(rest, count, first)};
    }
    static __device__ __forceinline__ void join(const Rest &rest, Pair top, u32 *out) {
        Pair high = rest.high.bytes();
        out[0] = top.low | high.low;
        out[1] = top.high | high.high;
    }
};

// Where the parts of a chunk lie, and the exponents as bytes at the place of an element's top byte.
struct Parts {
    const u8 *rest, *first, *third;
    const uint2 *directory;
    const u32 *second;
    u8 *output;
    u32 count, seconds, thirds, last_word;
    u32 first_top, second_top[2];  // by first code, 0 for 3; by second code, 0 for 0
};

template <typename Format>
__device__ __forceinline__ bool find_parts(const EncodedChunk &chunk, Parts &parts) {
    if (chunk.encoded_size < HEADER_BYTES || ((u64)chunk.encoded | (u64)chunk.output) & 15)
        return false;
    const uint4 *header = (const uint4 *)chunk.encoded;
    const uint4 start = __ldg(header), names = __ldg(header + 1);
    const u32 last_names = __ldg((const u32 *)(header + 2));
    const u64 decoded = (u64)start.z | (u64)start.w << 32;
    if (start.x != MAGIC || (start.y & 0xff) != Format::NUMBER || decoded != chunk.output_size ||
        decoded > DECODED_MAX || decoded % 4)
        return false;
    parts.count = (u32)decoded / Format::WIDTH;
    parts.seconds = names.x;
    parts.thirds = names.y;
    if (parts.seconds > parts.count || parts.thirds > parts.seconds) return false;
    const u32 blocks = (parts.count + BLOCK - 1) / BLOCK;
    const u32 first = HEADER_BYTES + Format::rest_bytes(parts.count);
    const u32 directory = first + plane_bytes(parts.count, 2);
    const u32 second = directory + aligned(blocks * 8);
    const u32 second_bytes = aligned((3 * parts.seconds + 31) / 32 * 4 + 8);
    if (second + second_bytes + aligned(parts.thirds) > chunk.encoded_size) return false;
    parts.output = chunk.output;
    parts.rest = chunk.encoded + HEADER_BYTES;
    parts.first = chunk.encoded + first;
    parts.directory = (const uint2 *)(chunk.encoded + directory);
    parts.second = (const u32 *)(chunk.encoded + second);
    parts.third = chunk.encoded + second + second_bytes;
    parts.last_word = second_bytes / 4 - 2;
    // names.z: exponents 0 to 3, names.w: 4 to 7, then 8 and 9.
    const u32 mask = 0x01010101u * ((0xffu << Format::SHIFT) & 0xffu);
    parts.first_top = (names.z & 0xffffffu) << Format::SHIFT & mask;
    parts.second_top[0] = (__byte_perm(names.z, names.w, 0x5430) & 0xffffff00u) << Format::SHIFT & mask;
    parts.second_top[1] = __byte_perm(names.w, last_names, 0x5432) << Format::SHIFT & mask;
    return true;
}

// The sum of `value` over the lanes below this one, and over all.
__device__ __forceinline__ u32 sum_below(u32 value, u32 lane, u32 &all) {
    u32 sum = value;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += other;
    }
    all = __shfl_sync(ALL_LANES, sum, 31);
    return sum - value;
}

// The next eight second codes of a lane, whose first one is number `rank`, as nibbles.
__device__ __forceinline__ u32 second_nibbles(const Parts &parts, u32 rank) {
    const u32 bit = 3 * rank;
    const u32 word = min(bit >> 5, parts.last_word);
    u32 x = __funnelshift_r(__ldg(parts.second + word), __ldg(parts.second + word + 1), bit & 31);
    x = (x & 0x00000fffu) | (x << 4 & 0x0fff0000u);
    x = (x & 0x003f003fu) | (x << 2 & 0x3f003f00u);
    return (x & 0x07070707u) | (x << 1 & 0x70707070u);
}

// Put third exponents where the first `count` of a lane's second codes are 0; return how many there are
// in the whole warp.
template <typename Format>
__device__ __forceinline__ u32 put_thirds(
    const Parts &parts, u32 thirds, u32 second, u32 count, u32 lane, Pair &exponents) {
    const u32 counted = count < 8 ? (1u << 4 * count) - 1 : ~0u;
    u32 missing = ~(second | second >> 1 | second >> 2) & 0x11111111u & counted;
    u32 rank = thirds, all = 0, more;  // most lanes have none: a prefix sum by votes, to the largest count
    for (u32 left = missing; (more = __ballot_sync(ALL_LANES, left != 0)); left &= left - 1) {
        rank += __popc(more & ((1u << lane) - 1));
        all += __popc(more);
    }
    for (; missing; missing &= missing - 1, rank++) {
        if (rank >= parts.thirds) break;
        const u32 place = (__ffs(missing) - 1) * 2;  // of its byte, in bits
        const u32 byte = ((u32)__ldg(parts.third + rank) << Format::SHIFT & 0xff) << (place & 31);
        if (place < 32) exponents.low |= byte;
        else exponents.high |= byte;
    }
    return all;
}

template <typename Format, bool WHOLE>
__device__ __forceinline__ void store(const Parts &parts, u32 first, const u32 *words) {
    const u32 WORDS = LANE_ELEMENTS * Format::WIDTH / 4;
    u32 *out = (u32 *)(parts.output + first * Format::WIDTH);
    u32 turned[WORDS];
#pragma unroll
    for (u32 i = 0; i < WORDS; i++) turned[i] = rotated_right(words[i]);
    if (!WHOLE && first + LANE_ELEMENTS > parts.count) {  // the chunk ends here, with a whole word
        const u32 left = (parts.count - first) * Format::WIDTH / 4;
#pragma unroll
        for (u32 i = 0; i < WORDS; i++)
            if (i < left) out[i] = turned[i];
        return;
    }
    if (WORDS == 2) __stcs((uint2 *)out, make_uint2(turned[0], turned[1]));
#pragma unroll
    for (u32 i = 0; i + 4 <= WORDS; i += 4)
        __stcs((uint4 *)out + i / 4,
               make_uint4(turned[i], turned[i + 1], turned[i + 2], turned[i + 3]));
}

// Decode the tile that begins with element `start`; `seconds` and `thirds` count the codes before it.
// WHOLE: all of it is in the chunk.
template <typename Format, bool WHOLE>
__device__ __forceinline__ void decode_tile(
    const Parts &parts, u32 start, u32 lane, u32 &seconds, u32 &thirds) {
    typename Format::Rest rest[2];
    u32 first[2], escaped[2];
    const u32 place = start + lane * LANE_ELEMENTS;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const bool is_there = WHOLE || place + half * HALF < parts.count;
        const u32 from = is_there ? place + half * HALF : 0;
        rest[half] = Format::load(parts.rest, parts.count, from);
        u32 codes = is_there ? __ldg((const u16 *)(parts.first + from / 4)) : 0;
        if (!WHOLE && is_there && from + LANE_ELEMENTS > parts.count)  // padding is not looked at
            codes &= (1u << 2 * (parts.count - from)) - 1;
        first[half] = nibbles_of_pairs(codes);
        escaped[half] = first[half] & first[half] >> 1 & 0x11111111u;
    }
    const u32 counts[2] = {(u32)__popc(escaped[0]), (u32)__popc(escaped[1])};
    u32 all;
    const u32 below = sum_below(counts[0] | counts[1] << 16, lane, all);
    const u32 ranks[2] = {seconds + (below & 0xffff), seconds + (all & 0xffff) + (below >> 16)};
    seconds += (all & 0xffff) + (all >> 16);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 second = second_nibbles(parts, ranks[half]);
        // The exponents that second codes name, by rank; then each goes to its element.
        Pair named = {__byte_perm(parts.second_top[0], parts.second_top[1], second),
                      __byte_perm(parts.second_top[0], parts.second_top[1], second >> 16)};
        thirds += put_thirds<Format>(parts, thirds, second, counts[half], lane, named);
        const u32 rank = escaped[half] * 0x11111110u;  // nibble i: escaped elements before i
        const u32 codes = first[half];
        const Pair top = {
            __byte_perm(parts.first_top, 0, codes) |
                (__byte_perm(named.low, named.high, rank) & __byte_perm(0xff000000u, 0, codes)),
            __byte_perm(parts.first_top, 0, codes >> 16) |
                (__byte_perm(named.low, named.high, rank >> 16) &
                 __byte_perm(0xff000000u, 0, codes >> 16))};
        if (WHOLE || place + half * HALF < parts.count) {
            u32 words[LANE_ELEMENTS * Format::WIDTH / 4];
            Format::join(rest[half], top, words);
            store<Format, WHOLE>(parts, place + half * HALF, words);
        }
    }
}

// The thread block (x, y) decodes blocks 8 x to 8 x + 7 of chunk y.
template <typename Format>
__device__ __forceinline__ void decode_exponent(const EncodedChunks &chunks, u32 *errors) {
    const EncodedChunk &chunk = chunks.at[blockIdx.y];
    const u32 lane = threadIdx.x % 32;
    const u32 block = blockIdx.x * WARPS + threadIdx.x / 32;
    if (block && (u64)block * BLOCK >= chunk.output_size / Format::WIDTH) return;
    Parts parts;
    if (!find_parts<Format>(chunk, parts)) {
        if (lane == 0) errors[blockIdx.y] = HEADER_IS_WRONG;
        return;
    }
    if (block * BLOCK >= parts.count) return;
    const uint2 before = __ldg(parts.directory + block);
    u32 seconds = before.x, thirds = before.y;
    if (seconds > parts.seconds || thirds > parts.thirds || (!block && (seconds | thirds))) {
        if (lane == 0) errors[blockIdx.y] = CODES_ARE_WRONG;
        return;
    }
    u32 start = block * BLOCK;
    const u32 end = min(start + BLOCK, parts.count);
    for (; start + TILE <= end; start += TILE)
        decode_tile<Format, true>(parts, start, lane, seconds, thirds);
    if (start < end) decode_tile<Format, false>(parts, start, lane, seconds, thirds);
    // What the next block begins with, or the end of the chunk, is what this one ended with.
    uint2 next = make_uint2(parts.seconds, parts.thirds);
    if (end < parts.count) next = __ldg(parts.directory + block + 1);
    if (lane == 0 && (next.x != seconds || next.y != thirds)) errors[blockIdx.y] = CODES_ARE_WRONG;
}

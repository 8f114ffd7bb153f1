// decode_exp_bf16: decodes many chunks of codec exp-bf16 in one launch.
//
// chunks: gridDim.y EncodedChunk, errors: (gridDim.y,) u32, zero before the launch; host memory will do.
// Grid: (most blocks of 4,096 elements of a chunk / 8, chunks), 256 threads, no shared memory.
// Moves the encoded bytes in and the decoded bytes out, once each.
#include "exponent_codec.cuh"

extern "C" __global__ void __launch_bounds__(256) decode_exp_bf16(
    const __grid_constant__ EncodedChunks chunks, u32 *errors) {
    decode_exponent<Bf16>(chunks, errors);
}

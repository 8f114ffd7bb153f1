// gated: output = act(gate) * up, element by element; act is silu, or gelu by tanh.
//
// gate, up, output: (rows, size), rows at strides; size is a multiple of 8, all are aligned to 16 bytes.
// Bound: bytes of gate, up and output, once each. Grid: (size / 2,048, rounded up, rows), 256 threads.
#include "ptx.cuh"

struct Gate {  // the same in device/step_parameters.py: GATE
    const u16 *gate, *up;
    u16 *output;
    u32 size, gate_stride, up_stride, output_stride, is_gelu;
};

__device__ __forceinline__ float activated(float x, u32 is_gelu) {
    // gelu by tanh: x * sigmoid(2 u)
    const float u = is_gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
    return x / (1.f + power_of_two(-1.4426950409f * u));
}

__device__ __forceinline__ u32 gated_pair(u32 gate, u32 up, u32 is_gelu) {
    return packed(activated(low_float(gate), is_gelu) * low_float(up),
                  activated(high_float(gate), is_gelu) * high_float(up));
}

extern "C" __global__ void __launch_bounds__(256) gated(const __grid_constant__ Gate p) {
    let_next_start();
    wait_for_prior();
    const u64 row = blockIdx.y;
    const u32 i = (blockIdx.x * 256 + threadIdx.x) * 8;
    if (i >= p.size) return;
    const uint4 gate = *(const uint4 *)(p.gate + row * p.gate_stride + i);
    const uint4 up = *(const uint4 *)(p.up + row * p.up_stride + i);
    *(uint4 *)(p.output + row * p.output_stride + i) =
        make_uint4(gated_pair(gate.x, up.x, p.is_gelu), gated_pair(gate.y, up.y, p.is_gelu),
                   gated_pair(gate.z, up.z, p.is_gelu), gated_pair(gate.w, up.w, p.is_gelu));
}

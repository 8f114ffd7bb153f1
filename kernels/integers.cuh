// Integer types and loads for every kernel here: no toolkit header is needed to compile them.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

const u32 ALL_LANES = 0xffffffffu;
const u32 CHUNKS_MAX = 120;  // of a launch: their descriptors fit into 4 KiB of parameters; device/kernels.py has it too

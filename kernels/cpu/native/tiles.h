// Products of 16 x 16 tiles on AMX, where the machine has it.
//
// A panel of packed weights is a column of such tiles as it stands: sixteen units of the inner
// dimension are sixteen rows of sixteen lanes. NATIVE_EMULATED_TILES replaces the instructions by
// loops, so that this code can be tested anywhere.
#pragma once

#include <cstring>

#include "vectors.h"

#if defined(NATIVE_EMULATED_TILES)
#define NATIVE_TILES 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define NATIVE_TILES 1
#else
#define NATIVE_TILES 0
#endif

namespace native {

#if NATIVE_TILES

// The operand of LDTILECFG, palette 1. Tiles 0-3 are sums (row block i / 2, column block i % 2),
// 4 and 5 two blocks of rows, 6 and 7 two blocks of weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // `first` and `second` rows (0 to 16) in the two row blocks.
    TileShapes(int first, int second) {
        for (int i = 0; i < 8; i++) {
            rows[i] = i >= 6 ? 16 : (i < 4 ? i / 2 : i - 4) ? second : first;
            row_bytes[i] = rows[i] ? 64 : 0;
        }
    }
};

#if defined(NATIVE_EMULATED_TILES)

struct EmulatedTiles {
    uint32_t lanes[8][16][16];
    uint8_t rows[16];
};
inline thread_local EmulatedTiles emulated;

inline void tile_shapes(const TileShapes* shapes) {
    std::memset(&emulated, 0, sizeof(emulated));
    std::memcpy(emulated.rows, shapes->rows, 16);
}
inline void tile_release() { std::memset(&emulated, 0xff, sizeof(emulated)); }
template <int N>
void tile_zero() {
    std::memset(emulated.lanes[N], 0, sizeof(emulated.lanes[N]));
}
template <int N>
void tile_load(const void* from, int64_t stride) {
    for (int r = 0; r < emulated.rows[N]; r++)
        std::memcpy(emulated.lanes[N][r], (const char*)from + r * stride, 64);
}
template <int N>
void tile_store(void* to, int64_t stride) {
    for (int r = 0; r < emulated.rows[N]; r++)
        std::memcpy((char*)to + r * stride, emulated.lanes[N][r], 64);
}
template <int C, int A, int B>
void tile_dot() {
    for (int r = 0; r < emulated.rows[C]; r++) {
        Floats low{}, high{};
        for (int k = 0; k < 16; k++) {
            const uint32_t a = emulated.lanes[A][r][k];
            const Lanes b = load_as<Lanes>(emulated.lanes[B][k]);
            low += splat(bit_cast<float>(a << 16)) * bit_cast<Floats>(b << 16);
            high += splat(bit_cast<float>(a & 0xffff0000u)) * bit_cast<Floats>(b & 0xffff0000u);
        }
        store_as(emulated.lanes[C][r], load_as<Floats>(emulated.lanes[C][r]) + (low + high));
    }
}
inline bool tiles_permitted() { return true; }

#else

// Written as assembler because the intrinsics take no template argument for a register.
inline void tile_shapes(const TileShapes* shapes) { asm volatile("ldtilecfg %0" ::"m"(*shapes)); }
inline void tile_release() { asm volatile("tilerelease"); }
template <int N>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(N));
}
template <int N>
INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(N) : "memory");
}
template <int N>
INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(N) : "memory");
}
template <int C, int A, int B>
INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Linux hands the tile registers out on request, once for the whole process.
inline bool tiles_permitted() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

#endif

// sums[32][32] = a b for `rows` (1 to 32) rows of `units` (a multiple of 16) lanes, `stride` lanes
// apart, and one panel of weights.
inline void multiply_tiles(const uint32_t* a, int64_t stride, int rows, int64_t units,
                           const uint32_t* panel, float* sums) {
    const int64_t step = stride * 4, width = 32 * 4;
    tile_zero<0>(), tile_zero<1>();
    if (rows <= 16) {
        for (int64_t u = 0; u < units; u += 16) {
            tile_load<4>(a + u, step);
            tile_load<6>(panel + u * 32, width), tile_load<7>(panel + u * 32 + 16, width);
            tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>();
        }
    } else {
        tile_zero<2>(), tile_zero<3>();
        for (int64_t u = 0; u < units; u += 16) {
            tile_load<4>(a + u, step), tile_load<5>(a + 16 * stride + u, step);
            tile_load<6>(panel + u * 32, width), tile_load<7>(panel + u * 32 + 16, width);
            tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>();
            tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
        }
        tile_store<2>(sums + 16 * 32, width), tile_store<3>(sums + 16 * 32 + 16, width);
    }
    tile_store<0>(sums, width), tile_store<1>(sums + 16, width);
}

// Whether the tiles are there and compute what they should: a small product, exact in bf16.
inline bool tiles_work() {
    static const bool works = [] {
        if (!tiles_permitted()) return false;
        constexpr int rows = 17;
        uint32_t a[rows * 16], panel[16 * 32];
        float sums[32 * 32];
        const auto pack = [](int low, int high) {
            return bit_cast<uint32_t>(float(low)) >> 16 | bit_cast<uint32_t>(float(high));
        };
        for (int i = 0; i < rows * 16; i++) a[i] = pack(i % 7 - 3, i % 5 - 2);
        for (int i = 0; i < 16 * 32; i++) panel[i] = pack(i % 11 - 5, i % 3 - 1);
        const TileShapes shapes(16, rows - 16);
        tile_shapes(&shapes);
        multiply_tiles(a, 16, rows, 16, panel, sums);
        tile_release();
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 32; c++) {
                int expected = 0;
                for (int u = 0; u < 16; u++) {
                    const int i = r * 16 + u, j = u * 32 + c;
                    expected += (i % 7 - 3) * (j % 11 - 5) + (i % 5 - 2) * (j % 3 - 1);
                }
                if (sums[r * 32 + c] != float(expected)) return false;
            }
        return true;
    }();
    return works;
}

#else

inline bool tiles_work() { return false; }

#endif

}  // namespace native

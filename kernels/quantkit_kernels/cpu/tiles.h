// AMX: eight tiles of 16 rows of 64 bytes, and products of them. Spelled out with QK_TEST_TILES.
#pragma once
#include "bf16.h"

#if defined(QK_BF16) && (defined(QK_TEST_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)))
#define QK_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(QK_TILES)
namespace {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#if !defined(QK_TEST_TILES)
#define QK_TILE_SHAPES(shapes) asm volatile("ldtilecfg %0" ::"m"(shapes))
#define QK_TILE_RELEASE() asm volatile("tilerelease" ::: "memory")
#define QK_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define QK_TILE_LOAD(t, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((const void*)(from)), "r"((long)(stride)) : "memory")
#define QK_TILE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void*)(to)), "r"((long)(stride)) : "memory")
#define QK_TILE_DOT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#else  // the instructions spelled out
thread_local TileShapes tile_shapes;
thread_local uint32_t tile[8][16][16];

void tile_load(int t, const void* from, long stride) {
  for (int r = 0; r < tile_shapes.rows[t]; r++) std::memcpy(tile[t][r], (const char*)from + r * stride, tile_shapes.bytes[t]);
}
void tile_store(int t, void* to, long stride) {
  for (int r = 0; r < tile_shapes.rows[t]; r++) std::memcpy((char*)to + r * stride, tile[t][r], tile_shapes.bytes[t]);
}
void tile_dot(int c, int a, int b) {
  for (int r = 0; r < tile_shapes.rows[c]; r++)
    for (int k = 0; k < tile_shapes.bytes[a] / 4; k++)
      for (int n = 0; n < tile_shapes.bytes[c] / 4; n++) {
        const uint32_t p = tile[a][r][k], q = tile[b][k][n];
        float sum = bits<float>(tile[c][r][n]);
        sum += bits<float>(p << 16) * bits<float>(q << 16);
        sum += bits<float>(p & 0xFFFF0000u) * bits<float>(q & 0xFFFF0000u);
        tile[c][r][n] = bits<uint32_t>(sum);
      }
}
#define QK_TILE_SHAPES(shapes) tile_shapes = shapes
#define QK_TILE_RELEASE() tile_shapes = TileShapes()
#define QK_TILE_ZERO(t) std::memset(tile[t], 0, sizeof tile[t])
#define QK_TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define QK_TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define QK_TILE_DOT(c, a, b) tile_dot(c, a, b)
#endif

}  // namespace
#endif

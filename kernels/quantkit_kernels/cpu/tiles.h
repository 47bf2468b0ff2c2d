// AMX: eight tiles of 16 rows of 64 bytes, and products of them (spelled out with QK_TEST_TILES); inputs and decoded
// weights laid out for them.
#pragma once
#include <algorithm>
#include <memory>

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


constexpr int ROWS = 32;    // of the weight, decoded together: two tiles
constexpr int SPAN = 256;   // columns of them that lie decoded in the first-level cache, where there are many tokens
constexpr long INPUTS = 1 << 20;  // bytes of x that stay in the second-level cache
constexpr long ALIGNED = 64;

struct Buffer {  // of floats or of what is as large, on a line of the cache
  std::unique_ptr<float[]> memory;
  float* at;
  explicit Buffer(long floats) : memory(new float[floats + ALIGNED]) {
    at = (float*)(((uintptr_t)memory.get() + ALIGNED - 1) / ALIGNED * ALIGNED);
  }
};

// `blocks` blocks of columns of x^T in pairs of rows: [tiles][4 blocks][16 pairs][tokens of a tile]
struct Inputs {
  long M, blocks, tiles, tokens;
  Buffer memory;
  Inputs(long M, long blocks)
      : M(M), blocks(blocks), tiles((M + 15) / 16), tokens((M + tiles - 1) / tiles),
        memory(tiles * tokens * blocks * BLOCK / 2) {}
  uint32_t* at(long tile, long vector) { return (uint32_t*)memory.at + (tile * blocks * 4 + vector) * 16 * tokens; }

  // A block of a tile of tokens, from column k of x [M, in]: bfloat16, or int8, which bfloat16 holds.
  template <class D, class X>
  void place(const X* x, long in, long k, long tile, long block) {
    h32 ordered[4][16] = {};
    const long bytes = sizeof(X) * std::min(in - k, (long)BLOCK);
    for (long t = 0; t < tokens && tile * tokens + t < M; t++) {
      h32 plain[4] = {}, out[4];
      if (bytes > 0) std::memcpy(plain, x + (tile * tokens + t) * in + k, bytes);
      if constexpr (sizeof(X) == 1) {
        alignas(64) uint8_t codes[BLOCK];
        std::memcpy(codes, plain, BLOCK);
        for (int i = 0; i < 4; i++) plain[i] = halves(Int8::get(codes, 2 * i), Int8::get(codes, 2 * i + 1));
      }
      arrange<D>(plain, out);
      for (int v = 0; v < 4; v++) ordered[v][t] = out[v];
    }
    for (int v = 0; v < 4; v++) {
      uint32_t* to = at(tile, block * 4 + v);
      if (tokens > 1) transpose((f32v*)ordered[v]);
      else std::memcpy(to, ordered[v], 64);
      for (int j = 0; tokens > 1 && j < 16; j++) std::memcpy(to + j * tokens, &ordered[v][j], 4 * tokens);
    }
  }
};

// Decoded rows of the weight: [SPAN / 32][ROWS] vectors; without their scales where not scaled.
template <class D, int RUN>
struct Decoder {
  const Weight& w;
  const Codes codes;
  const long bytes, runs;
  Buffer scale, zero, ones;
  const bool scaled;
  long n0 = 0;
  int rows = 0;

  explicit Decoder(const Weight& w, bool scaled = true)
      : w(w), codes(codes_of<D>(w)), bytes(w.K / 64 * D::CHUNK), runs(runs_of(w)), scale(ROWS * runs + V),
        zero(ROWS * runs + V), ones(runs), scaled(scaled) {
    std::fill(ones.at, ones.at + runs, 1.f);
    std::memset(scale.at, 0, 4 * (ROWS * runs + V));  // what a half block lacks
    std::memset(zero.at, 0, 4 * (ROWS * runs + V));
  }

  void begin(long first) {
    n0 = first, rows = w.N - n0 < ROWS ? w.N - n0 : ROWS;
    for (int r = 0; r < rows; r++) row_scales_of<D>(w, n0 + r, scale.at + r * runs, zero.at + r * runs);
  }

  // 128 columns of row n0 + r whose codes are at p; half: only 64 are there; out: of its block.
  __attribute__((always_inline)) inline void row(const uint8_t* p, bool half, long run, long next, int r, h32* out) {
    const Row row{scaled ? scale.at + r * runs : ones.at, zero.at + r * runs};
    h32 decoded[4];
    for (int line = 0; line < 2 * D::CHUNK; line += 64) __builtin_prefetch(p + ROWS * bytes + line, 0, 2);
    if (__builtin_expect(half, false)) {
      alignas(64) uint8_t whole[2 * D::CHUNK] = {};
      std::memcpy(whole, p, D::CHUNK);
      decode_block<D, RUN>(whole, row, codes, run, next, decoded);
    } else
      decode_block<D, RUN>(p, row, codes, run, next, decoded);
    for (int v = 0; v < 4; v++) out[v * ROWS + r] = decoded[v];
  }
  const uint8_t* at(long k) const { return w.codes + n0 * bytes + k / 64 * D::CHUNK; }

  void block(long k, h32* out) {
    const long run = run_at<RUN>(codes, k), next = run_at<RUN>(codes, k + 64);
    const uint8_t* p = at(k);
    const bool half = k + 64 == w.K;
    for (int r = 0; r < rows; r++, p += bytes) row(p, half, run, next, r, out);
  }

  // Columns k ... k1, some rows of a block at each call.
  struct Part {
    Decoder& d;
    long k, k1;
    h32* out;
    int r = 0;
    inline void operator()(int count) {
      for (; count > 0 && k < k1; count--) {
        d.row(d.at(k) + r * d.bytes, k + 64 == d.w.K, run_at<RUN>(d.codes, k), run_at<RUN>(d.codes, k + 64), r, out);
        if (++r == d.rows) r = 0, k += BLOCK, out += 4 * ROWS;
      }
    }
    inline void rest() {
      (*this)(r ? d.rows - r : 0);
      for (; k < k1; k += BLOCK, out += 4 * ROWS) d.block(k, out);
    }
  };
};

// Tiles 0 to 3 += 32 decoded rows times PAIR tiles of inputs, over `vectors` times 32 columns; with each, something else is
// done meanwhile.
template <int PAIR, class Meanwhile>
inline void multiply(const h32* rows, const uint32_t* first, const uint32_t* second, long tokens, long vectors,
                     Meanwhile&& meanwhile) {
  for (long v = 0; v < vectors; v++, rows += ROWS, first += 16 * tokens, second += 16 * tokens) {
    QK_TILE_LOAD(4, rows, 64);
    QK_TILE_LOAD(6, first, 4 * tokens);
    QK_TILE_DOT(0, 4, 6);
    QK_TILE_LOAD(5, rows + 16, 64);
    QK_TILE_DOT(1, 5, 6);
    if (PAIR == 2) {
      QK_TILE_LOAD(7, second, 4 * tokens);
      QK_TILE_DOT(2, 4, 7);
      QK_TILE_DOT(3, 5, 7);
    }
    meanwhile();
  }
}

template <int PAIR>
inline void zero_sums() {
  QK_TILE_ZERO(0);
  QK_TILE_ZERO(1);
  if (PAIR == 2) {
    QK_TILE_ZERO(2);
    QK_TILE_ZERO(3);
  }
}
// Sums of PAIR tiles of inputs: [2 PAIR][16 rows][16 tokens]
template <int PAIR>
inline void load_sums(const float* sums) {
  QK_TILE_LOAD(0, sums, 64);
  QK_TILE_LOAD(1, sums + 256, 64);
  if (PAIR == 2) {
    QK_TILE_LOAD(2, sums + 512, 64);
    QK_TILE_LOAD(3, sums + 768, 64);
  }
}
template <int PAIR>
inline void store_sums(float* sums) {
  QK_TILE_STORE(0, sums, 64);
  QK_TILE_STORE(1, sums + 256, 64);
  if (PAIR == 2) {
    QK_TILE_STORE(2, sums + 512, 64);
    QK_TILE_STORE(3, sums + 768, 64);
  }
}

// y [M, N], float32 or bfloat16, from the sums of `rows` rows from n0 on, times a scale a token if there is one.
inline void write(const float* sums, const float* x_scale, void* y, bool wide, const Inputs& inputs, long N, long n0, int rows) {
  for (long tile = 0; tile < inputs.tiles; tile++)
    for (int half = 0; half < rows; half += 16) {
      f32v by_token[16];
      std::memcpy(by_token, sums + (tile * 2 + half / 16) * 256, sizeof by_token);
      transpose(by_token);
      const int count = rows - half < 16 ? rows - half : 16;
      for (long t = tile * inputs.tokens; t < (tile + 1) * inputs.tokens && t < inputs.M; t++) {
        const f32v row = by_token[t - tile * inputs.tokens] * (x_scale ? x_scale[t] : 1.f);
        const h32 rounded = halves(row, row);
        if (wide) std::memcpy((float*)y + t * N + n0 + half, &row, count * 4);
        else if (count == 16) std::memcpy((uint16_t*)y + t * N + n0 + half, &rounded, 32);
        else std::memcpy((uint16_t*)y + t * N + n0 + half, &rounded, count * 2);
      }
    }
}

}  // namespace
#endif

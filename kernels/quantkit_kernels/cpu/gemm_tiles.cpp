// y = x W^T with bfloat16 inputs on AMX tiles, for any number of tokens: y^T = W x^T, so that decoded rows of the weight
// are tiles as they are. Sums of a token are added in the same order however many tokens there are.
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

struct Buffer {  // of floats or of what is as large, zeros, on a line of the cache
  std::unique_ptr<float[]> memory;
  float* at;
  explicit Buffer(long floats) : memory(new float[floats + ALIGNED]()) {
    at = (float*)(((uintptr_t)memory.get() + ALIGNED - 1) / ALIGNED * ALIGNED);
  }
};

struct Inputs {  // x^T in pairs of rows: [tiles][K / 32][16 pairs][tokens of a tile]
  Buffer memory;
  long M, tiles, tokens, blocks;
  Inputs(long M, long K)
      : memory((M + 15) / 16 * 16 * ((K + BLOCK - 1) / BLOCK * BLOCK / 2)), M(M), tiles((M + 15) / 16),
        tokens((M + tiles - 1) / tiles), blocks((K + BLOCK - 1) / BLOCK) {}
  uint32_t* at(long tile, long vector) { return (uint32_t*)memory.at + (tile * blocks * 4 + vector) * 16 * tokens; }

  // A block of columns of a tile of tokens from x [M, in].
  template <class D>
  void place(const uint16_t* x, long in, long tile, long block) {
    h32 ordered[4][16] = {};
    const long left = in - block * BLOCK, bytes = 2 * (left < BLOCK ? left : BLOCK);
    for (long t = 0; t < tokens && tile * tokens + t < M; t++) {
      h32 plain[4] = {}, out[4];
      std::memcpy(plain, x + (tile * tokens + t) * in + block * BLOCK, bytes);
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

// Decoded rows of the weight: [SPAN / 32][ROWS] vectors.
template <class D, int RUN>
struct Decoder {
  const Weight& w;
  const Codes codes;
  const long bytes, runs;
  Buffer scale, zero;
  long n0 = 0;
  int rows = 0;

  explicit Decoder(const Weight& w)
      : w(w), codes(codes_of<D>(w)), bytes(w.K / 64 * D::CHUNK), runs(runs_of(w)), scale(ROWS * runs + V),
        zero(ROWS * runs + V) {}

  void begin(long first) {
    n0 = first, rows = w.N - n0 < ROWS ? w.N - n0 : ROWS;
    for (int r = 0; r < rows; r++) row_scales_of<D>(w, n0 + r, scale.at + r * runs, zero.at + r * runs);
  }

  void block(long k, h32* out) {
    const uint8_t* p = w.codes + n0 * bytes + k / 64 * D::CHUNK;
    const bool half = k + 64 == w.K;
    for (int r = 0; r < rows; r++, p += bytes) {
      const Row row{scale.at + r * runs, zero.at + r * runs};
      h32 decoded[4];
      for (int line = 0; line < 2 * D::CHUNK; line += 64) __builtin_prefetch(p + ROWS * bytes + line, 0, 2);
      if (__builtin_expect(half, false)) {
        alignas(64) uint8_t whole[2 * D::CHUNK] = {};
        std::memcpy(whole, p, D::CHUNK);
        decode_block<D, RUN>(whole, row, codes, k, decoded);
      } else
        decode_block<D, RUN>(p, row, codes, k, decoded);
      for (int v = 0; v < 4; v++) out[v * ROWS + r] = decoded[v];
    }
  }
};

// Tiles 0 to 3 += 32 decoded rows times PAIR tiles of inputs, over `vectors` times 32 columns.
template <int PAIR>
inline void multiply(const h32* rows, const uint32_t* first, const uint32_t* second, long tokens, long vectors) {
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

// y [M, N], float32 or bfloat16, from the sums of `rows` rows from n0 on.
void write(const float* sums, void* y, bool wide, const Inputs& inputs, long N, long n0, int rows) {
  for (long tile = 0; tile < inputs.tiles; tile++)
    for (int half = 0; half < rows; half += 16) {
      f32v by_token[16];
      std::memcpy(by_token, sums + (tile * 2 + half / 16) * 256, sizeof by_token);
      transpose(by_token);
      const int count = rows - half < 16 ? rows - half : 16;
      for (long t = tile * inputs.tokens; t < (tile + 1) * inputs.tokens && t < inputs.M; t++) {
        const f32v row = by_token[t - tile * inputs.tokens];
        const h32 rounded = halves(row, row);
        if (wide) std::memcpy((float*)y + t * N + n0 + half, &row, count * 4);
        else if (count == 16) std::memcpy((uint16_t*)y + t * N + n0 + half, &rounded, 32);
        else std::memcpy((uint16_t*)y + t * N + n0 + half, &rounded, count * 2);
      }
    }
}

template <class D, int RUN>
void gemm(const Weight& w, const uint16_t* x, long in, void* y, bool wide, long M) {
  Inputs inputs(M, w.K);
  const long tokens = inputs.tokens;
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.rows[t] = 16, shapes.bytes[t] = t == 4 || t == 5 ? 64 : 4 * tokens;
#pragma omp parallel num_threads(w.threads)
  {
#pragma omp for schedule(static) collapse(2)
    for (long tile = 0; tile < inputs.tiles; tile++)
      for (long block = 0; block < inputs.blocks; block++) inputs.place<D>(x, in, tile, block);
    Decoder<D, RUN> decoder(w);
    Buffer decoded(ROWS * SPAN / 2), sums((inputs.tiles + 1) * 512);
    h32* buffer = (h32*)decoded.at;
    QK_TILE_SHAPES(shapes);
#pragma omp for schedule(static)
    for (long n0 = 0; n0 < w.N; n0 += ROWS) {
      decoder.begin(n0);
      auto few = [&](auto pair) {  // sums stay in tiles, and a block is decoded while the one before is multiplied
        constexpr int PAIR = decltype(pair)::value;
        zero_sums<PAIR>();
        decoder.block(0, buffer);
        for (long k = 0, turn = 0; k < w.K; k += BLOCK, turn ^= 1) {
          if (k + BLOCK < w.K) decoder.block(k + BLOCK, buffer + (1 - turn) * 4 * ROWS);
          multiply<PAIR>(buffer + turn * 4 * ROWS, inputs.at(0, k / 32), inputs.at(PAIR - 1, k / 32), tokens, 4);
        }
        store_sums<PAIR>(sums.at);
      };
      auto many = [&](auto pair, long tile, long k, long vectors) {
        constexpr int PAIR = decltype(pair)::value;
        if (k) load_sums<PAIR>(sums.at + tile * 512);
        else zero_sums<PAIR>();
        multiply<PAIR>(buffer, inputs.at(tile, k / 32), inputs.at(tile + PAIR - 1, k / 32), tokens, vectors);
        store_sums<PAIR>(sums.at + tile * 512);
      };
      const std::integral_constant<int, 1> one;
      const std::integral_constant<int, 2> two;
      if (inputs.tiles == 1) few(one);
      else if (inputs.tiles == 2) few(two);
      else
        for (long k0 = 0; k0 < w.K; k0 += SPAN) {
          const long k1 = k0 + SPAN < w.K ? k0 + SPAN : w.K, vectors = (k1 - k0 + BLOCK - 1) / BLOCK * 4;
          for (long k = k0; k < k1; k += BLOCK) decoder.block(k, buffer + (k - k0) / 32 * ROWS);
          for (long tile = 0; tile + 1 < inputs.tiles; tile += 2) many(two, tile, k0, vectors);
          if (inputs.tiles % 2) many(one, inputs.tiles - 1, k0, vectors);
        }
      write(sums.at, y, wide, inputs, w.N, n0, decoder.rows);
    }
    QK_TILE_RELEASE();
  }
}

// A part of the tokens at a time, whose inputs stay in the second-level cache while the weight is decoded.
template <class D, int RUN>
void gemm_parts(const Weight& w, const uint16_t* x, long in, void* y, bool wide, long M) {
  const long most = std::max(32L, INPUTS / (2 * w.K) / 32 * 32), parts = (M + most - 1) / most;
  const long part = ((M + parts - 1) / parts + 31) / 32 * 32;
  for (long t = 0; t < M; t += part)
    gemm<D, RUN>(w, x + t * in, in, (char*)y + t * w.N * (wide ? 4 : 2), wide, std::min(part, M - t));
}

template <class D>
void gemm_runs(const Weight& w, const uint16_t* x, long in, void* y, bool wide, long M) {
  switch (run_in_block(w)) {
    case 128: return gemm_parts<D, 128>(w, x, in, y, wide, M);
    case 64: return gemm_parts<D, 64>(w, x, in, y, wide, M);
    case 32: return gemm_parts<D, 32>(w, x, in, y, wide, M);
    default: return gemm_parts<D, 16>(w, x, in, y, wide, M);
  }
}

}  // namespace
#endif

// Whether there are tiles: the processor's, which Linux lets a process use that asks.
extern "C" int quantkit_has_tiles() {
#if defined(QK_TEST_TILES)
  return 1;
#elif defined(QK_TILES)
  static const int granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return granted;
#else
  return 0;
#endif
}

// x bfloat16 [M, in], `in` at most K; y [M, N] in float32 (wide) or bfloat16. Only quantized weights.
extern "C" void quantkit_gemm_tiles(QK_ARGUMENTS, const uint16_t* x, long in, void* y, int wide, long M) {
#if defined(QK_TILES)
  const Weight w = QK_WEIGHT;
  switch (format) {
    case 0: return gemm_runs<Int4>(w, x, in, y, wide, M);
    case 1: return gemm_runs<Int8>(w, x, in, y, wide, M);
    case 2: return gemm_runs<Fp8>(w, x, in, y, wide, M);
    case 3: return gemm_runs<Fp4>(w, x, in, y, wide, M);
  }
#endif
}

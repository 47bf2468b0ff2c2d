// y = x W^T with int8 inputs and integer weights whose groups are whole blocks, on AMX tiles: bfloat16 holds every code of
// both, and float32 every sum of a block, so that sums are exact as int32's are. Then they are scaled in float32.
#include "tiles.h"

#if defined(QK_TILES)
namespace {

// Sums of a block of two to four tiles that wait to be scaled: one tile of 16 rows at each call.
struct Waiting {
  const long stride;  // of rows in scale
  int tile = 0, tiles = 0;
  float* sums = nullptr;
  const float *block = nullptr, *scale = nullptr;
  inline void operator()() {
    if (tile == tiles) return;
    for (int r = 0; r < 16; r++) {
      const long at = (tile * 16 + r) * 16;
      const f32v sum = load<f32v>(sums + at) + load<f32v>(block + at) * scale[(tile % 2 * 16 + r) * stride];
      std::memcpy(sums + at, &sum, sizeof sum);
    }
    tile++;
  }
};

template <class D>
void gemm_int8(const Weight& w, const int8_t* x, long in, const float* x_scale, float* y, long M) {
  Inputs inputs(M, (w.K + BLOCK - 1) / BLOCK);
  const long tokens = inputs.tokens, tiles = inputs.tiles;
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.rows[t] = 16, shapes.bytes[t] = t == 4 || t == 5 ? 64 : 4 * tokens;
#pragma omp parallel num_threads(w.threads)
  {
    Decoder<D, BLOCK> decoder(w, false);
    Buffer decoded(ROWS * BLOCK / 2), blocks((long)2048), all((tiles + 1) * 512);
    h32* rows = (h32*)decoded.at;
    std::fill(blocks.at, blocks.at + 2048, 0.f);  // columns that no token has
    QK_TILE_SHAPES(shapes);
#pragma omp for schedule(static) collapse(2)
    for (long tile = 0; tile < tiles; tile++)
      for (long b = 0; b < inputs.blocks; b++) inputs.place<D>(x, in, b * BLOCK, tile, b);
#pragma omp for schedule(static)
    for (long n0 = 0; n0 < w.N; n0 += ROWS) {
      decoder.begin(n0);
      std::fill(all.at, all.at + (tiles + 1) * 512, 0.f);
      Waiting before{decoder.runs};  // scaled while the next tiles are multiplied
      float* block = blocks.at;
      for (long k = 0; k < w.K; k += BLOCK) {
        decoder.block(k, rows);
        auto add = [&](auto pair, long tile) {
          constexpr int PAIR = decltype(pair)::value;
          zero_sums<PAIR>();
          multiply<PAIR>(rows, inputs.at(tile, k / 32), inputs.at(tile + PAIR - 1, k / 32), tokens, 4, before);
          store_sums<PAIR>(block);
          before.tile = 0, before.tiles = 2 * PAIR, before.sums = all.at + tile * 512, before.block = block;
          before.scale = decoder.scale.at + k / w.group;
          block = block == blocks.at ? blocks.at + 1024 : blocks.at;
        };
        for (long tile = 0; tile + 1 < tiles; tile += 2) add(std::integral_constant<int, 2>(), tile);
        if (tiles % 2) add(std::integral_constant<int, 1>(), tiles - 1);
      }
      while (before.tile < before.tiles) before();
      write(all.at, x_scale, y, true, inputs, w.N, n0, decoder.rows);
    }
    QK_TILE_RELEASE();
  }
}

template <class D>
void gemm_int8_parts(const Weight& w, const int8_t* x, long in, const float* x_scale, float* y, long M) {
  const long most = std::max(32L, INPUTS / (2 * w.K) / 32 * 32), parts = (M + most - 1) / most;
  const long part = ((M + parts - 1) / parts + 31) / 32 * 32;
  for (long t = 0; t < M; t += part) gemm_int8<D>(w, x + t * in, in, x_scale + t, y + t * w.N, std::min(part, M - t));
}

}  // namespace
#endif

// x [M, in], `in` at most K; y float32 [M, N]. int4 or int8 weights in groups of a multiple of 128.
extern "C" void quantkit_gemm_tiles_int8(QK_ARGUMENTS, const int8_t* x, long in, const float* x_scale, float* y, long M) {
#if defined(QK_TILES)
  const Weight w = QK_WEIGHT;
  if (format == 1) gemm_int8_parts<Int8>(w, x, in, x_scale, y, M);
  else gemm_int8_parts<Int4>(w, x, in, x_scale, y, M);
#endif
}

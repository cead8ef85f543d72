// The drivers of gemm.h for one instruction set: which part of a product is packed and computed
// when, and by which task. Blocking never shows in the result (gemm.h), so it is chosen freely.
//
// Many rows: for each pass over columns and reduction, phase 1 packs the pass's activations and
// weights once, into memory that all threads share; phase 2 multiplies blocks of row tiles by
// blocks of panels. Few rows: each task owns 32 columns and decodes them in pieces that stay in
// its own cache; nothing is shared but the packed activations.
#include "backends/cpu/gemm_pack.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

// Rows in equal tiles of at most kTileRows; the last may be smaller.
struct Tiles {
  explicit Tiles(std::int64_t rows)
      : rows(rows),
        count(quotient_up(rows, kTileRows)),
        height(quotient_up(rows, larger(count, 1))) {
    count = quotient_up(rows, larger(height, 1));
  }
  std::int64_t begin(std::int64_t t) const { return t * height; }
  int size(std::int64_t t) const { return static_cast<int>(smaller(height, rows - begin(t))); }
  std::int64_t rows, count, height;
};

// Where the results of a pass go. `c` holds sums of type T at [row * stride + column], or with
// `transposed` at [column * stride + row] (TileStart::Add only). With `rounded`, the sums are
// final and go there as BF16 instead.
template <class T>
struct Target {
  T* c;
  std::int64_t stride;
  TileStart start;
  bool transposed = false;
  bf16* rounded = nullptr;
  std::int64_t rounded_stride = 0;
};

// A tile at (row, column) that cannot be written in place: edge, transposed or rounded.
template <class T>
void compute_aside(TileKernel<T> kernel, std::int64_t depth, const T* a, const T* b,
                   const Target<T>& target, std::int64_t row, int rows, std::int64_t column,
                   std::int64_t columns, int width) {
  alignas(64) T tile[kTileRows * kPanelWidth<T>];
  T* c =
      target.c + (target.transposed ? column * target.stride + row : row * target.stride + column);
  const std::int64_t row_step = target.transposed ? 1 : target.stride;
  const std::int64_t column_step = target.transposed ? target.stride : 1;
  if (target.start == TileStart::Continue) {
    for (int i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < width; ++j) {
        tile[i * width + j] = j < columns ? c[i * row_step + j * column_step] : T{0};
      }
    }
  }
  kernel(depth, a, b, tile, width, target.start == TileStart::Add ? TileStart::Zero : target.start);
  for (int i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const T sum = tile[i * width + j];
      if constexpr (sizeof(T) == sizeof(float)) {
        if (target.rounded != nullptr) {
          target.rounded[(row + i) * target.rounded_stride + column + j] = to_bf16(sum);
          continue;
        }
      }
      T& to = c[i * row_step + j * column_step];
      to = target.start == TileStart::Add ? to + sum : sum;
    }
  }
}

template <class T>
void compute_tile(std::int64_t depth, const T* a, const T* b, const Target<T>& target,
                  std::int64_t row, int rows, std::int64_t column, std::int64_t columns,
                  int width) {
  const TileKernel<T> kernel = kTileKernels<T>.at[rows - 1][width / Simd<T>::lanes - 1];
  if (columns == width && !target.transposed && target.rounded == nullptr) {
    kernel(depth, a, b, target.c + row * target.stride + column, target.stride, target.start);
  } else {
    compute_aside(kernel, depth, a, b, target, row, rows, column, columns, width);
  }
}

// How phase 2 is cut: blocks of about 96 rows by 256 columns, whose operands fit a core's second
// cache, made smaller until every thread has about four.
struct Blocks {
  std::int64_t tiles, panels;  // per block
};

template <class T>
Blocks choose_blocks(const Tiles& tiles, const Panels<T>& panels, int threads) {
  Blocks b{larger(96 / larger(tiles.height, 1), 1), kGroupColumns / kPanelWidth<T>};
  b.tiles = smaller(b.tiles, larger(tiles.count, 1));
  b.panels = smaller(b.panels, larger(panels.count(), 1));
  while (threads > 1 &&
         quotient_up(tiles.count, b.tiles) * quotient_up(panels.count(), b.panels) < 4 * threads &&
         b.tiles * b.panels > 1) {
    std::int64_t& longer =
        b.tiles * tiles.height > b.panels * kPanelWidth<T> || b.panels == 1 ? b.tiles : b.panels;
    longer = quotient_up(longer, 2);
  }
  return b;
}

// Phase 2 of a pass: all tiles times all panels.
template <class T>
void compute_pass(ThreadPool& pool, const Tiles& tiles, const Panels<T>& panels, std::int64_t depth,
                  const T* a, const T* b, const Target<T>& target) {
  const Blocks block = choose_blocks<T>(tiles, panels, pool.threads());
  const std::int64_t down = quotient_up(tiles.count, block.tiles);
  const std::int64_t across = quotient_up(panels.count(), block.panels);
  const auto compute_block = [&](std::int64_t task, int) {
    const std::int64_t tile_begin = task % down * block.tiles;
    const std::int64_t tile_end = smaller(tile_begin + block.tiles, tiles.count);
    const std::int64_t panel_begin = task / down * block.panels;
    const std::int64_t panel_end = smaller(panel_begin + block.panels, panels.count());
    for (std::int64_t p = panel_begin; p < panel_end; ++p) {
      for (std::int64_t t = tile_begin; t < tile_end; ++t) {
        compute_tile(depth, a + tiles.begin(t) * depth, b + panels.begin(p) * depth, target,
                     tiles.begin(t), tiles.size(t), panels.begin(p), panels.valid(p),
                     panels.width(p));
      }
    }
  };
  pool.parallel_for(down * across, compute_block);
}

constexpr std::int64_t kRowsPerPackingTask = 64;  // of a weight used as it lies

template <class T>
void multiply_many(const GemmContext& context, WeightUse use, std::int64_t rows, const Term* terms,
                   int term_count, Matrix y, Output output, const ScratchParts& parts) {
  auto* a = reinterpret_cast<T*>(context.scratch.data() + parts.a);
  auto* b = reinterpret_cast<T*>(context.scratch.data() + parts.b);
  auto* sums = reinterpret_cast<T*>(context.scratch.data() + parts.result);
  const bool transposed = use == WeightUse::Transposed;
  const std::int64_t outputs = transposed ? terms[0].weight.rows : terms[0].weight.cols;
  const bool rounds = y.dtype == DType::BF16;
  const std::int64_t column_step = multiply_columns(y.dtype, outputs);
  const Tiles tiles(rows);
  for (std::int64_t column = 0; column < outputs; column += column_step) {
    const Panels<T> panels{smaller(column_step, outputs - column)};
    Target<T> target{rounds ? sums : static_cast<T*>(y.data) + column,
                     rounds ? column_step : y.stride,
                     output == Output::Accumulate ? TileStart::Continue : TileStart::Zero};
    for (int t = 0; t < term_count; ++t) {
      const Term& term = terms[t];
      const StoredMatrix& w = term.weight;
      const std::int64_t inner = transposed ? w.cols : w.rows;
      for (std::int64_t k = 0; k < inner; k += kInnerBlock) {
        const std::int64_t depth = smaller(kInnerBlock, inner - k);
        const std::int64_t pieces = transposed ? 1 : quotient_up(depth, kRowsPerPackingTask);
        const std::int64_t groups =
            transposed ? panels.count() : quotient_up(panels.columns, kGroupColumns);
        const auto pack = [&](std::int64_t task, int) {
          if (task >= groups * pieces) {
            const std::int64_t tile = task - groups * pieces;
            pack_row_tile<T>(term.x, tiles.begin(tile), tiles.size(tile), k, depth,
                             static_cast<T>(term.alpha), a + tiles.begin(tile) * depth);
          } else if (transposed) {
            pack_panel_of_rows(w, column, panels, task, k, depth, b + panels.begin(task) * depth);
          } else {
            const std::int64_t k0 = task % pieces * kRowsPerPackingTask;
            pack_group_of_columns(w, column, panels, task / pieces * kGroupColumns, k, k0,
                                  smaller(k0 + kRowsPerPackingTask, depth), depth, T{1}, b);
          }
        };
        context.pool.parallel_for(groups * pieces + tiles.count, pack);
        if (rounds && t == term_count - 1 && k + depth == inner) {
          target.rounded = static_cast<bf16*>(y.data) + column;
          target.rounded_stride = y.stride;
        }
        compute_pass<T>(context.pool, tiles, panels, depth, a, b, target);
        target.start = TileStart::Continue;
      }
    }
  }
}

constexpr std::int64_t kFewRowsDepth = 128;  // a panel group is 16 KiB of floats

// The columns [column, column + kPanelMultiple) of the result of multiply_few.
template <class T>
void multiply_strip(WeightUse use, const Tiles& tiles, const Term* terms, int term_count,
                    const T* packed, std::int64_t column, std::int64_t columns, Matrix y,
                    Output output) {
  alignas(64) T panel_memory[kPanelMultiple * kFewRowsDepth];
  alignas(64) T sums[kFewRows * kPanelMultiple];
  const Panels<T> panels{columns};
  Target<T> target{sums, kPanelMultiple, TileStart::Zero};
  T* accumulated = output == Output::Accumulate ? static_cast<T*>(y.data) + column : nullptr;
  if (accumulated != nullptr) {
    target.start = TileStart::Continue;
    for (std::int64_t i = 0; i < tiles.rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        sums[i * kPanelMultiple + j] = accumulated[i * y.stride + j];
      }
    }
  }
  for (int t = 0; t < term_count; ++t) {
    const StoredMatrix& w = terms[t].weight;
    const std::int64_t inner = use == WeightUse::Transposed ? w.cols : w.rows;
    for (std::int64_t k = 0; k < inner; k += kFewRowsDepth) {
      const std::int64_t depth = smaller(kFewRowsDepth, inner - k);
      if (use == WeightUse::Plain) {
        pack_group_of_columns(w, column, panels, 0, k, 0, depth, depth, T{1}, panel_memory);
      }
      for (std::int64_t p = 0; p < panels.count(); ++p) {
        T* panel = panel_memory + panels.begin(p) * depth;
        if (use == WeightUse::Transposed) {
          pack_panel_of_rows(w, column, panels, p, k, depth, panel);
        }
        for (std::int64_t i = 0; i < tiles.count; ++i) {
          compute_tile(depth, packed + tiles.begin(i) * inner + k * tiles.size(i), panel, target,
                       tiles.begin(i), tiles.size(i), panels.begin(p), panels.valid(p),
                       panels.width(p));
        }
      }
      target.start = TileStart::Continue;
    }
    packed += tiles.rows * inner;
  }
  for (std::int64_t i = 0; i < tiles.rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const T sum = sums[i * kPanelMultiple + j];
      if constexpr (sizeof(T) == sizeof(float)) {
        if (y.dtype == DType::BF16) {
          static_cast<bf16*>(y.data)[i * y.stride + column + j] = to_bf16(sum);
          continue;
        }
      }
      static_cast<T*>(y.data)[i * y.stride + column + j] = sum;
    }
  }
}

template <class T>
void multiply_few(const GemmContext& context, WeightUse use, std::int64_t rows, const Term* terms,
                  int term_count, Matrix y, Output output) {
  auto* packed = reinterpret_cast<T*>(context.scratch.data());
  const Tiles tiles(rows);
  T* to = packed;
  for (int t = 0; t < term_count; ++t) {
    const Term& term = terms[t];
    const std::int64_t inner = use == WeightUse::Transposed ? term.weight.cols : term.weight.rows;
    const auto pack = [&](std::int64_t tile, int) {
      pack_row_tile<T>(term.x, tiles.begin(tile), tiles.size(tile), 0, inner,
                       static_cast<T>(term.alpha), to + tiles.begin(tile) * inner);
    };
    context.pool.parallel_for(tiles.count, pack);
    to += rows * inner;
  }
  const std::int64_t outputs =
      use == WeightUse::Transposed ? terms[0].weight.rows : terms[0].weight.cols;
  const auto strip = [&](std::int64_t task, int) {
    const std::int64_t column = task * kPanelMultiple;
    multiply_strip<T>(use, tiles, terms, term_count, packed, column,
                      smaller(kPanelMultiple, outputs - column), y, output);
  };
  context.pool.parallel_for(quotient_up(outputs, kPanelMultiple), strip);
}

template <class T>
void gradient(const GemmContext& context, std::int64_t rows, std::int64_t n, std::int64_t k,
              ConstMatrix dy, ConstMatrix x, double alpha, Matrix dw) {
  const ScratchParts parts = gradient_parts(dw.dtype, rows, n, k);
  auto* a = reinterpret_cast<T*>(context.scratch.data() + parts.a);
  auto* b = reinterpret_cast<T*>(context.scratch.data() + parts.b);
  const bool swapped = gradient_is_swapped(n, k);
  const ConstMatrix& left = swapped ? x : dy;
  const ConstMatrix& right = swapped ? dy : x;
  // alpha goes to dy in both orientations, so that they give the same bits.
  const T left_alpha = swapped ? T{1} : static_cast<T>(alpha);
  const T right_alpha = swapped ? static_cast<T>(alpha) : T{1};
  const std::int64_t outputs = swapped ? n : k;
  StoredMatrix right_rows;
  right_rows.data = static_cast<const std::byte*>(right.data);
  right_rows.dtype = right.dtype;
  right_rows.rows = rows;
  right_rows.cols = outputs;
  right_rows.stride = right.stride;
  const Tiles tiles(swapped ? k : n);
  const std::int64_t column_step = column_block(outputs, kColumnBlock);
  for (std::int64_t column = 0; column < outputs; column += column_step) {
    const Panels<T> panels{smaller(column_step, outputs - column)};
    auto* c = static_cast<T*>(dw.data) + (swapped ? column * dw.stride : column);
    const Target<T> target{c, dw.stride, TileStart::Add, swapped};
    for (std::int64_t row = 0; row < rows; row += kGradientTile) {
      const std::int64_t depth = smaller(kGradientTile, rows - row);
      const std::int64_t pieces = quotient_up(depth, kRowsPerPackingTask);
      const std::int64_t groups = quotient_up(panels.columns, kGroupColumns);
      const auto pack = [&](std::int64_t task, int) {
        if (task >= groups * pieces) {
          const std::int64_t tile = task - groups * pieces;
          pack_column_tile<T>(left, tiles.begin(tile), tiles.size(tile), row, depth, left_alpha,
                              a + tiles.begin(tile) * depth);
        } else {
          const std::int64_t k0 = task % pieces * kRowsPerPackingTask;
          pack_group_of_columns(right_rows, column, panels, task / pieces * kGroupColumns, row, k0,
                                smaller(k0 + kRowsPerPackingTask, depth), depth, right_alpha, b);
        }
      };
      context.pool.parallel_for(groups * pieces + tiles.count, pack);
      compute_pass<T>(context.pool, tiles, panels, depth, a, b, target);
    }
  }
}

}  // namespace

void multiply_terms(const GemmContext& context, WeightUse use, std::int64_t rows, const Term* terms,
                    int term_count, Matrix y, Output output, const ScratchParts& parts) {
  const bool is_double = terms[0].x.dtype == DType::F64;
  if (rows <= kFewRows) {
    (is_double ? multiply_few<double> : multiply_few<float>)(context, use, rows, terms, term_count,
                                                             y, output);
  } else {
    (is_double ? multiply_many<double> : multiply_many<float>)(context, use, rows, terms,
                                                               term_count, y, output, parts);
  }
}

void gradient_tiles(const GemmContext& context, std::int64_t rows, std::int64_t n, std::int64_t k,
                    ConstMatrix dy, ConstMatrix x, double alpha, Matrix dw) {
  (dw.dtype == DType::F64 ? gradient<double> : gradient<float>)(context, rows, n, k, dy, x, alpha,
                                                                dw);
}

}  // namespace nibble::cpu::NIBBLE_ISA

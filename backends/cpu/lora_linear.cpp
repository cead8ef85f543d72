// A linear layer with its adapter; the formulas are in engine/ops/lora_linear.cpp.
//
//   forward   u = drop(x) A^T, then y = [x | u] [W | B]^T as one product of two terms; recomputing
//             y is the second half alone
//   dx        without dropout [dy | du] [W ; A], one product; with dropout du A is masked first and
//             dy W accumulated on top, in F32, before the only rounding
//   dA        acc += du^T drop(x)
//
// drop(x) exists for 512 rows at a time, in scratch behind the products' own. A row's result does
// not depend on the rows beside it, and gradients are summed in tiles of 512 rows anyway, so the
// chunks change no bit. A longer chunk would save nothing: A is small, and W is decoded again per
// chunk only in dx of BF16 with dropout, once per 512 rows.
#include "backends/cpu/dropout.h"
#include "backends/cpu/gemm_call.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kChunk = kGradientTile;

std::int64_t chunk_rows(std::int64_t rows) { return rows < kChunk ? rows : kChunk; }

ConstMatrix rows_from(ConstMatrix m, std::int64_t row) {
  m.data = static_cast<const std::byte*>(m.data) + row * m.stride * info(m.dtype).block_bytes;
  return m;
}
Matrix rows_from(Matrix m, std::int64_t row) {
  m.data = static_cast<std::byte*>(m.data) + row * m.stride * info(m.dtype).block_bytes;
  return m;
}
ConstMatrix as_const(Matrix m) { return {m.data, m.dtype, m.stride}; }

// The dropout of one call: which numbers, and what kept elements are scaled by.
struct Dropout {
  float p = 0;
  double keep_scale = 1;
  DropoutKey key{};
  std::uint32_t threshold = 0;
  const std::int32_t* ordinal = nullptr;

  // `first`: the input that holds rng; the ordinals follow.
  Dropout(const OpCall& call, int first) {
    const auto params = call.node->get<LoraParams>();
    if (params.dropout == 0) return;
    p = params.dropout;
    keep_scale = 1 / (1 - static_cast<double>(p));
    const auto* rng = call.input<std::int64_t>(first);
    key = {static_cast<std::uint64_t>(rng[0]), static_cast<std::uint32_t>(rng[1]),
           static_cast<std::uint32_t>(params.adapter)};
    threshold = dropout_threshold(p);
    ordinal = call.input<std::int32_t>(first + 1);
  }

  // Rows [begin, begin + rows) of x with the dropped elements zero, as the first rows of `to`.
  void drop(ThreadPool& pool, std::int64_t begin, std::int64_t rows, std::int64_t cols,
            ConstMatrix x, Matrix to) const {
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      pool.parallel_for(rows, [&](std::int64_t row, int) {
        drop_row(key, threshold, static_cast<std::uint32_t>(ordinal[begin + row]), cols,
                 static_cast<const T*>(x.data) + (begin + row) * x.stride,
                 static_cast<T*>(to.data) + row * to.stride);
      });
    });
  }
};

// Scratch: the products' own bytes, then a chunk of rows.
struct Layout {
  std::int64_t gemm = 0, chunk = 0;
  std::int64_t chunk_offset() const { return round_up(gemm, 64); }
  std::int64_t bytes() const { return chunk_offset() + chunk; }
};

// What products over chunks of `rows` rows need: a whole chunk, or the rest at the end, which may
// take a path that wants more. `need` maps rows to bytes.
template <class Need>
std::int64_t largest_over_chunks(std::int64_t rows, const Need& need) {
  const std::int64_t whole = need(chunk_rows(rows));
  const std::int64_t rest = rows % kChunk == 0 ? 0 : need(rows % kChunk);
  return whole > rest ? whole : rest;
}

std::int64_t chunk_bytes(DType dtype, std::int64_t rows, std::int64_t cols) {
  return chunk_rows(rows) * cols * info(dtype).block_bytes;
}

Matrix chunk_matrix(const OpCall& call, const Layout& layout, DType dtype, std::int64_t cols) {
  return {static_cast<std::byte*>(call.scratch) + layout.chunk_offset(), dtype, cols};
}

// -- y and u -----------------------------------------------------------------------------------

Layout layout(const OpCall& call) {
  const DType d = call.in_types[0].dtype;
  const Shape& x = call.in_types[0].shape;
  const std::int64_t outer = call.in_types[1].shape[0], rank = call.in_types[2].shape[0];
  const bool drops = call.node->get<LoraParams>().dropout > 0;
  const auto down_bytes = [&](std::int64_t rows) {
    return multiply_scratch_bytes(d, d, rows, rank, x[1]);
  };
  const std::int64_t down = drops ? largest_over_chunks(x[0], down_bytes) : down_bytes(x[0]);
  const std::int64_t both = multiply_scratch_bytes(d, d, x[0], outer, x[1] + rank);
  return {down > both ? down : both, drops ? chunk_bytes(d, x[0], x[1]) : 0};
}

bool supports(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype) &&
         can_decode(call.in_types[2].dtype) && can_decode(call.in_types[3].dtype);
}

void run(const OpCall& call, ThreadPool& pool) {
  const Layout memory = layout(call);
  const GemmContext context = gemm_context(call, pool, memory.gemm);
  const std::int64_t rows = call.in_types[0].shape[0], inner = call.in_types[0].shape[1];
  const ConstMatrix x = input_matrix(call, 0);
  const StoredMatrix a = input_weight(call, 2);
  const Matrix u = output_matrix(call, 1);
  const Dropout dropout(call, 4);
  if (dropout.p == 0) {
    const Term down{x, a, 1};
    multiply(context, WeightUse::Transposed, rows, {&down, 1}, u);
  } else {
    const Matrix dropped = chunk_matrix(call, memory, x.dtype, inner);
    for (std::int64_t begin = 0; begin < rows; begin += kChunk) {
      const std::int64_t n = chunk_rows(rows - begin);
      dropout.drop(pool, begin, n, inner, x, dropped);
      const Term down{as_const(dropped), a, dropout.keep_scale};
      multiply(context, WeightUse::Transposed, n, {&down, 1}, rows_from(u, begin));
    }
  }
  const Term terms[2] = {{x, input_weight(call, 1), 1},
                         {as_const(u), input_weight(call, 3), call.node->get<LoraParams>().scale}};
  multiply(context, WeightUse::Transposed, rows, terms, output_matrix(call, 0));
}

// -- y from a stored u ---------------------------------------------------------------------------

std::int64_t scratch_y(const OpCall& call, int) {
  const DType d = call.in_types[0].dtype;
  const Shape &x = call.in_types[0].shape, &b = call.in_types[3].shape;
  return multiply_scratch_bytes(d, d, x[0], b[0], x[1] + b[1]);
}

bool supports_y(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype) &&
         can_decode(call.in_types[3].dtype);
}

void run_y(const OpCall& call, ThreadPool& pool) {
  const GemmContext context = gemm_context(call, pool, scratch_y(call, pool.threads()));
  const Term terms[2] = {
      {input_matrix(call, 0), input_weight(call, 1), 1},
      {input_matrix(call, 2), input_weight(call, 3), call.node->get<LoraParams>().scale}};
  multiply(context, WeightUse::Transposed, call.in_types[0].shape[0], terms,
           output_matrix(call, 0));
}

// -- dx ----------------------------------------------------------------------------------------

// The type that dx is summed in with dropout.
DType sum_type(DType d) { return d == DType::F64 ? DType::F64 : DType::F32; }

Layout layout_dx(const OpCall& call) {
  const DType d = call.in_types[0].dtype;
  const Shape &dy = call.in_types[0].shape, &du = call.in_types[2].shape;
  const std::int64_t inner = call.out_types[0].shape[1];
  if (call.node->get<LoraParams>().dropout == 0) {
    return {multiply_scratch_bytes(d, d, dy[0], inner, dy[1] + du[1]), 0};
  }
  // Sums go straight to dx where its type holds them; then all rows are one chunk.
  const DType sum = sum_type(d);
  const auto bytes = [&](std::int64_t rows) {
    const std::int64_t base = multiply_scratch_bytes(d, sum, rows, inner, dy[1]);
    const std::int64_t low_rank = multiply_scratch_bytes(d, sum, rows, inner, du[1]);
    return base > low_rank ? base : low_rank;
  };
  if (sum == d) return {bytes(dy[0]), 0};
  return {largest_over_chunks(dy[0], bytes), chunk_bytes(sum, dy[0], inner)};
}

void store_chunk(ThreadPool& pool, std::int64_t rows, std::int64_t cols, Matrix from, bf16* to) {
  const auto* sums = static_cast<const float*>(from.data);
  pool.parallel_for(rows, [&](std::int64_t row, int) {
    for_vectors<bf16>(cols, [&](std::int64_t i, auto lanes) {
      store(to + row * cols + i, load(sums + row * cols + i, lanes), lanes);
    });
  });
}

void run_dx(const OpCall& call, ThreadPool& pool) {
  const Layout memory = layout_dx(call);
  const GemmContext context = gemm_context(call, pool, memory.gemm);
  const std::int64_t rows = call.in_types[0].shape[0], inner = call.out_types[0].shape[1];
  const ConstMatrix dy = input_matrix(call, 0), du = input_matrix(call, 2);
  const StoredMatrix w = input_weight(call, 1), a = input_weight(call, 3);
  const Matrix dx = output_matrix(call, 0);
  const Dropout dropout(call, 4);
  if (dropout.p == 0) {
    const Term terms[2] = {{dy, w, 1}, {du, a, 1}};
    multiply(context, WeightUse::Plain, rows, terms, dx);
    return;
  }
  const DType sum = sum_type(dx.dtype);
  const bool direct = sum == dx.dtype;
  const std::int64_t step = direct ? rows : kChunk;
  for (std::int64_t begin = 0; begin < rows; begin += step) {
    const std::int64_t n = rows - begin < step ? rows - begin : step;
    const Matrix sums = direct ? dx : chunk_matrix(call, memory, sum, inner);
    const Term low_rank{rows_from(du, begin), a, dropout.keep_scale};
    multiply(context, WeightUse::Plain, n, {&low_rank, 1}, sums);
    Dropout chunk = dropout;
    chunk.ordinal += begin;
    chunk.drop(pool, 0, n, inner, as_const(sums), sums);
    const Term base{rows_from(dy, begin), w, 1};
    multiply(context, WeightUse::Plain, n, {&base, 1}, sums, Output::Accumulate);
    if (!direct) store_chunk(pool, n, inner, sums, static_cast<bf16*>(dx.data) + begin * inner);
  }
}

// -- dA ----------------------------------------------------------------------------------------

Layout layout_da(const OpCall& call) {
  const Shape &x = call.in_types[1].shape, &du = call.in_types[2].shape;
  const bool drops = call.node->get<LoraParams>().dropout > 0;
  const auto bytes = [&](std::int64_t rows) {
    return gradient_scratch_bytes(call.in_types[0].dtype, rows, du[1], x[1]);
  };
  if (!drops) return {bytes(x[0]), 0};
  return {largest_over_chunks(x[0], bytes), chunk_bytes(call.in_types[1].dtype, x[0], x[1])};
}

bool supports_da(const OpCall& call) {
  return accumulates(call.in_types[2].dtype, call.in_types[1].dtype, call.in_types[0].dtype);
}

void run_da(const OpCall& call, ThreadPool& pool) {
  const Layout memory = layout_da(call);
  const GemmContext context = gemm_context(call, pool, memory.gemm);
  const std::int64_t rows = call.in_types[1].shape[0], inner = call.in_types[1].shape[1];
  const std::int64_t rank = call.in_types[2].shape[1];
  const ConstMatrix x = input_matrix(call, 1), du = input_matrix(call, 2);
  const Matrix acc = output_matrix(call, 0);
  const Dropout dropout(call, 3);
  if (dropout.p == 0) {
    accumulate_gradient(context, rows, rank, inner, du, x, 1, acc);
    return;
  }
  const Matrix dropped = chunk_matrix(call, memory, x.dtype, inner);
  for (std::int64_t begin = 0; begin < rows; begin += kChunk) {
    const std::int64_t n = chunk_rows(rows - begin);
    dropout.drop(pool, begin, n, inner, x, dropped);
    accumulate_gradient(context, n, rank, inner, rows_from(du, begin), as_const(dropped),
                        dropout.keep_scale, acc);
  }
}

std::int64_t scratch(const OpCall& call, int) { return layout(call).bytes(); }
std::int64_t scratch_dx(const OpCall& call, int) { return layout_dx(call).bytes(); }
std::int64_t scratch_da(const OpCall& call, int) { return layout_da(call).bytes(); }

}  // namespace

extern const Kernel lora_linear_kernel{supports, scratch, run};
extern const Kernel lora_linear_y_kernel{supports_y, scratch_y, run_y};
extern const Kernel lora_linear_dx_kernel{supports, scratch_dx, run_dx};
extern const Kernel lora_linear_da_kernel{supports_da, scratch_da, run_da};

}  // namespace nibble::cpu::NIBBLE_ISA

// The public entry points of the products: checks, then the driver of the instruction set.
#include "backends/cpu/gemm.h"

#include <algorithm>

#include <string>

#include "backends/cpu/gemm_blocking.h"
#include "engine/error.h"

namespace nibble::cpu {

NIBBLE_PER_ISA(void multiply_terms(const GemmContext& context, WeightUse use, std::int64_t rows,
                                   const Term* terms, int term_count, Matrix y, Output output,
                                   const ScratchParts& parts);
               void gradient_tiles(const GemmContext& context, std::int64_t rows, std::int64_t n,
                                   std::int64_t k, ConstMatrix dy, ConstMatrix x, double alpha,
                                   Matrix dw);)

namespace {

std::int64_t inner_of(WeightUse use, const StoredMatrix& w) {
  return use == WeightUse::Transposed ? w.cols : w.rows;
}

std::int64_t outputs_of(WeightUse use, const StoredMatrix& w) {
  return use == WeightUse::Transposed ? w.rows : w.cols;
}

bool is_f32_or_bf16(DType dtype) { return dtype == DType::F32 || dtype == DType::BF16; }

void check_dtypes(const char* where, DType in, DType out) {
  const bool narrow = is_f32_or_bf16(in) && is_f32_or_bf16(out);
  if (!narrow && (in != DType::F64 || out != DType::F64)) {
    throw Unsupported(std::string(where) + " on the CPU from " + std::string(name(in)) + " to " +
                      std::string(name(out)) +
                      ": F32 and BF16 go together, F64 goes with F64; cast one of them");
  }
}

void check_scratch(const char* where, const GemmContext& context, std::int64_t needed) {
  const auto given = static_cast<std::int64_t>(context.scratch.size());
  if (given < needed || reinterpret_cast<std::uintptr_t>(context.scratch.data()) % 64 != 0) {
    throw Error(std::string(where) + ": " + std::to_string(given) + " bytes of scratch at " +
                "an address modulo 64 of " +
                std::to_string(reinterpret_cast<std::uintptr_t>(context.scratch.data()) % 64) +
                "; want " + std::to_string(needed) + " bytes aligned to 64");
  }
}

}  // namespace

std::int64_t multiply_scratch_bytes(DType x, DType y, std::int64_t rows, std::int64_t outputs,
                                    std::int64_t inner) {
  // Few rows are packed over the whole reduction, more of them block by block: the fewest rows of
  // the second kind may need less than the most rows of the first.
  return std::max(multiply_parts(x, y, rows, outputs, inner).bytes,
                  multiply_parts(x, y, std::min(rows, kFewRows), outputs, inner).bytes);
}

std::int64_t gradient_scratch_bytes(DType dw, std::int64_t rows, std::int64_t n, std::int64_t k) {
  return gradient_parts(dw, rows, n, k).bytes;
}

void multiply(const GemmContext& context, WeightUse use, std::int64_t rows,
              std::span<const Term> terms, Matrix y, Output output) {
  if (terms.empty()) throw ShapeError("multiply: no terms; give one or two");
  const std::int64_t outputs = outputs_of(use, terms[0].weight);
  std::int64_t inner = 0;
  for (const Term& term : terms) {
    check_dtypes("multiply", term.x.dtype, y.dtype);
    if (term.x.dtype != terms[0].x.dtype) {
      throw Unsupported("multiply: terms of " + std::string(name(terms[0].x.dtype)) + " and " +
                        std::string(name(term.x.dtype)) + " activations; give both the same type");
    }
    if (outputs_of(use, term.weight) != outputs) {
      throw ShapeError("multiply: terms of " + std::to_string(outputs) + " and " +
                       std::to_string(outputs_of(use, term.weight)) +
                       " outputs; their weights must give the same number");
    }
    if (inner_of(use, term.weight) <= 0) {
      throw ShapeError("multiply: a term sums over no elements; leave it out");
    }
    inner += inner_of(use, term.weight);
  }
  if (output == Output::Accumulate && y.dtype == DType::BF16) {
    throw Unsupported("multiply: accumulating into BF16 rounds more than once; use F32");
  }
  const ScratchParts parts = multiply_parts(terms[0].x.dtype, y.dtype, rows, outputs, inner);
  check_scratch("multiply", context, parts.bytes);
  if (rows <= 0 || outputs <= 0) return;
  NIBBLE_PICK(context.isa, multiply_terms)
  (context, use, rows, terms.data(), static_cast<int>(terms.size()), y, output, parts);
}

void accumulate_gradient(const GemmContext& context, std::int64_t rows, std::int64_t n,
                         std::int64_t k, ConstMatrix dy, ConstMatrix x, double alpha, Matrix dw) {
  check_dtypes("accumulate_gradient", dy.dtype, dw.dtype);
  check_dtypes("accumulate_gradient", x.dtype, dw.dtype);
  if (dw.dtype == DType::BF16) {
    throw Unsupported("accumulate_gradient: BF16 sums lose small terms; gradients are F32");
  }
  check_scratch("accumulate_gradient", context, gradient_parts(dw.dtype, rows, n, k).bytes);
  if (rows <= 0 || n <= 0 || k <= 0) return;
  NIBBLE_PICK(context.isa, gradient_tiles)(context, rows, n, k, dy, x, alpha, dw);
}

}  // namespace nibble::cpu

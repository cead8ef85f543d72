// The functions that append ops to a graph, and the parameter struct of each op.
//
// Conventions. Rows are tokens: an activation is [T, C] with C fastest. Activations have the
// graph's compute dtype; "stat" below means F32 (F64 in an F64 graph). Weights are [out, in] in any
// storage type. Every element is computed in F32 (F64 in F64) and rounded once when it is stored.
// Functions named *_dw, *_da take the accumulator they add to first and return its new version;
// sums over tokens run in tiles of 512 rows, in order: acc = acc + tile_sum.
#pragma once

#include "engine/graph.h"

namespace nibble {

// -- Table lookups -----------------------------------------------------------------------------

struct EmbeddingParams {
  DType out;
};
// y[t] = table[ids[t]]; table [V, C] in any storage type, ids I32 [T] in [0, V).
// y: [T, C] of the compute dtype. Also picks rows of an activation.
Tensor embedding(Tensor ids, Tensor table);
// acc[ids[t]] += dy[t], t ascending. acc: stat [V, C].
Tensor embedding_dw(Tensor acc, Tensor ids, Tensor dy);

// -- Normalization -----------------------------------------------------------------------------

struct RmsNormParams {
  float eps;
};
// y = x * rsqrt(mean(x^2) + eps) * w; x [T, C], w [C].
Tensor rms_norm(Tensor x, Tensor w, float eps);
// dx of rms_norm for upstream dy.
Tensor rms_norm_dx(Tensor x, Tensor w, Tensor dy, float eps);
// acc[c] += sum over t of dy * x * rsqrt(...). acc: stat [C].
Tensor rms_norm_dw(Tensor acc, Tensor x, Tensor dy, float eps);

// -- Linear layers -----------------------------------------------------------------------------

struct LinearParams {
  float scale;
  DType out;
};
// y = scale * x W^T; x [T, in], W [out, in], y [T, out]. `out` is the dtype of y: the compute dtype
// or, for logits, stat.
Tensor linear(Tensor x, Tensor w, float scale = 1.0f);
Tensor linear_stat(Tensor x, Tensor w);
// dx = scale * dy W; dy [T, out].
Tensor linear_dx(Tensor dy, Tensor w, float scale = 1.0f);
// acc += scale * dy^T x; acc: stat [out, in].
Tensor linear_dw(Tensor acc, Tensor x, Tensor dy, float scale = 1.0f);

// A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685):
//   u = drop(x) A^T, y = x W^T + scale * u B^T
// with W [out, in] frozen, A [r, in], B [out, r]. Two outputs: 0 is y, 1 is u [T, r] (compute
// dtype; y is computed from the rounded u). With dropout p > 0 element (t, c) of x is kept iff
// uniform(philox(rng[0], {rng[1], adapter, ordinal[t], c / 4})[c % 4]) >= p, and scaled by
// 1/(1-p); rng is I64 [2] = {seed, optimizer step}, ordinal I32 [T]. Nothing is stored: the
// gradients draw the same numbers.
struct LoraParams {
  float scale;
  float dropout;
  std::int32_t adapter;  // number of the adapter in the model
};
struct LoraDropout {
  float p = 0;
  std::int32_t adapter = 0;
  Tensor rng, ordinal;  // unused when p == 0
};
Tensor lora_linear(Tensor x, Tensor w, Tensor a, Tensor b, float scale,
                   const LoraDropout& dropout = {});
// y of lora_linear from its stored u: what recomputing it takes.
Tensor lora_linear_y(Tensor x, Tensor w, Tensor u, Tensor b, float scale);
// dx = dy W + mask * (du A) / (1 - p); du [T, r].
Tensor lora_linear_dx(Tensor dy, Tensor w, Tensor du, Tensor a, const LoraDropout& dropout = {});
// acc += du^T drop(x); acc: stat [r, in].
Tensor lora_linear_da(Tensor acc, Tensor x, Tensor du, const LoraDropout& dropout = {});

// -- Attention ---------------------------------------------------------------------------------

enum class RopePairs : std::int32_t { half, adjacent };  // (i, i + d/2) or (2i, 2i + 1)
struct RopeParams {
  std::int32_t head_dim;
  RopePairs pairs;
  float direction;  // +1 rotates by the angle, -1 back (the gradient)
};
// Rotates each pair of every head of x [T, heads * head_dim] by positions[t] * frequencies[i];
// frequencies: stat [head_dim / 2], positions I32 [T].
Tensor rope(Tensor x, Tensor positions, Tensor frequencies, std::int32_t head_dim, RopePairs pairs,
            float direction = 1.0f);

struct AttentionParams {
  std::int32_t head_dim;
  float scale;         // usually head_dim^-0.5
  float soft_cap = 0;  // above 0: a score s becomes soft_cap * tanh(s / soft_cap)
};
// Causal attention within documents: row t sees keys span_begin[t] .. t, and span_begin never falls
// from row to row. With a sliding window it is max(document, t + 1 - window).
// q [T, heads * head_dim], k and v [T, kv_heads * head_dim]; query head h reads kv head
// h / (heads / kv_heads).
// Output 0: o, like q. Output 1: log-sum-exp of the scores, stat [T, heads].
Tensor attention(Tensor q, Tensor k, Tensor v, Tensor span_begin, const AttentionParams& params);
// Outputs dq, dk, dv. Deterministic: sums run over queries in ascending order.
Tensor attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor dy,
                          Tensor span_begin, const AttentionParams& params);

struct KvAppendParams {
  std::int32_t head_dim;
};
// cache[h, position + t, :] = x[t, h, :] for t in [0, T); cache: state, compute dtype,
// [kv_heads, context, head_dim]; x [T, kv_heads * head_dim]; position I32 [1]. Returns the cache.
Tensor kv_append(Tensor cache, Tensor x, Tensor position, std::int32_t head_dim);
// Row t of q has position `position + t` and sees cache rows 0 .. position + t.
Tensor attention_cached(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position,
                        const AttentionParams& params);

// -- Elementwise -------------------------------------------------------------------------------

// y = gate * sigmoid(gate) * up.
Tensor swiglu(Tensor gate, Tensor up);
// Outputs dgate, dup.
Tensor swiglu_backward(Tensor gate, Tensor up, Tensor dy);
// y = a + b, same shape and dtype.
Tensor add(Tensor a, Tensor b);

// Some rows of a whole.
struct RowsParams {
  std::int64_t first, count;
};
// y = x[first .. first + count), for x [T, C] or [T] of the compute dtype, stat or I32: a copy.
Tensor slice_rows(Tensor x, std::int64_t first, std::int64_t count);
// y = a, but for rows [first, first + R), to which b is added; a [T, C], b [R, C] of its dtype.
Tensor add_rows(Tensor a, Tensor b, std::int64_t first);

// y = x * factor[0]; factor: stat [1], a constant for the gradient.
Tensor scale(Tensor x, Tensor factor);

struct FillParams {
  double value;
  std::array<std::int64_t, 4> extents;
  std::int32_t rank;
  DType dtype;
};
// A constant of type F64, F32 or BF16.
Tensor fill(Graph& graph, const TensorType& type, double value);
// acc += x; acc: stat, x the compute dtype or stat, same shape.
Tensor accumulate(Tensor acc, Tensor x);

// -- Loss --------------------------------------------------------------------------------------

// Cross-entropy of logits = x W^T over the rows that have a label, without ever holding the logits
// of more than a chunk of rows. x [T, C], W [V, C], labels I32 [T], loss_rows I32 [R]: the rows to
// score, padded with -1.
// Outputs: 0 the sum of the losses, stat [1]; 1 the loss of each entry of loss_rows, stat [R] (0
// for padding); 2, only with `keep_dx`, d(sum)/dx, [T, C] of the compute dtype, rows without a
// label zero. Without keep_dx the node is not differentiable in x.
// `chunk_rows`, a multiple of 512: the most rows of a chunk; 0: what the backend takes for fastest.
// It changes the scratch, and no bit of the result.
struct CrossEntropyParams {
  std::int32_t keep_dx;
  std::int32_t chunk_rows;
};
Tensor linear_cross_entropy(Tensor x, Tensor w, Tensor labels, Tensor loss_rows, bool keep_dx,
                            std::int64_t chunk_rows = 0);
// acc += dlogits^T x, for an upstream gradient `dloss`, stat [1]. acc: stat [V, C].
Tensor linear_cross_entropy_dw(Tensor acc, Tensor x, Tensor w, Tensor labels, Tensor loss_rows,
                               Tensor dloss, std::int64_t chunk_rows = 0);

// -- Generation --------------------------------------------------------------------------------

struct ChooseTokenParams {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1, min_p = 0;
  std::int64_t top_k = 0;  // 0: all
};
// The next token from logits, stat [1, V]; rng: I64 [2] = {key, number of the draw}. Outputs: 0 the
// id, I32 [1], -1 when a logit is not finite; 1 its log-probability under the unmodified
// distribution, natural log, stat [1].
Tensor choose_token(Tensor logits, Tensor rng, const ChooseTokenParams& params);

// -- Optimizer ---------------------------------------------------------------------------------

// acc[0] += sum of (x * x) over all elements, in blocks of 4096 elements, each summed in F64.
// acc: F64 [1] whatever the compute dtype. x: stat.
Tensor sum_squares(Tensor acc, Tensor x);

// One AdamW step (arXiv 1711.05101; PyTorch's order: decay first) over n elements of the flat
// arrays. master, m, v, grad: stat [n], n a multiple of 4096; block_table: stat [n / 4096, 2]
// = {lr scale, weight decay} per 4096 elements. scalars: stat [8] =
//   {lr, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t, 1 / tokens, clip norm (0: none)};
// norm: F64 [1], the sum of squares of the unscaled gradients. With g = grad / tokens * coef,
// coef = min(1, clip / (sqrt(norm) / tokens + 1e-6)):
//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr_b * decay_b) - lr_b * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
// Updates master (output 0); m and v are updated in place as well; grad is cleared.
Tensor adamw(Tensor master, Tensor m, Tensor v, Tensor grad, Tensor block_table, Tensor scalars,
             Tensor norm);

// Bytes of 4096 elements of a moment in 8 bits: their codes, then one F32 absmax per 256 of them.
inline constexpr std::int64_t kMomentBlockBytes = 4096 + 4096 / 256 * 4;
// adamw with moments in 8 bits: m and v are U8 [n / 4096 * kMomentBlockBytes]. All zero bytes are
// moments of zero. An element whose gradient is not finite keeps its master and loses its moments.
Tensor adamw8bit(Tensor master, Tensor m, Tensor v, Tensor grad, Tensor block_table, Tensor scalars,
                 Tensor norm);

// target = x rounded to the target's dtype; target: a state. Returns its new version. Both are F64,
// F32 or BF16.
Tensor convert(Tensor target, Tensor x);

// -- Paging ------------------------------------------------------------------------------------

// A copy of `page`, a leaf in host memory (Backend::allocate_host), of any type, in the arena.
Tensor page_in(Tensor page);
// page = x, of the same type. Returns the page's new version.
Tensor page_out(Tensor page, Tensor x);

}  // namespace nibble

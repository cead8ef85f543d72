// A llama-like training program of any size for tests of the engine: decoder blocks of frozen
// weights with LoRA on every linear, grouped-query attention, the loss of every row, and the
// backward pass. Leaves have GGUF-like names; llama_feeds() has values for the small ones.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/autograd.h"
#include "engine/ops.h"
#include "engine/philox.h"

namespace nibble {

struct LlamaShape {
  std::int64_t rows = 6, layers = 2, heads = 4, kv_heads = 2, head_dim = 4, ffn = 24,
               vocabulary = 11;
  std::int64_t rank = 2;
  DType compute = DType::F64;
  DType weights = DType::F64;
  Rung rung = Rung::store;
  std::int64_t channels() const { return heads * head_dim; }
};

struct LlamaGraph {
  std::unique_ptr<Graph> graph;
  Tensor loss;
  Backward backward;
  std::int32_t forward_nodes = 0;
};

class LlamaBuilder {
 public:
  LlamaBuilder(const LlamaShape& shape, Graph& graph) : s_(shape), g_(graph) {}

  Tensor loss() {
    const TensorType index{DType::I32, {s_.rows}, {}};
    positions_ = g_.input("positions", index);
    span_begin_ = g_.input("span_begin", index);
    frequencies_ = g_.weight("rope_frequencies", {g_.accumulate(), {s_.head_dim / 2}, {}});
    Tensor x =
        embedding(g_.input("tokens", index), weight("token_embd", s_.vocabulary, s_.channels()));
    for (std::int64_t b = 0; b < s_.layers; ++b) {
      g_.begin_segment(s_.rung);
      x = block(x, "blk." + std::to_string(b) + ".");
      g_.end_segment();
    }
    x = rms_norm(x, norm("output_norm"), kEps);
    return linear_cross_entropy(x, weight("output", s_.vocabulary, s_.channels()),
                                g_.input("labels", index), g_.input("loss_rows", index),
                                /*keep_dx=*/true);
  }

 private:
  static constexpr float kEps = 1e-5f;

  Tensor weight(const std::string& name, std::int64_t rows, std::int64_t cols) {
    return g_.weight(name + ".weight", {s_.weights, {rows, cols}, {}});
  }
  Tensor norm(const std::string& name) {
    return g_.weight(name + ".weight", {g_.accumulate(), {s_.channels()}, {}});
  }
  Tensor adapted(Tensor x, const std::string& name, std::int64_t out) {
    const std::int64_t in = x.shape()[1];
    const Tensor a = g_.parameter(name + ".lora_a", {s_.compute, {s_.rank, in}, {}});
    const Tensor b = g_.parameter(name + ".lora_b", {s_.compute, {out, s_.rank}, {}});
    return lora_linear(x, weight(name, out, in), a, b, 0.5f);
  }
  Tensor block(Tensor x, const std::string& name) {
    const auto d = static_cast<std::int32_t>(s_.head_dim);
    const Tensor n = rms_norm(x, norm(name + "attn_norm"), kEps);
    const auto turned = [&](Tensor t) {
      return rope(t, positions_, frequencies_, d, RopePairs::half);
    };
    const Tensor plain_q = adapted(n, name + "attn_q", s_.channels());
    const Tensor plain_k = adapted(n, name + "attn_k", s_.kv_heads * d);
    const Tensor v = adapted(n, name + "attn_v", s_.kv_heads * d);
    const Tensor q = turned(plain_q), k = turned(plain_k);
    const Tensor o = attention(q, k, v, span_begin_, {d, 1 / std::sqrt(static_cast<float>(d))});
    const Tensor h = add(x, adapted(o, name + "attn_output", s_.channels()));
    const Tensor m = rms_norm(h, norm(name + "ffn_norm"), kEps);
    const Tensor hidden =
        swiglu(adapted(m, name + "ffn_gate", s_.ffn), adapted(m, name + "ffn_up", s_.ffn));
    return add(h, adapted(hidden, name + "ffn_down", s_.channels()));
  }

  const LlamaShape& s_;
  Graph& g_;
  Tensor positions_, span_begin_, frequencies_;
};

// The loss is kept; every adapter has its gradient accumulator.
inline LlamaGraph llama_training(const LlamaShape& shape) {
  LlamaGraph llama{std::make_unique<Graph>(shape.compute), {}, {}, 0};
  Graph& g = *llama.graph;
  llama.loss = LlamaBuilder(shape, g).loss();
  g.keep(llama.loss);
  llama.forward_nodes = g.size();
  const Seed seeds[] = {{llama.loss, fill(g, llama.loss.type(), 1)}};
  llama.backward = append_backward(g, seeds);
  return llama;
}

// Values for every leaf but the states: two documents, every row but their last has a label.
inline std::map<std::string, std::vector<double>> llama_feeds(const Graph& graph) {
  std::map<std::string, std::vector<double>> feeds;
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    const Node& node = graph.node(id);
    if (node.kind == NodeKind::op || node.kind == NodeKind::state) continue;
    const std::string& name = graph.name(id);
    const auto count = static_cast<std::size_t>(node.outputs[0].elements());
    std::vector<double>& values = feeds[name];
    values.resize(count);
    const std::size_t split = count / 2;  // where the second document begins
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t first = i < split ? 0 : split;
      const bool last = i + 1 == split || i + 1 == count;
      if (name == "tokens") {
        values[i] = static_cast<double>(i * 7 % 11);
      } else if (name == "positions") {
        values[i] = static_cast<double>(i - first);
      } else if (name == "span_begin") {
        values[i] = static_cast<double>(first);
      } else if (name == "labels") {
        values[i] = last ? -1 : static_cast<double>((i + 1) * 7 % 11);
      } else if (name == "loss_rows") {
        values[i] = last ? -1 : static_cast<double>(i);
      } else {
        const bool is_norm = name.find("norm") != std::string::npos;
        const auto n = static_cast<double>(philox_normal(7, hash_name(name), i));
        values[i] = is_norm ? 1 + 0.1 * n : 0.4 * n;
      }
    }
  }
  return feeds;
}

}  // namespace nibble

// The name map is a table of block members and of whole-model members; both directions walk it.
// Source: llama.cpp gguf-py/gguf/tensor_mapping.py and LlamaModel.permute in convert_hf_to_gguf.py.
#include "gguf-convert/names.h"

#include <algorithm>
#include <cassert>
#include <cctype>
#include <utility>

namespace nibble {
namespace {

struct Pair {
  std::string_view gguf, hf;
};

constexpr Pair kModel[] = {
    {"token_embd", "model.embed_tokens"}, {"output_norm", "model.norm"}, {"output", "lm_head"}};

constexpr Pair kBlock[] = {
    {"attn_norm", "input_layernorm"},    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},      {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"}, {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"}};

constexpr std::string_view kWeight = ".weight";

bool take_prefix(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

bool take_suffix(std::string_view& text, std::string_view suffix) {
  if (text.size() < suffix.size() || text.substr(text.size() - suffix.size()) != suffix) {
    return false;
  }
  text.remove_suffix(suffix.size());
  return true;
}

// "12.attn_q" -> "12", text becomes "attn_q". Leading zeros are refused: they have no way back.
std::optional<std::string_view> take_number(std::string_view& text) {
  const std::size_t dot = text.find('.');
  if (dot == std::string_view::npos || dot == 0 || dot > 6) return std::nullopt;
  const std::string_view number = text.substr(0, dot);
  const bool digits = std::all_of(number.begin(), number.end(),
                                  [](unsigned char c) { return std::isdigit(c) != 0; });
  if (!digits || (number.size() > 1 && number[0] == '0')) return std::nullopt;
  text.remove_prefix(dot + 1);
  return number;
}

using Side = std::string_view Pair::*;

std::optional<std::string> translate(std::string_view name, Side from, Side to,
                                     std::string_view from_block, std::string_view to_block) {
  const std::string_view suffix = take_suffix(name, kWeight) ? kWeight : "";
  if (!take_prefix(name, from_block)) {
    for (const Pair& pair : kModel) {
      if (pair.*from == name) return std::string(pair.*to).append(suffix);
    }
    return std::nullopt;
  }
  const auto number = take_number(name);
  if (!number) return std::nullopt;
  for (const Pair& pair : kBlock) {
    if (pair.*from == name) {
      return std::string(to_block).append(*number).append(".").append(pair.*to).append(suffix);
    }
  }
  return std::nullopt;
}

// "blk.3.attn_q.weight" -> "attn_q"; empty outside blocks.
std::string_view member_of(std::string_view name) {
  take_suffix(name, kWeight);
  if (!take_prefix(name, "blk.") || !take_number(name)) return {};
  return name;
}

}  // namespace

std::vector<TensorSpec> model_tensors(const ModelConfig& config) {
  const std::int64_t hidden = config.hidden, feed_forward = config.feed_forward;
  const std::int64_t q_rows = config.heads * config.head_dim;
  const std::int64_t kv_rows = config.kv_heads * config.head_dim;
  std::vector<TensorSpec> specs{{"token_embd.weight", {config.vocab, hidden}}};
  for (std::int64_t i = 0; i < config.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    specs.push_back({block + "attn_norm.weight", {hidden}});
    specs.push_back({block + "attn_q.weight", {q_rows, hidden}});
    specs.push_back({block + "attn_k.weight", {kv_rows, hidden}});
    specs.push_back({block + "attn_v.weight", {kv_rows, hidden}});
    specs.push_back({block + "attn_output.weight", {hidden, q_rows}});
    specs.push_back({block + "ffn_norm.weight", {hidden}});
    specs.push_back({block + "ffn_gate.weight", {feed_forward, hidden}});
    specs.push_back({block + "ffn_up.weight", {feed_forward, hidden}});
    specs.push_back({block + "ffn_down.weight", {hidden, feed_forward}});
  }
  specs.push_back({"output_norm.weight", {hidden}});
  if (!config.tied_embeddings) specs.push_back({"output.weight", {config.vocab, hidden}});
  return specs;
}

std::optional<std::string> hf_name(std::string_view gguf_name) {
  return translate(gguf_name, &Pair::gguf, &Pair::hf, "blk.", "model.layers.");
}

std::optional<std::string> gguf_name(std::string_view hf_name) {
  return translate(hf_name, &Pair::hf, &Pair::gguf, "model.layers.", "blk.");
}

bool is_decoder_linear(std::string_view gguf_name) {
  const std::string_view member = member_of(gguf_name);
  if (member.empty() || member == "attn_norm" || member == "ffn_norm") return false;
  return std::any_of(std::begin(kBlock), std::end(kBlock),
                     [&](const Pair& pair) { return pair.gguf == member; });
}

std::int64_t block_of(std::string_view gguf_name) {
  if (!take_prefix(gguf_name, "blk.")) return -1;
  const auto number = take_number(gguf_name);
  return number ? std::stoll(std::string(*number)) : -1;
}

bool has_rope_rows(std::string_view gguf_name) {
  const std::string_view member = member_of(gguf_name);
  return member == "attn_q" || member == "attn_k";
}

std::int64_t rope_source_row(std::int64_t row, std::int64_t head_dim, RopeStyle from,
                             RopeStyle to) {
  if (from == to) return row;
  const std::int64_t in_head = row % head_dim, head = row - in_head, half = head_dim / 2;
  if (to == RopeStyle::adjacent) return head + (in_head % 2) * half + in_head / 2;
  return head + 2 * (in_head % half) + in_head / half;
}

void reorder_rope_rows(std::span<const std::byte> in, std::span<std::byte> out,
                       std::int64_t row_bytes, std::int64_t head_dim, RopeStyle from,
                       RopeStyle to) {
  assert(in.size() == out.size() && row_bytes > 0);
  const auto rows = static_cast<std::int64_t>(in.size()) / row_bytes;
  assert(rows % head_dim == 0);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t source = rope_source_row(row, head_dim, from, to);
    std::copy_n(in.data() + source * row_bytes, row_bytes, out.data() + row * row_bytes);
  }
}

}  // namespace nibble

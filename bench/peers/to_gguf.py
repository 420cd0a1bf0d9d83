#!/usr/bin/env python3
"""GGUF of a DeepSeek-V3 model directory, so that llama.cpp can be measured on the very same weights.

usage: to_gguf.py LLAMA_CPP_DIR MODEL_DIR bf16|q8_0 OUT.gguf
Needs numpy and the gguf package that lies in LLAMA_CPP_DIR/gguf-py. FP8 weights are expanded with their scales first. MTP layers are
left out. Only for benchmarks: the pre-tokenizer is named by hand, chat templates are not carried over.
"""
import json
import pathlib
import sys

import numpy

sys.path.insert(0, sys.argv[1] + "/gguf-py")
import gguf  # noqa: E402


def read_safetensors(directory):
    """name -> (dtype, shape, bytes)"""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name.startswith("golden"):
            continue
        data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
        size = int(data[:8].view("<u8")[0])
        for name, entry in json.loads(bytes(data[8:8 + size])).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = (entry["dtype"], entry["shape"], data[8 + size + begin:8 + size + end])
    return tensors


def e4m3_table():
    code = numpy.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = numpy.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0**(exponent - 7.0))
    value = numpy.where((code & 127) == 127, numpy.nan, value)
    return numpy.where(code & 128, -value, value).astype(numpy.float32)


class Model:
    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = read_safetensors(directory)
        self.e4m3 = e4m3_table()

    def floats(self, name):
        dtype, shape, data = self.tensors[name]
        if dtype == "F32":
            return data.view(numpy.float32).reshape(shape)
        if dtype == "BF16":
            return (data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32).reshape(shape)
        assert dtype == "F8_E4M3", f"{name}: {dtype}"
        scale = self.floats(name + "_scale_inv").repeat(128, 0).repeat(128, 1)
        return self.e4m3[data].reshape(shape) * scale[:shape[0], :shape[1]]


def write_parameters(writer, c, directory):
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(c.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(c.get("rms_norm_eps", 1e-6))
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(c["kv_lora_rank"])
    writer.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    writer.add_value_length(c["kv_lora_rank"])
    writer.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_rope_dimension_count(c["qk_rope_head_dim"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])
    writer.add_expert_weights_scale(c.get("routed_scaling_factor", 2.5))
    writer.add_expert_weights_norm(c.get("norm_topk_prob", True))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(c["vocab_size"])]
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number] = text
    for entry in tokenizer.get("added_tokens", []):
        tokens[entry["id"]] = entry["content"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"].get("merges", [])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def write_tensors(writer, model, wide):
    c = model.config
    heads, nope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]

    def put(name, values, kind):
        values = numpy.ascontiguousarray(values, dtype=numpy.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name, source):
        writer.add_tensor(name, numpy.ascontiguousarray(model.floats(source), dtype=numpy.float32))

    def matrix(name, source):
        put(name, model.floats(source), wide)

    matrix("token_embd.weight", "model.embed_tokens.weight")
    matrix("output.weight", "lm_head.weight" if "lm_head.weight" in model.tensors else "model.embed_tokens.weight")
    norm("output_norm.weight", "model.norm.weight")
    for layer in range(c["num_hidden_layers"]):
        to, source = f"blk.{layer}.", f"model.layers.{layer}."
        norm(to + "attn_norm.weight", source + "input_layernorm.weight")
        norm(to + "ffn_norm.weight", source + "post_attention_layernorm.weight")
        norm(to + "attn_q_a_norm.weight", source + "self_attn.q_a_layernorm.weight")
        norm(to + "attn_kv_a_norm.weight", source + "self_attn.kv_a_layernorm.weight")
        matrix(to + "attn_q_a.weight", source + "self_attn.q_a_proj.weight")
        matrix(to + "attn_q_b.weight", source + "self_attn.q_b_proj.weight")
        matrix(to + "attn_kv_a_mqa.weight", source + "self_attn.kv_a_proj_with_mqa.weight")
        matrix(to + "attn_output.weight", source + "self_attn.o_proj.weight")
        kv_b = model.floats(source + "self_attn.kv_b_proj.weight").reshape(heads, nope + v, -1)
        put(to + "attn_k_b.weight", kv_b[:, :nope].transpose(0, 2, 1), wide)
        put(to + "attn_v_b.weight", kv_b[:, nope:], wide)
        if layer < c["first_k_dense_replace"]:
            for part in ("gate", "up", "down"):
                matrix(to + f"ffn_{part}.weight", source + f"mlp.{part}_proj.weight")
            continue
        norm(to + "ffn_gate_inp.weight", source + "mlp.gate.weight")
        if source + "mlp.gate.e_score_correction_bias" in model.tensors:
            norm(to + "exp_probs_b.bias", source + "mlp.gate.e_score_correction_bias")
        for part in ("gate", "up", "down"):
            matrix(to + f"ffn_{part}_shexp.weight", source + f"mlp.shared_experts.{part}_proj.weight")
            put(to + f"ffn_{part}_exps.weight",
                numpy.stack([model.floats(source + f"mlp.experts.{e}.{part}_proj.weight")
                             for e in range(c["n_routed_experts"])]), wide)


def main():
    directory, out = pathlib.Path(sys.argv[2]), sys.argv[4]
    wide = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[sys.argv[3]]
    model = Model(directory)
    writer = gguf.GGUFWriter(out, "deepseek2")
    write_parameters(writer, model.config, directory)
    write_tensors(writer, model, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

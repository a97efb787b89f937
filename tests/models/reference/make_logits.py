"""Records reference logits of tiny random models, with their weights.

Run `python tests/models/reference/make_logits.py` where torch and transformers
are installed. Each file in this folder holds one case: config.json as text,
tensors under their Hugging Face names, a padded batch, and the logits that
transformers computes in float32. The tests read them without torch.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
LENGTH = 12

_LLAMA = dict(
  model_type="llama",
  vocab_size=96,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)
_OPT = dict(
  model_type="opt",
  vocab_size=96,
  hidden_size=16,
  ffn_dim=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=20,
)


def _rope(kind, theta=100.0, **fields):
  return {"rope_parameters": dict(rope_type=kind, rope_theta=theta, **fields)}


_LLAMA3 = dict(
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)

CASES = {
  # Small thetas and contexts make every branch of RoPE matter in 12 tokens.
  "llama": _LLAMA | _rope("default"),
  "llama_tied": _LLAMA | dict(tie_word_embeddings=True, rms_norm_eps=1e-2),
  "llama_biases": _LLAMA | dict(attention_bias=True, mlp_bias=True),
  "llama_gelu_head_dim": _LLAMA
  | dict(hidden_act="gelu", head_dim=6, num_key_value_heads=1),
  "llama_linear": _LLAMA | _rope("linear", factor=4.0),
  "llama_dynamic": _LLAMA
  | dict(max_position_embeddings=8)
  | _rope("dynamic", factor=2.0),
  "llama_llama3": _LLAMA | dict(head_dim=12) | _rope("llama3", **_LLAMA3),
  "llama_yarn": _LLAMA
  | dict(head_dim=12)
  | _rope(
    "yarn", factor=4.0, beta_fast=4.0, original_max_position_embeddings=16
  ),
  "mistral": _LLAMA | dict(model_type="mistral", sliding_window=3),
  "mistral_full": _LLAMA | dict(model_type="mistral", sliding_window=None),
  "qwen2": _LLAMA | dict(model_type="qwen2", tie_word_embeddings=True),
  "qwen2_window": _LLAMA
  | dict(
    model_type="qwen2",
    use_sliding_window=True,
    sliding_window=3,
    max_window_layers=1,
  ),
  "opt": _OPT,
  "opt_350m": _OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=8),
  "opt_old_norm": _OPT | dict(_remove_final_layer_norm=True),
  "opt_plain": _OPT
  | dict(
    enable_bias=False,
    layer_norm_elementwise_affine=False,
    activation_function="gelu",
    tie_word_embeddings=False,
  ),
}

_GPT2 = dict(
  model_type="gpt2",
  vocab_size=96,
  n_embd=16,
  n_layer=2,
  n_head=4,
  n_positions=20,
)
_NEOX = dict(
  model_type="gpt_neox",
  vocab_size=96,
  hidden_size=32,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=64,
)
_GEMMA = _LLAMA | dict(head_dim=8)
_GEMMA2 = _GEMMA | dict(
  model_type="gemma2", sliding_window=3, query_pre_attn_scalar=7
)
_GEMMA3 = _GEMMA2 | dict(
  model_type="gemma3_text",
  rope_parameters=dict(
    full_attention=dict(rope_type="linear", factor=4.0, rope_theta=100.0),
    sliding_attention=dict(rope_type="default", rope_theta=10.0),
  ),
)
_FALCON = dict(
  model_type="falcon",
  vocab_size=96,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
)
_PHI3 = _LLAMA | dict(model_type="phi3", pad_token_id=1)


def _longrope(size, original):
  factors = dict(
    short_factor=[1.0 + i for i in range(size)],
    long_factor=[2.0 + 3 * i for i in range(size)],
  )
  return dict(original_max_position_embeddings=original) | _rope(
    "longrope", **factors
  )


_BERT = dict(
  model_type="bert",
  vocab_size=96,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=20,
)
_ROBERTA = _BERT | dict(model_type="roberta", type_vocab_size=1)
# They count positions of tokens that are not padding.
ROBERTAS = ("roberta", "xlm-roberta")
MASKED = ("bert", *ROBERTAS)

_FULL, _SLIDING = "full_attention", "sliding_attention"

CASES |= {
  "gpt2": _GPT2,
  "gpt_neox": _NEOX,
  "qwen3": _LLAMA | dict(model_type="qwen3", head_dim=6),
  "olmo2": _LLAMA | dict(model_type="olmo2", pad_token_id=1),
  "smollm3": _LLAMA
  | dict(model_type="smollm3", no_rope_layers=[1, 0], pad_token_id=1),
  "granite": _LLAMA
  | dict(
    model_type="granite",
    embedding_multiplier=3.0,
    logits_scaling=2.0,
    residual_multiplier=0.5,
    attention_multiplier=0.2,
  ),
  "phi3": _PHI3 | _longrope(2, 8),
  "gemma": _GEMMA | dict(model_type="gemma"),
  "gemma2": _GEMMA2,
  "gemma3_text": _GEMMA3,
  "starcoder2": _LLAMA | dict(model_type="starcoder2"),
  "falcon": _FALCON,
  "bert": _BERT,
  "roberta": _ROBERTA,
  "xlm-roberta": _ROBERTA | dict(model_type="xlm-roberta"),
}

# Further values of every field, compared where torch is installed.
VARIANTS = {
  "llama_multi_head": _LLAMA
  | dict(num_key_value_heads=None, hidden_act="gelu_pytorch_tanh"),
  "mistral_head_dim": _LLAMA
  | dict(
    model_type="mistral",
    head_dim=6,
    rms_norm_eps=1e-2,
    sliding_window=5,
    tie_word_embeddings=True,
  )
  | _rope("yarn", factor=2.0, attention_factor=0.7),
  "qwen2_types": _LLAMA
  | dict(
    model_type="qwen2",
    hidden_act="relu",
    max_position_embeddings=8,
    use_sliding_window=True,
    sliding_window=4,
    layer_types=[_SLIDING, _FULL],
  )
  | _rope("dynamic", factor=2.0),
  "opt_wide": _OPT
  | dict(
    do_layer_norm_before=False,
    enable_bias=False,
    word_embed_proj_dim=24,
    activation_function="gelu_new",
  ),
  "opt_post_norm_untied": _OPT
  | dict(
    do_layer_norm_before=False,
    layer_norm_elementwise_affine=False,
    tie_word_embeddings=False,
  ),
  "bert_gelu_new": _BERT | dict(hidden_act="gelu_new", num_attention_heads=1),
  "roberta_first_pad": _ROBERTA | dict(pad_token_id=0, type_vocab_size=3),
  "gpt2_quick_gelu": _GPT2
  | dict(activation_function="quick_gelu", n_head=1, n_layer=3),
  "neox_dynamic": _NEOX
  | dict(hidden_act="relu", max_position_embeddings=8)
  | _rope("dynamic", factor=2.0, partial_rotary_factor=0.5),
  "smollm3_types": _LLAMA
  | dict(
    model_type="smollm3",
    no_rope_layers=[0, 1],
    use_sliding_window=True,
    sliding_window=3,
    layer_types=[_SLIDING, _FULL],
    pad_token_id=1,
  ),
  "granite_linear": _LLAMA
  | dict(model_type="granite", hidden_act="gelu", rms_norm_eps=1e-2)
  | dict(attention_multiplier=0.7, embedding_multiplier=0.3)
  | _rope("linear", factor=4.0),
  "gemma_multi_query": _GEMMA
  | dict(model_type="gemma", num_key_value_heads=1, rms_norm_eps=1e-2)
  | _rope("default"),
  "bert_unlike": _BERT
  | dict(
    hidden_act="relu",
    layer_norm_eps=1e-2,
    type_vocab_size=3,
  ),
  "roberta_unlike": _ROBERTA
  | dict(hidden_act="relu", layer_norm_eps=1e-5, type_vocab_size=2),
  "gpt2_unlike": _GPT2
  | dict(
    n_inner=20,
    n_head=2,
    activation_function="relu",
    scale_attn_weights=False,
    reorder_and_upcast_attn=True,
    tie_word_embeddings=False,
    layer_norm_epsilon=1e-2,
  ),
  "neox_serial": _NEOX
  | dict(
    use_parallel_residual=False,
    attention_bias=False,
    rotary_pct=0.5,
    rotary_emb_base=50,
    tie_word_embeddings=True,
    layer_norm_eps=1e-2,
  ),
  "neox_whole": _NEOX
  | dict(hidden_act="gelu_new")
  | _rope("linear", factor=4.0, partial_rotary_factor=1.0),
  "qwen3_window": _LLAMA
  | dict(
    model_type="qwen3",
    head_dim=4,
    attention_bias=True,
    use_sliding_window=True,
    sliding_window=3,
    layer_types=[_FULL, _SLIDING],
    tie_word_embeddings=True,
  ),
  "qwen3_yarn": _LLAMA
  | dict(model_type="qwen3", head_dim=12)
  | _rope("yarn", factor=4.0, original_max_position_embeddings=16),
  "olmo2_unlike": _LLAMA
  | dict(
    model_type="olmo2",
    attention_bias=True,
    pad_token_id=1,
    num_key_value_heads=None,
    rms_norm_eps=1e-2,
    tie_word_embeddings=True,
  )
  | _rope("llama3", **_LLAMA3),
  "smollm3_interval": _LLAMA
  | dict(
    model_type="smollm3",
    no_rope_layer_interval=1,
    pad_token_id=1,
    attention_bias=True,
    mlp_bias=True,
  ),
  "smollm3_window": _LLAMA
  | dict(
    model_type="smollm3",
    no_rope_layer_interval=2,
    use_sliding_window=True,
    sliding_window=4,
    tie_word_embeddings=False,
    pad_token_id=1,
  ),
  "granite_plain": _LLAMA
  | dict(
    model_type="granite",
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    num_key_value_heads=None,
  ),
  "phi3_short": _PHI3 | _longrope(2, 32),
  "phi3_partial": _PHI3
  | dict(hidden_size=32, partial_rotary_factor=0.5)
  | _longrope(2, 8),
  "phi3_window": _PHI3 | dict(sliding_window=3, tie_word_embeddings=True),
  "phi3_factor": _PHI3
  | dict(num_key_value_heads=None, rms_norm_eps=1e-2)
  | dict(original_max_position_embeddings=8)
  | _rope(
    "longrope",
    short_factor=[1.0, 2.0],
    long_factor=[3.0, 1.0],
    attention_factor=0.7,
  ),
  "gemma_unlike": _GEMMA
  | dict(
    model_type="gemma",
    tie_word_embeddings=False,
    attention_bias=True,
    hidden_act="relu",
  ),
  "gemma2_no_caps": _GEMMA2
  | dict(attn_logit_softcapping=None, final_logit_softcapping=None),
  "gemma2_low_caps": _GEMMA2
  | dict(
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    hidden_activation="silu",
    rms_norm_eps=1e-2,
  ),
  "gemma2_full": _GEMMA2
  | dict(layer_types=[_FULL, _FULL], attention_bias=True),
  "gemma3_pattern": _GEMMA3 | dict(sliding_window_pattern=2),
  "gemma3_types": _GEMMA3
  | dict(
    layer_types=[_FULL, _SLIDING],
    attention_bias=True,
    final_logit_softcapping=3.0,
  ),
  "gemma3_default_rope": _GEMMA2
  | dict(
    model_type="gemma3_text",
    num_hidden_layers=7,
    rope_theta=100.0,
    rope_local_base_freq=5.0,
  ),
  "starcoder2_window": _LLAMA
  | dict(
    model_type="starcoder2",
    sliding_window=3,
    use_bias=False,
    tie_word_embeddings=False,
    norm_epsilon=1e-2,
    hidden_act="gelu",
  ),
  "starcoder2_linear": _LLAMA
  | dict(model_type="starcoder2", num_key_value_heads=1)
  | _rope("linear", factor=4.0),
  "falcon_serial": _FALCON | dict(parallel_attn=False, bias=True),
  "falcon_multi_head": _FALCON
  | dict(multi_query=False, ffn_hidden_size=24, activation="relu"),
  "falcon_new": _FALCON | dict(new_decoder_architecture=True, num_kv_heads=2),
  "falcon_new_one_norm": _FALCON
  | dict(
    new_decoder_architecture=True,
    num_kv_heads=2,
    num_ln_in_parallel_attn=1,
    tie_word_embeddings=False,
  )
  | _rope("linear", factor=4.0),
  "falcon_new_multi_head": _FALCON
  | dict(new_decoder_architecture=True, layer_norm_epsilon=1e-2),
  "falcon_serial_multi_head": _FALCON
  | dict(parallel_attn=False, multi_query=False),
}


def batch(seed):
  """Makes rows without padding, padded left, and padded right."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(4, 96, (3, LENGTH))
  mask = np.ones((3, LENGTH), bool)
  mask[1, :5] = False
  mask[2, -4:] = False
  tokens[~mask] = 1
  return tokens.astype(np.int32), mask


def reference(fields, seed):
  """Runs transformers on random weights.

  Args:
    fields: config.json as a dict.
    seed: seed of weights and tokens.

  Returns:
    (config, tensors, tokens, mask, logits); the config as transformers writes
    it, the rest in NumPy.
  """
  import torch
  import transformers

  fields = dict(fields)
  config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
  config._attn_implementation = "eager"
  masked = config.model_type in MASKED
  auto = getattr(
    transformers, f"AutoModelFor{'MaskedLM' if masked else 'CausalLM'}"
  )
  model = auto.from_config(config).float().eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.normal_(0.0, 0.3, generator=generator)
      if "norm" in name and name.endswith("weight"):
        parameter.add_(1.0)
  tokens, mask = batch(seed)
  if config.model_type in ROBERTAS:
    # It finds padding by its token, where others use the mask.
    tokens[~mask] = config.pad_token_id
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  more = (
    {}
    if config.model_type in ("opt", *ROBERTAS)
    else {"position_ids": torch.tensor(positions)}
  )

  def run(rows):
    with torch.no_grad():
      out = model(
        input_ids=torch.tensor(tokens[rows].astype(np.int64)),
        attention_mask=torch.tensor(mask[rows].astype(np.int64)),
        **{name: value[rows] for name, value in more.items()},
      )
    return out.logits.numpy()

  rope = str(getattr(config, "rope_parameters", ""))
  if "dynamic" in rope or "longrope" in rope:
    # transformers stretches by the longest row, so each row runs alone, the
    # long one last: the stretch is remembered between calls.
    logits = np.concatenate([run(slice(r, r + 1)) for r in (2, 1, 0)])[::-1]
  else:
    logits = run(slice(None))
  tensors = {
    name: parameter.detach().numpy()
    for name, parameter in model.named_parameters()
  }
  if config.model_type == "gpt_neox" and "lm_head.weight" in tensors:
    # The name in files, which transformers 5 changes when it reads them.
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
  if "lm_head.decoder.weight" in tensors:
    # Tied; in files, the embedding.
    table = tensors.pop("lm_head.decoder.weight")
    tensors["roberta.embeddings.word_embeddings.weight"] = table
  written = json.loads(config.to_json_string(use_diff=False))
  return written, tensors, tokens, mask, logits


def load(name):
  """Reads a recorded case; the same tuple as `reference` returns."""
  with np.load(HERE / f"{name}.npz") as stored:
    arrays = {key: stored[key] for key in stored.files}
  config = json.loads(str(arrays.pop("config")))
  rest = [arrays.pop(key) for key in ("tokens", "mask", "logits")]
  return config, arrays, *rest


def nest(tensors, names, num_layers):
  """Builds our tree from Hugging Face tensors and `hf_parameters`' names."""
  tree = {}
  for path, (name, transposed) in names.items():
    if "{layer}" in name:
      layers = [tensors[name.format(layer=i)] for i in range(num_layers)]
      leaf = np.stack(layers)
    else:
      leaf = tensors[name]
    *modules, last = path.split("/")
    node = tree
    for module in modules:
      node = node.setdefault(module, {})
    node[last] = np.swapaxes(leaf, -1, -2) if transposed else leaf
  return tree


def main():
  for name, fields in CASES.items():
    config, tensors, tokens, mask, logits = reference(fields, seed=0)
    np.savez_compressed(
      HERE / f"{name}.npz",
      config=json.dumps(config),
      tokens=tokens,
      mask=mask,
      logits=logits,
      **tensors,
    )


if __name__ == "__main__":
  main()

"""The benchmark's PyTorch programs, which follow the published codes.

Written from descriptions of MeZO and of the reference implementation of
Bilevel-ZOFO. Where their code does more than the method needs, the cheaper way
is taken: perturbations are added in place, losses are computed at supervised
positions, and there is no dropout. The head is applied to whole rows, as in the
published codes; avoiding this is an advantage of `zofo_jax`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from bench import workload

_EPS = 1e-3


# A test of the benchmark on a CPU stays there.
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
  """Waits for the device."""
  if _DEVICE == "cuda":
    torch.cuda.synchronize()


def device_peak_bytes() -> int | None:
  """Returns the peak of the device's allocator; None on a CPU."""
  return torch.cuda.max_memory_allocated() if _DEVICE == "cuda" else None


def _place(model: Any, config: Any, dtype: str) -> Any:
  """Makes a model of random weights on the device."""
  with torch.device(_DEVICE):
    return model(config).to(getattr(torch, dtype)).eval()


def _llama(sizes: workload.Decoder, dtype: str) -> Any:
  config = transformers.LlamaConfig(
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.hidden_size,
    intermediate_size=sizes.mlp_size,
    num_hidden_layers=sizes.num_layers,
    num_attention_heads=sizes.num_heads,
    num_key_value_heads=sizes.num_kv_heads,
    max_position_embeddings=sizes.max_length,
    tie_word_embeddings=True,
    use_cache=False,
  )
  return _place(transformers.LlamaForCausalLM, config, dtype)


def _opt(sizes: workload.Decoder, dtype: str) -> Any:
  config = transformers.OPTConfig(
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.hidden_size,
    ffn_dim=sizes.mlp_size,
    num_hidden_layers=sizes.num_layers,
    num_attention_heads=sizes.num_heads,
    word_embed_proj_dim=sizes.hidden_size,
    max_position_embeddings=sizes.max_length,
    dropout=0.0,
    use_cache=False,
  )
  return _place(transformers.OPTForCausalLM, config, dtype)


class Batch(NamedTuple):
  """Rows as tensors: tokens and mask [B, L], last position and target [B]."""

  tokens: torch.Tensor
  mask: torch.Tensor
  last: torch.Tensor
  target: torch.Tensor


def _batch(rows: workload.Rows) -> Batch:
  return Batch(
    tokens=torch.from_numpy(rows.tokens).long().to(_DEVICE),
    mask=torch.from_numpy(rows.mask()).long().to(_DEVICE),
    last=torch.from_numpy(rows.lengths).long().to(_DEVICE) - 1,
    target=torch.from_numpy(rows.targets).long().to(_DEVICE),
  )


def _loss(model: Any, batch: Batch) -> torch.Tensor:
  logits = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
  rows = torch.arange(len(batch.tokens), device=_DEVICE)
  return torch.nn.functional.cross_entropy(
    logits[rows, batch.last].float(), batch.target
  )


def _directions(parameters: list[torch.Tensor], seed: int) -> Any:
  """Yields (parameter, z) with the same z for the same seed."""
  torch.manual_seed(seed)
  for parameter in parameters:
    yield parameter, torch.randn_like(parameter)


def _perturb(parameters: list[torch.Tensor], seed: int, scale: float) -> None:
  with torch.no_grad():
    for parameter, z in _directions(parameters, seed):
      parameter.add_(z, alpha=scale)


def make_mezo(work: workload.Work) -> Callable[[], None]:
  """Makes one MeZO step: +eps, f, -2 eps, f, +eps, update.

  z is drawn four times for every parameter, from one seed.

  Args:
    work: the sizes.

  Returns:
    A function that takes a step.
  """
  model = _llama(work.llama, work.dtype)
  batch = _batch(workload.full_rows(work.llama_rows, work.llama.vocab_size))
  parameters = list(model.parameters())
  seeds = np.random.default_rng(0)

  @torch.inference_mode()
  def step():
    seed = int(seeds.integers(2**31))
    _perturb(parameters, seed, _EPS)
    plus = _loss(model, batch)
    _perturb(parameters, seed, -2 * _EPS)
    minus = _loss(model, batch)
    _perturb(parameters, seed, _EPS)
    coefficient = float((plus - minus) / (2 * _EPS))
    _perturb(parameters, seed, -1e-7 * coefficient)
    synchronize()

  return step


class _TwoLora(torch.nn.Module):
  """A linear layer with the adapters p and s, of which one is active."""

  def __init__(self, linear: torch.nn.Linear, rank: int):
    super().__init__()
    self.linear = linear
    self.active = "upper"
    size_in, size_out = linear.in_features, linear.out_features
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    self.a, self.b = (
      torch.nn.ParameterDict(
        {name: torch.nn.Parameter(make()) for name in ("upper", "lower")}
      )
      for make in (
        lambda: torch.randn(size_in, rank, **like) / size_in**0.5,
        lambda: torch.zeros(rank, size_out, **like),
      )
    )
    self.scale = 16.0 / rank

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    low = x @ self.a[self.active] @ self.b[self.active]
    return self.linear(x) + self.scale * low


class Bilevel(NamedTuple):
  """The reference's iteration in two parts.

  Attributes:
    inner: takes T steps on s.
    outer: takes the step on p and the backbone.
    base_bytes: bytes of the backbone.
  """

  inner: Callable[[], None]
  outer: Callable[[], None]
  base_bytes: int


def make_bilevel(work: workload.Work) -> Bilevel:
  """Makes the reference's iteration.

  T Adam steps on s with clipping; the gradient of p from two losses whose
  graphs exist at the same time; a one-sided estimate for the backbone from six
  forward passes, materialised as a full gradient; one Adam over p and the
  backbone.

  Args:
    work: the sizes.

  Returns:
    The two parts.
  """
  model = _opt(work.opt, work.dtype)
  backbone = list(model.parameters())
  for parameter in backbone:
    parameter.requires_grad_(False)
  adapted = []
  for module in list(model.modules()):
    for name in ("q_proj", "v_proj"):
      if hasattr(module, name):
        adapted.append(_TwoLora(getattr(module, name), work.lora_rank))
        setattr(module, name, adapted[-1])
  upper, lower = (
    [w[name] for lora in adapted for w in (lora.a, lora.b)]
    for name in ("upper", "lower")
  )
  lower_adam = torch.optim.Adam(lower, lr=1e-4)
  outer_adam = torch.optim.Adam([*upper, *backbone], lr=1e-7)
  seeds = np.random.default_rng(0)
  penalty = 10.0

  def batch(seed):
    rows = workload.padded_rows(work.opt_rows, work.opt.vocab_size, seed)
    return _batch(rows)

  inner_batches = [batch(seed) for seed in range(work.num_inner_steps)]
  penalty_batch, upper_batch = batch(100), batch(101)

  def loss(adapter, rows):
    for lora in adapted:
      lora.active = adapter
    return _loss(model, rows)

  @torch.no_grad()
  def objective():
    return (
      loss("upper", upper_batch)
      + penalty * loss("upper", penalty_batch)
      - penalty * loss("lower", penalty_batch)
    )

  def inner():
    for rows in inner_batches:
      lower_adam.zero_grad()
      loss("lower", rows).backward()
      torch.nn.utils.clip_grad_norm_(lower, 1.0)
      lower_adam.step()
    synchronize()

  def outer():
    outer_adam.zero_grad()
    first = loss("upper", upper_batch)
    (first + penalty * loss("upper", penalty_batch)).backward()
    seed = int(seeds.integers(2**31))
    _perturb(backbone, seed, _EPS)
    shifted = objective()
    _perturb(backbone, seed, -_EPS)
    coefficient = float((shifted - objective()) / _EPS)
    for parameter, z in _directions(backbone, seed):
      parameter.grad = z.mul_(coefficient)
    outer_adam.step()
    synchronize()

  return Bilevel(
    inner=inner,
    outer=outer,
    base_bytes=sum(w.numel() * w.element_size() for w in backbone),
  )


class Evaluation(NamedTuple):
  """Two ways to score options of one token.

  Attributes:
    by_option: a forward pass for each option, as MeZO's evaluation.
    by_row: one forward pass for all options of a row.
  """

  by_option: Callable[[], np.ndarray]
  by_row: Callable[[], np.ndarray]


def make_evaluation(work: workload.Work) -> Evaluation:
  """Makes evaluations of the same rows; both run in batches by length.

  MeZO evaluates one row at a time; batches of our size are faster.

  Args:
    work: the sizes.

  Returns:
    Functions that return scores, float32 [rows, options].
  """
  model = _llama(work.llama, work.dtype)
  tokens = workload.scored_rows(work)
  order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))

  def log_probs(rows, shift):
    """Returns log p after all but the last `shift` tokens, [rows, V]."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
      padded[i, : len(row)] = torch.tensor(row)
    mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
    logits = model(
      input_ids=padded.to(_DEVICE), attention_mask=mask.long().to(_DEVICE)
    ).logits
    last = logits[torch.arange(len(rows)), lengths - 1 - shift]
    return torch.log_softmax(last.float(), dim=-1)

  def score(columns):
    scores = np.zeros((len(tokens), len(workload.OPTIONS)), np.float32)
    for start in range(0, len(order), work.scored_batch):
      chosen = order[start : start + work.scored_batch]
      scores[chosen] = columns([tokens[i] for i in chosen])
    return scores

  def each_option(rows):
    scores = [
      log_probs([[*row, option] for row in rows], 1)[:, option]
      for option in workload.OPTIONS
    ]
    return torch.stack(scores, dim=1).cpu().numpy()

  def all_options(rows):
    return log_probs(rows, 0)[:, list(workload.OPTIONS)].cpu().numpy()

  return Evaluation(
    by_option=torch.inference_mode()(lambda: score(each_option)),
    by_row=torch.inference_mode()(lambda: score(all_options)),
  )

"""Plans: what is in them, on which slices they say a run fits."""

import json
import math
import os
import pathlib

import jax
import numpy as np
import optax
import pytest

from tests import tiny
from zofo_jax import errors, models
from zofo_jax.builders import budget
from zofo_jax.models.hf import published, weights
from zofo_jax.plan import aot, largest, planner, topologies
from zofo_jax.sharding import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[2]
KEYS = {
  *("weights", "optimizer", "forward_temp", "zo_temp", "lora_temp"),
  "iteration_temp",
}
# Parameters that the models' papers and cards name, in billions.
SIZES = {
  "facebook/opt-125m": 0.125,
  "facebook/opt-1.3b": 1.32,
  "facebook/opt-13b": 12.9,
  "facebook/opt-66b": 65.7,
  "facebook/opt-175b": 174.6,
  "HuggingFaceTB/SmolLM2-135M": 0.135,
  "TinyLlama/TinyLlama_v1.1": 1.10,
  "meta-llama/Llama-2-7b-hf": 6.74,
  "meta-llama/Llama-2-70b-hf": 69.0,
  "meta-llama/Llama-3.1-8B": 8.03,
  "meta-llama/Llama-3.2-1B": 1.24,
  "mistralai/Mistral-7B-v0.3": 7.25,
  "Qwen/Qwen2.5-0.5B": 0.494,
  "Qwen/Qwen2.5-7B": 7.62,
}


@pytest.mark.parametrize("name", SIZES)
def test_known_models_have_their_size(name):
  module, family = models.from_hf(published.CONFIGS[name])
  shapes = weights.shapes(family, module.config).values()
  count = sum(int(np.prod(shape)) for shape in shapes)
  assert count / 1e9 == pytest.approx(SIZES[name], rel=0.02)


def test_every_size_of_the_configs_is_known(command_line, capsys):
  for name in ("opt", "llama"):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    scope: dict = {}
    exec(compile(text, name, "exec"), scope)
    assert set(scope["SIZES"].values()) <= published.CONFIGS.keys()


def config_of(name, **changes):
  config = tiny.base_config()
  config.mesh.data = -1
  config.model.name = name
  config.model.dtype = "bfloat16"
  config.data.max_length = 64
  config.update_from_flattened_dict(changes)
  return config


def test_an_estimate(tmp_path, capsys):
  path = tmp_path / "plan.json"
  changes = {"data.max_length": 512}
  config = config_of("meta-llama/Llama-2-70b-hf", **changes)
  plan = planner.plan(config, "h100:8", str(path))
  assert json.loads(path.read_text()) == plan
  assert plan["estimate"] and plan["fits"]
  assert plan["per_chip_bytes"].keys() == KEYS | {"total"}
  methods = plan["method_bytes"]
  assert methods["mezo"] < methods["lora"] < methods["bilevel"]
  # Weights, gradients and two moments.
  assert methods["full"] > 4 * plan["per_chip_bytes"]["weights"]
  # The norms alone are whole on every chip.
  whole = 69.0e9 * 2 / 4
  assert plan["per_chip_bytes"]["weights"] == pytest.approx(whole, rel=0.01)
  assert plan["mesh"] == {"pert": 1, "data": 2, "fsdp": 1, "model": 4}
  # 2 N operations a token and a pass; 10 inner steps forwards and for the
  # adapters backwards, 2 of p, 6 for theta.
  tokens = 8 * 512
  assert plan["flops"] == pytest.approx(2 * 69e9 * tokens * 30, rel=0.2)
  assert "the run fits in" in capsys.readouterr().out
  assert plan["would_fit"] is None


@pytest.mark.parametrize(
  "name, changes",
  [
    ("llama-7b_v5e-4x4", {}),
    ("opt-66b_v5p-2x2x4", {}),
    (
      "llama-70b_v5e-1x1_host",
      {"model.offload": "host", "model.remat": True}
      | {"lower.batch_size": 8, "upper.batch_size": 8},
    ),
  ],
)
def test_estimates_are_a_little_more_than_the_compiler_s_figures(name, changes):
  path = ROOT / "experiments/plans" / f"{name}.json"
  plan = json.loads(path.read_text())
  changes = {
    **{"lower.batch_size": 16, "upper.batch_size": 16, "data.max_length": 512},
    **{f"mesh.{axis}": size for axis, size in plan["mesh"].items()},
    **changes,
  }
  mesh = mesh_lib.abstract(plan["mesh"], math.prod(plan["mesh"].values()))
  run = planner.make_run(config_of(plan["model"], **changes), mesh)
  sizes = planner.estimate.estimate(run, run.abstract_state(), mesh)
  for part in ("forward_temp", "zo_temp", "lora_temp", "total"):
    compiled = plan["per_chip_bytes"][part]
    assert compiled <= sizes[part] < 1.8 * compiled + 0.2e9, part


@pytest.mark.slow
def test_what_would_fit(capsys, monkeypatch):
  monkeypatch.setattr(planner.largest, "largest", lambda *_: {})
  config = config_of("meta-llama/Llama-2-7b-hf", **{"model.dtype": "float32"})
  plan = planner.plan(config, "l4:1")
  assert not plan["fits"]
  assert plan["would_fit"] == {"model.dtype": "bfloat16"}
  said = capsys.readouterr().out
  assert "It is estimated to fit with --config.model.dtype=bfloat16." in said
  config.update_from_flattened_dict(plan["would_fit"])
  assert planner.plan(config, "l4:1")["fits"]
  # No change of these makes 70 billion weights fit.
  config = config_of("meta-llama/Llama-2-70b-hf")
  assert planner.plan(config, "l4:1")["would_fit"] is None


BY_REWARD = {
  "method": "es",
  "data.task": "squad",
  "generate.max_new_tokens": 8,
  "reward.functions": ("token_f1",),
  "zo.direction": "low_rank",
  "zo.num_directions": 4,
}


def test_a_plan_of_a_population_s_answers(monkeypatch):
  monkeypatch.setattr(planner.estimate, "flops", lambda run: 0.0)
  sizes = []
  for at_once in (0, 2):
    changes = {**BY_REWARD, "reward.directions_at_once": at_once}
    config = config_of("HuggingFaceTB/SmolLM2-135M", **changes)
    sizes.append(planner.plan(config, "h100:1")["per_chip_bytes"])
  whole, part = (size["answers_temp"] for size in sizes)
  assert whole == 2 * part
  # Keys and values of 30 layers, 3 heads of width 64, in two bytes.
  cached = 2 * 30 * 3 * 64 * (64 + 8) * 2
  assert whole > 2 * 4 * config.upper.batch_size * cached
  stored = sum(sizes[0][name] for name in ("weights", "optimizer"))
  assert sizes[0]["total"] >= stored + whole


@pytest.mark.slow
def test_the_answers_are_compiled():
  config = config_of("HuggingFaceTB/SmolLM2-135M", **BY_REWARD)
  single = mesh_lib.make(dict.fromkeys(mesh_lib.AXES, 1))
  programs = aot.lower_programs(planner.make_run(config, single), optax.sgd(1))
  stats = aot.measure(programs["answers"])
  cached = 2 * 30 * 3 * 64 * (64 + 8) * 2
  assert stats.temp_bytes > 2 * 4 * config.upper.batch_size * cached


def test_a_plan_with_weights_on_the_host(capsys, monkeypatch):
  monkeypatch.setattr(planner.estimate, "flops", lambda run: 0.0)
  changes = {"method": "mezo", "mesh.data": 1}
  config = config_of("meta-llama/Llama-2-70b-hf", **changes)
  config.model.offload = "host"
  plan = planner.plan(config, "h100:1")
  assert plan["fits"] and plan["offloaded"] is None
  host = plan["per_chip_host_bytes"]
  # All but the embedding, the head and the norms.
  matrices = 2 * (69.0e9 - 2 * 32000 * 8192)
  assert host["weights"] == pytest.approx(matrices, rel=0.01)
  # A direction, and the update.
  copied = plan["host_transfers"]
  assert copied["to_device"] == 2 * host["weights"]
  assert copied["to_host"] == host["weights"]
  assert copied["seconds"] == pytest.approx(2 * matrices / 32e9, rel=0.01)
  config.zo.write_every = 4
  fewer = planner.estimate.transfers(
    planner.make_run(config, mesh_lib.abstract(config.mesh, 1))
  )
  assert fewer.to_device == 1.25 * host["weights"]
  assert fewer.to_host == 0.25 * host["weights"]
  config.zo.write_every = 1

  assert plan["largest"][""] == "meta-llama/Llama-3.1-70B"
  monkeypatch.setattr(planner.largest, "largest", lambda *_: {})

  nothing = budget.Transfers(0.0, 0.0)
  monkeypatch.setattr(planner.estimate, "transfers", lambda run: nothing)
  config.model.offload = ""
  without = planner.plan(config, "h100:1")
  assert not without["fits"] and without["would_fit"] is None
  assert without["offloaded"] == {
    "per_chip_bytes": plan["per_chip_bytes"]["total"],
    "per_chip_host_bytes": host["total"],
  }
  said = capsys.readouterr().out
  assert "With --config.model.offload=host it is estimated to take" in said


def test_the_largest_model_of_a_family():
  tried = []

  def fits(changes):
    tried.append(changes)
    if "model.quantize" in changes:
      raise errors.UserError("no integers here")
    small = ["125m"]
    if "model.offload" in changes:
      small += ["350m", "1.3b", "2.7b", "6.7b", "13b"]
    return changes["model.name"].removeprefix("facebook/opt-") in small

  assert largest.largest("opt", fits) == {
    "": "facebook/opt-125m",
    "--config.model.quantize=int4": None,
    "--config.model.offload=host": "facebook/opt-13b",
    "--config.model.quantize=int4 --config.model.offload=host": None,
  }
  assert len(tried) <= 4 * 4  # of nine models
  with_remat = lambda changes: "model.remat" in changes
  assert largest.largest("opt", with_remat, remat=False) == {
    "": None,
    "--config.model.quantize=int4": None,
    "--config.model.offload=host": None,
    "--config.model.quantize=int4 --config.model.offload=host": None,
    "--config.model.quantize=int4 --config.model.offload=host "
    "--config.model.remat=True": "facebook/opt-175b",
  }


def test_a_gpu_that_is_not_there(monkeypatch):
  def no_devices(kind):
    raise RuntimeError(f"no {kind}")

  monkeypatch.setattr(jax, "devices", no_devices)
  config = config_of("facebook/opt-125m")
  with pytest.raises(errors.UserError, match="gpu:1 needs 1 devices; there"):
    planner.plan(config, "gpu:1")


REFUSALS = {
  "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.5G of 15.75G hbm.": (
    None,
    int(20.5 * 2**30),
  ),
  "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries "
  "(27.25G) exceeds available HBM (15.75G).": (int(27.25 * 2**30), None),
  "RESOURCE_EXHAUSTED: out of memory": (None, None),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_program_that_the_compiler_refuses_has_no_figures(message):
  class Lowered:
    def compile(self):
      raise ValueError(message)

  stats = aot.measure(Lowered())
  assert (stats.temp_bytes, stats.total_bytes) == REFUSALS[message]
  assert stats.bytes_accessed is None and stats.flops is None
  assert message.startswith(stats.problem)


def test_a_plan_says_what_was_refused(monkeypatch, tmp_path, capsys):
  refusal = aot.CompiledStats(1.0, problem="RESOURCE_EXHAUSTED: too much")
  compiled = aot.CompiledStats(1.0, temp_bytes=2 * 10**9)
  programs = {name: name for name in ("forward", "zo", "lora", "iteration")}
  monkeypatch.setattr(aot, "lower_programs", lambda *_: programs)
  monkeypatch.setattr(aot, "first_order_program", lambda *_: "lora")
  monkeypatch.setattr(
    aot,
    "measure",
    lambda name: refusal if name in ("lora", "iteration") else compiled,
  )
  path = tmp_path / "plan.json"
  config = config_of("meta-llama/Llama-2-7b-hf", **{"mesh.data": 1})
  planner.plan(config, "cpu:1", str(path))
  plan = json.loads(path.read_text())
  assert not plan["fits"]
  assert plan["refused"].keys() == {"lora", "iteration"}
  sizes, methods = plan["per_chip_bytes"], plan["method_bytes"]
  assert (
    sizes["zo_temp"] == 2 * 10**9
    and methods["mezo"] == sizes["weights"] + 2 * 10**9
  )
  missing = (
    *(sizes[k] for k in ("lora_temp", "iteration_temp", "total")),
    *(methods[k] for k in ("bilevel", "lora", "full")),
    *plan["remat_temp_bytes"].values(),
  )
  assert set(missing) == {None}
  said = capsys.readouterr().out
  assert "refused the program of iteration_temp: RESOURCE_EXHAUSTED" in said
  assert "does not fit" in said and " 0.000" not in said


@pytest.mark.slow
def test_a_compiled_plan(tmp_path, monkeypatch):
  model = {
    **published.CONFIGS["TinyLlama/TinyLlama_v1.1"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
  }
  monkeypatch.setitem(published.CONFIGS, "tiny", model)
  plan = planner.plan(
    config_of(
      "tiny",
      **{"mesh.data": 2, "lower.num_steps": 2, "zo.select": "query"},
    ),
    "cpu:2",
  )
  sizes = plan["per_chip_bytes"]
  assert sizes.keys() == KEYS | {"total"}
  assert not plan["estimate"] and plan["fits"]
  rest = sizes["weights"] + sizes["optimizer"]
  assert rest < sizes["total"] < 2 * (rest + sizes["iteration_temp"])
  # Data-parallel: the adapters' gradients, and scalars.
  assert plan["collective_bytes"].keys() == {"all-reduce"}
  assert 0 < plan["collective_bytes"]["all-reduce"] < rest
  assert plan["compile_seconds"] > 0 and plan["bytes_accessed"] > 0


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5e:3x3", "v5e comes as 2x2"),
    ("v5pp:2x2x1", "Did you mean 'v5p'"),
    ("h100", "a number of devices after 'h100:'"),
    ("cpu:0", "found '0'"),
  ],
)
def test_topologies_that_there_are_not(name, message):
  with pytest.raises(errors.UserError, match=message):
    topologies.find(name)


def test_a_model_that_is_not_known():
  config = config_of("facebook/opt-14b")
  with pytest.raises(errors.UserError, match="Did you mean 'facebook/opt-1"):
    planner.make_run(config, mesh_lib.abstract(config.mesh, 1))


def test_the_command(command_line, capsys):
  opt = f"--config={ROOT / 'configs' / 'opt.py'}:size=13b"
  assert command_line("plan", opt) == 2
  assert "--topology: expected devices" in capsys.readouterr().err
  assert command_line("plan", opt, "--topology=h200:2") == 0
  assert "facebook/opt-13b" in capsys.readouterr().out
  # More devices than rows: the weights are divided.
  assert command_line("plan", opt, "--topology=h200:64") == 0
  assert "mesh.data=64" not in capsys.readouterr().out


@pytest.mark.skipif(
  "ZOFO_TPU_COMPILER" not in os.environ,
  reason="minutes; set ZOFO_TPU_COMPILER=1 with the extra tpu installed",
)
def test_the_tpu_compiler(capsys):
  config = config_of(
    "TinyLlama/TinyLlama_v1.1", **{"mesh.data": 1, "mesh.model": 4}
  )
  plan = planner.plan(config, "v5e:2x2")
  sizes = plan["per_chip_bytes"]
  assert plan["fits"] and not plan["estimate"]
  assert sizes["iteration_temp"] < sizes["weights"] < sizes["total"]
  # No copy of the weights anywhere, nor of a table.
  beyond = sizes["zo_temp"] - sizes["forward_temp"]
  assert beyond < 0.1 * sizes["weights"]
  remat = plan["remat_temp_bytes"]
  assert remat["on"] < 0.5 * remat["off"] == 0.5 * sizes["lora_temp"]
  assert jax.default_backend() == "cpu"

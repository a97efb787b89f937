"""What a config may not say, and the field that is named."""

import pytest

from zofo_jax import errors
from zofo_jax.config import defaults, fields, validate

DEFAULTS = defaults.flat(defaults.base_config())


@pytest.fixture
def config():
  config = defaults.base_config()
  config.model.name = "somewhere"
  return config


NUMBERS = [
  name
  for name, field in defaults.FIELDS.items()
  if field.check in (fields.POSITIVE, fields.NOT_NEGATIVE)
]
NAMES = [name for name, field in defaults.FIELDS.items() if field.check.choices]


def test_every_number_is_checked():
  """But for those that may be anything."""
  numbers = {
    name
    for name, value in DEFAULTS.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }
  numbers = {name for name in numbers if not name.startswith("mesh.")}
  assert numbers - set(NUMBERS) == {
    "seed",  # a range: see test_seeds
    "data.seed",
    "data.template",
    "lora.alpha",
    "generate.length_penalty",
  }


@pytest.mark.parametrize("name", NUMBERS)
def test_check_names_the_field(config, name):
  group, _, field = name.rpartition(".")
  part = config[group] if group else config
  part[field] = type(part[field])(-1)
  with pytest.raises(errors.UserError, match=rf"config\.{name}: .*-1"):
    validate.check(config)


@pytest.mark.parametrize("name", [*NUMBERS, "lora.alpha", "mesh.data"])
def test_infinite_numbers(config, name):
  default = DEFAULTS[name]
  values = [2**31, 10**400] if isinstance(default, int) else [1e400, -1e400]
  for value in values:
    config.update_from_flattened_dict({name: value})
    with pytest.raises(errors.UserError) as caught:
      validate.check(config)
    assert f"config.{name}: expected " in str(caught.value)
    assert str(caught.value).endswith(("is too large.", "is not finite."))


@pytest.mark.parametrize("axis", ["data", "fsdp", "model", "pert"])
def test_sizes_of_the_mesh(config, axis):
  for size in (-1, 1, 8):
    config.mesh[axis] = size
    validate.check(config)
  for size in (-2, 0):
    config.mesh[axis] = size
    with pytest.raises(
      errors.UserError, match=rf"mesh\.{axis}: .* -1 .*{size}"
    ):
      validate.check(config)


@pytest.mark.parametrize("name", NAMES)
def test_check_names_the_choices(config, name):
  choices = defaults.FIELDS[name].check.choices
  named = ", ".join(choice or "''" for choice in choices)
  listed, value = f"one of {named}", "nothing"
  if isinstance(DEFAULTS[name], tuple):
    listed = f"some of {', '.join(choices)}, as ('{choices[0]}',)"
    value = (choices[0], "nothing")
  config.update_from_flattened_dict({name: value})
  with pytest.raises(errors.UserError) as caught:
    validate.check(config)
  assert str(caught.value).startswith(
    f"config.{name}: expected {listed}; found 'nothing'."
  )


@pytest.mark.parametrize(
  "field, changes",
  [
    ("zo.scaling", {"scaling": "std", "estimator": "exact"}),
    ("zo.num_directions", {"direction": "per_example", "num_directions": 2}),
    ("zo.optimizer", {"optimizer": "conservative", "num_directions": 2}),
    ("zo.optimizer", {"optimizer": "conservative", "direction": "per_example"}),
    ("zo.optimizer", {"optimizer": "conservative", "scaling": "sign"}),
    ("zo.optimizer", {"optimizer": "conservative", "clip": 1.0}),
    ("zo.objective", {"objective": "accuracy", "estimator": "exact"}),
    ("zo.objective", {"objective": "macro_f1", "direction": "per_example"}),
    ("zo.optimizer", {"optimizer": "adamw", "select": "norm"}),
    ("zo.optimizer", {"optimizer": "adamw", "layers": (0,)}),
    ("zo.weight_decay", {"weight_decay": 0.1, "optimizer": "adam"}),
  ],
)
def test_no_choice_is_ignored(config, field, changes):
  validate.check(config)
  config.zo.update(changes)
  with pytest.raises(errors.UserError, match=rf"^config\.{field}: "):
    validate.check(config)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"adapter.kind": "lra"}, r"adapter\.kind: .*'lra'.*mean 'lora'"),
    ({"adapter.kind": "lora+prefx"}, r"'lora\+prefx'.*mean 'prefix'"),
    ({"adapter.kind": "lora+lora"}, r"each once.*'lora\+lora'"),
    ({"adapter.kind": ""}, r"adapter\.kind: .*found ''"),
    ({"lora.dropout": 1.0}, r"lora\.dropout: .*less than 1; found 1"),
    ({"prefix.init": "token"}, r"prefix\.init: .*mean 'tokens'"),
    ({"prefix.projection": 8}, r"prefix\.projection: .*'random'"),
    ({"prompt.init": "text"}, r"prompt\.text: expected words"),
    ({"prompt.text": "Good?"}, r"prompt\.text: .*only then; found 'Good\?'"),
    (
      {
        "method": "mezo_peft",
        "adapter.kind": "prefix",
        "zo.direction": "low_rank",
      },
      r"zo\.direction: 'low_rank' needs matrices",
    ),
  ],
)
def test_adapters_that_there_are_not(config, changes, words):
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=words):
    validate.check(config)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"data.dir": "rows"}, r"data\.dir is 'rows'; expected False, or hub:"),
    ({"data.dir": "hub:a/b", "data.shots": 2}, r"data\.shots needs every row"),
    ({"data.order": "content"}, r"data\.order needs every row"),
  ],
)
def test_streams_are_of_the_hub(config, changes, words):
  config.update_from_flattened_dict({"data.stream": True, **changes})
  with pytest.raises(errors.UserError, match=rf"data\.stream: .*{words}"):
    validate.check(config)


def test_positions_that_adapters_take(config):
  taken = {}
  for config.adapter.kind in ("lora", "prefix", "prompt", "prompt+lora+prefix"):
    taken[config.adapter.kind] = defaults.num_virtual(config)
  assert list(taken.values()) == [0, 5, 10, 15]
  assert defaults.adapter_kinds(config) == ("lora", "prefix", "prompt")


@pytest.mark.parametrize(
  "name, valid, wrong",
  [
    # The largest of the three streams' seeds, 3 * seed + 2, has 32 bits.
    ("seed", (0, 1431655764), (-1, 1431655765, 99999999999)),
    ("data.seed", (0, 2**32 - 1), (-1, 2**32)),
  ],
)
def test_seeds(config, name, valid, wrong):
  for seed in valid:
    config.update_from_flattened_dict({name: seed})
    validate.check(config)
  for seed in wrong:
    config.update_from_flattened_dict({name: seed})
    with pytest.raises(errors.UserError, match=rf"{name}: .* from 0 .*{seed}"):
      validate.check(config)


@pytest.mark.parametrize(
  "name, value",
  [
    ("zo.layers", ("first",)),
    ("zo.layers", (1.5,)),
    ("data.options", (" bad", 3)),
    ("data.labels", (None, "good")),
    ("train.trackers", (1,)),
    ("meta.train", (1,)),
    ("adapt.runs", (None,)),
    ("generate.stop", (10,)),
    ("ckpt.may_change", (0,)),
  ],
)
def test_items_of_tuples(config, name, value):
  config.update_from_flattened_dict({name: value})
  defaults.replace_paths(config, str.upper)  # leaves the complaint to the check
  with pytest.raises(errors.UserError, match=rf"config\.{name}: expected"):
    validate.check(config)


def test_every_tuple_is_checked():
  for name, value in DEFAULTS.items():
    if isinstance(value, tuple):
      assert not defaults.FIELDS[name].check.accepts((object(),)), name


BY_REWARD = {"method": "es", "reward.functions": ("exact_match",)}


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"reward.functions": ()}, r"reward\.functions: .*found nothing"),
    (
      {"reward.functions": ("exact",)},
      r"reward\.functions: .*found 'exact'.*mean 'exact_match'",
    ),
    ({"reward.functions": ("regex",)}, r"reward\.pattern: .*'regex'"),
    ({"reward.functions": ("length",)}, r"reward\.max_words: .*'length'"),
    ({"reward.pattern": "("}, r"reward\.pattern: .*regular expression"),
    ({"reward.weights": (1.0, 2.0)}, r"reward\.weights: .*1 .*found 2"),
    ({"reward.weights": (float("nan"),)}, r"reward\.weights: .*finite"),
    ({"zo.estimator": "forward"}, r"zo\.estimator: .*'central'.*'forward'"),
    ({"zo.optimizer": "conservative"}, r"zo\.optimizer: 'conservative'"),
    ({"zo.direction": "per_example"}, r"zo\.direction: .*'per_example'"),
    ({"zo.objective": "accuracy"}, r"zo\.objective: .*'reward'; found 'acc"),
    ({"train.max_loss_ratio": 4.0}, r"train\.max_loss_ratio: .*found 4"),
    ({"method": "mezo"}, r"reward\.functions: only methods 'es'"),
    (
      {"method": "mezo", "zo.objective": "reward"},
      r"zo\.objective: .*expected method 'es'.*found 'mezo'",
    ),
    (
      {"method": "bilevel", "zo.objective": "reward", "command": "metatrain"},
      r"zo\.objective: .*'metatrain'",
    ),
    (
      {
        "method": "bilevel",
        "zo.objective": "reward",
        "zo.direction": "guided",
      },
      r"guided\.random: .*'low_rank'",
    ),
    ({"method": "es_peft", "zo.select": "mlp"}, r"zo\.select: .*'es_peft'"),
  ],
)
def test_rewards_have_what_they_need(config, changes, words):
  config.update_from_flattened_dict(BY_REWARD)
  validate.check(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=rf"^config\.{words}"):
    validate.check(config)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"guided.lengths": "parabola"}, "'parabola' has no lengths of earlier"),
    ({"command": "metatrain"}, "expected 1; found 3"),
  ],
)
def test_a_history_has_lengths_and_one_task(config, changes, words):
  config.zo.direction, config.guided.lengths = "guided", "descend"
  config.guided.history = 3
  validate.check(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(
    errors.UserError, match=rf"^config\.guided\.history: .*{words}"
  ):
    validate.check(config)

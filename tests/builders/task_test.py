"""Tasks that a config declares: what is warned of."""

import pytest

from tests import tiny
from zofo_jax.builders import task


@pytest.mark.parametrize(
  "prompt, option, warned",
  [
    ("{text} It was", "bad", True),
    ("{text} It was", " bad", False),
    ("{text}", "bad", True),
    ("{text} It was ", "bad", False),
    ("{text} Answer:", "Yes", False),
    ("{text}\n", "bad", False),
    ("{text} in {{x}}", "bad", False),
    ("{text} \u5f88", "\u597d", False),  # no spaces between words
    ("{text} It was", "\u00e9tude", True),
    ("{text} It was", "?", False),
  ],
)
def test_options_without_a_space(caplog, prompt, option, warned):
  config = tiny.base_config()
  config.data.task = "mine"
  config.data.prompt, config.data.options = prompt, (option, " good")
  task.load_task(config)
  assert len(caplog.records) == warned
  if warned:
    assert f"expected ' {option}'" in caplog.text

"""RoBERTa or BERT, which fill a mask, on MeZO's few-shot tasks.

  zofo train --config=roberta:size=large,task=sst2,shots=16 --workdir=runs/mask

`method=mezo` (the default here) is MeZO with the values of its paper, on all
weights; `method=mezo_peft` with `adapter=lora` or `adapter=prefix` is MeZO on
an adapter, and any other method has this project's defaults. Tasks with prompts
for a mask: sst2, sst5, trec, snli, mnli, rte, qnli and others (`zofo tasks`).
"""

from zofo_jax.config import presets

SIZES = {
  "base": "FacebookAI/roberta-base",
  "large": "FacebookAI/roberta-large",
  "xlm-base": "FacebookAI/xlm-roberta-base",
  "xlm-large": "FacebookAI/xlm-roberta-large",
  "bert-base": "google-bert/bert-base-uncased",
  "bert-base-cased": "google-bert/bert-base-cased",
  "bert-large": "google-bert/bert-large-uncased",
}


def get_config(arg: str = ""):
  """Returns the config of `size=...,task=...,shots=...,method=...`."""
  return presets.masked_config(arg, SIZES, size="large")

"""Chat templates by hand, which mark what is learned, and a tokenizer.

Without these marks, as in most published templates, what is learned must be
found in the rendered text.
"""

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

CHATML = """
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
LLAMA3 = """
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}
{{- message['content'] | trim + '<|eot_id|>' -}}
{% endgeneration %}
{%- else -%}
{{ message['content'] | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""
# The system message is part of the last one of the user.
MISTRAL = """
{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\n\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set begins = system if messages[loop.index0 + 2:] | length == 0 else '' -%}
{{ '[INST] ' + begins + message['content'] + '[/INST]' }}
{%- else -%}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
_SPECIAL = (
  *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"),
  *("<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
)


def without_blocks(template):
  """Returns a template that does not mark what is learned."""
  return template.replace("{% generation %}", "{{- '' }}").replace(
    "{% endgeneration %}", "{{- '' }}"
  )


def make_tokenizer(template=None):
  """Returns a tokenizer of bytes, in which a space begins a token."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *alphabet))}
  merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIT"]
  for pair in merges:
    vocabulary["".join(pair)] = len(vocabulary)
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<s>",
    eos_token="</s>",
    additional_special_tokens=list(_SPECIAL[2:]),
  )
  fast.chat_template = template
  return fast

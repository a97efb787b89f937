"""Writes the table of config fields into the page that asks for it."""

from zofo_jax.config import show


def on_page_markdown(markdown, **unused):
  return markdown.replace("{{ fields }}", show.as_markdown())

"""Converts TeX in the built pages to MathML, so that they need no script."""

import html
import re

from latex2mathml import converter

_TEX = re.compile(
  r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S
)


def on_page_content(content, **unused):
  """Hook that MkDocs calls with the HTML of every page."""

  def convert(match):
    display = "block" if match[2] == "[" else "inline"
    return converter.convert(html.unescape(match[3]), display=display)

  return _TEX.sub(convert, content)

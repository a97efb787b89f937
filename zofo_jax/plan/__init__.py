"""Whether a run fits, before there are devices or weights."""

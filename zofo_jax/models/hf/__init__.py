"""Everything that knows Hugging Face's files."""

"""Structured output: what requests may ask of an answer's form, as grammars for the workers."""

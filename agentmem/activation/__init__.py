"""Activation memory: KV states of prompt prefixes, as page files found by content and checked before use."""

"""Parametric memory: records as training text, LoRA training, the gate, and the versions."""

"""agentmem.adapters: what connects core to the outside, a file per adapter, found by its name."""

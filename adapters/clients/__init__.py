"""Clients of the vendors' SDKs that `agentmem.wrap` can give a memory: one file each, named as the SDK's package."""

"""Servers that the contract tests drive over real loopback sockets."""

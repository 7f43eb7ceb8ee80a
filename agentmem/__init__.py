"""agentmem: one memory API over three kinds of memory, on any model provider."""

"""Total cost of ownership: what memory costs a month for many users, by host, machine and memory policy, simulated."""

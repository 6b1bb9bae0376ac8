"""``--fit``: choose rate, rank, method and steps by paired runs, and train with the choice."""

"""``--fit``: choose rate, rank, method and steps by paired runs, and train with what was chosen.

`space` has the configurations, `search` the successive halving, both without models; `runs` trains
them on models, latents and prompts that are loaded once; `report` writes what came out.
"""

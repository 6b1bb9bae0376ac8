"""Programs that nobody has read, run where they can do no harm.

`runner` starts one process per program; `child` is what runs in it. Each further file is one layer
of protection, and each layer stops what it is there for without the others.
"""

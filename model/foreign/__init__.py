"""Models that were written elsewhere: their blocks as steps of a chain, their own forward in charge.

One forward on tensors without data tells which modules are blocks, what each is given and from where
(`capture`). A call of a block is a step (`calls`), which can be kept whole, have its children recomputed, or
be run again as a whole (`runs`).
"""

"""``diffx bench``: side-by-side measurements that print a table and write JSON.

A bench takes ``out`` (the JSON file of its report, or None), ``rounds`` (turns of each contestant)
and ``device``. It raises ``UserError`` for bad input before it measures. Its report holds the
machine, settings, ``seconds`` of every round and peak ``bytes`` by work and contestant, ``ratios``.
"""

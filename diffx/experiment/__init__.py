"""``diffx experiment``: the papers' claims, the runs that test them, and a verdict by a rule."""

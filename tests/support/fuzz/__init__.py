"""Damaged input of every kind that the package reads, and what has to come of it: a right result or one clear line.

`mutate.py` has the damage, `kinds.py` and `model_kinds.py` what is damaged, who reads it and who judges, `examine.py`
the verdict. By hand, ten thousand of them: scripts/dev/fuzz.py.
"""

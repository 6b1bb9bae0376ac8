"""How flat the minimum of a run is: the parts of ``python -m eval.landscape``."""

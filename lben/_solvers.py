"""Is the package `solvers` that Python finds the one that comes with lben?

A folder named `solvers` in the current directory would shadow it.
"""

import solvers

if not hasattr(solvers, "PeacemanRachford"):
    raise ImportError(
        f"a folder named solvers at {solvers.__path__[0]} shadows the package of that name "
        "that comes with lben: rename that folder, or run from another one"
    )

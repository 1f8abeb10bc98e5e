"""``from nodelens.evaluate import evaluate``, now ``nl.evaluate``: for one version the old module works too, with a warning.

An imported module takes the place of the function in ``nodelens``, so it can be called like the function.
"""

import sys
import warnings
from types import ModuleType
from typing import Any

from nodelens.evaluation.evaluate import evaluate


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
warnings.warn(
    "nodelens.evaluate is now nodelens.evaluation.evaluate; the function is nl.evaluate", DeprecationWarning, stacklevel=2
)

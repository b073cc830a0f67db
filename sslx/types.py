"""The words of every signature, and the dimension key.

B batch   V views   H W image   C channels   P projection   T time (frames, samples)
N tokens  K kept tokens   D width   L text length   Q queue   E edges   F input features
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Array = jax.Array
Tree = Any
Batch = Mapping[str, Array]  # axis 0 of every leaf is the example, views are axis 1
Params = Tree  # what the optimizer moves
Buffers = Tree  # what is carried from step to step and it does not
Metrics = Mapping[str, Array]  # scalars of one step, still on the device
Schedule = Callable[[Array | int], Array | float]  # step -> value

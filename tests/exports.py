"""What an export is told of a run that was never trained."""

from sslx.export.card import About
from sslx.views import Normalize, Views


def about(sides=24, statistics=None, **more) -> About:
    """Pictures of that size, normalized by (mean, std) in the eval view."""
    height, width = (sides, sides) if isinstance(sides, int) else sides
    views = Views() if statistics is None else Views(eval=Normalize(*statistics))
    return About(shapes={"image": (1, height, width, 3)}, views=views, **more)

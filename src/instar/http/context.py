"""Who asks, as handlers meet it: the record is in `model`, because operations are accepted in its name."""

from instar.model.context import RequestContext

__all__ = ["RequestContext"]

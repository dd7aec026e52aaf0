"""What the attention of a polynomial model does: beside softmax's (`diagnose`), and while it trains (`Monitor`).

Imports `adaptation` (to observe softmax) and below. Other rooms come for `diagnose` and its `Diagnosis`.
"""

from .diagnosis import diagnose
from .report import Diagnosis

__all__ = ["Diagnosis", "diagnose"]

"""The system's time."""

import time


class SystemClock:
    def now(self) -> float:
        return time.monotonic()
